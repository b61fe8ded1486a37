"""Weight-only peers: SmolLM2's linear layers through the peer's quantizer and back, a float folder that run.py judges.

    PEER/bin/python benchmarks/quality/peers/weights.py --tool hqq --model FOLDER --out DEST [--bits 4] [--group 64]
    python benchmarks/quality/run.py --folder DEST ...

``hqq`` (half-quadratic, zero points) and ``bitsandbytes`` (NF4 and FP4, blocks of 64, absmax) compute on the CPU; both
need torch, transformers and the tool itself in an environment of their own. DEST/peer.json says what was done.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantize, dequantize, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", choices=("hqq", "bitsandbytes-nf4", "bitsandbytes-fp4"), required=True)
    parser.add_argument("--model", type=Path, required=True, help="a folder with the float model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    started, bits = time.perf_counter(), 0.0
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    with torch.no_grad():
        for _, module in layers:
            weight, bits = through(args.tool, module.weight.data, args.bits, args.group)
            module.weight.data = weight.float()
    seconds = time.perf_counter() - started
    model.to(torch.bfloat16).save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    tool = args.tool.partition("-")[0]
    facts = {"tool": tool, "version": version(tool), "layer_bits": bits, "seconds": seconds, "layers": len(layers)}
    (args.out / "peer.json").write_text(json.dumps(facts) + "\n")


def through(tool: str, weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, float]:
    """A weight as the tool stores it, and the bits it takes with its scales."""
    if tool == "hqq":
        from hqq.core.quantize import Quantizer

        packed, meta = Quantizer.quantize(
            weight, nbits=bits, channel_wise=True, group_size=group, optimize=True, round_zero=False, axis=1,
            device="cpu", compute_dtype=torch.float32,
        )  # fmt: skip
        return Quantizer.dequantize(packed, meta).reshape(weight.shape), bits + 32 / group  # float16 scale and zero
    import bitsandbytes.functional as functional

    packed, state = functional.quantize_4bit(weight, blocksize=group, quant_type=tool.rpartition("-")[2])
    return functional.dequantize_4bit(packed, state).reshape(weight.shape), 4 + 32 / group  # float32 scale


if __name__ == "__main__":
    main()
