"""What a step of quantization-aware training takes beside the same step of the float model.

    python benchmarks/qat_step.py --device cuda --out benchmarks/results/qat_step.json

A random llama of SmolLM2's sizes, 8 x 1024 tokens: forward, backward and AdamW (torch's fused), with 4-bit weights a
row and 4-bit inputs a tensor after LSQ, over the same step of the model as it is. Both as they are (``eager``), both
through torch.compile, and both compiled and recorded into CUDA graphs (``reduce-overhead``); weights of bfloat16, and
of float32 multiplied in bfloat16 (``mixed``). Steps of the two take turns; the ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.training.prepare import prepare

SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "W4A4 LSQ": (
        {"weights": "int4_full channel scale=learned", "inputs": "int4 tensor static scale=learned"},
        {"weights": "lsq", "inputs": "lsq"},
    ),
    "W4A4 of tokens, ste": ({"weights": "int4 channel", "inputs": "int4 token"}, {}),
}
MODES: dict[str, dict[str, Any] | None] = {"eager": None, "compiled": {}, "recorded": {"mode": "reduce-overhead"}}


def model(options: argparse.Namespace, dtype: torch.dtype) -> Any:
    """SmolLM2's shape, with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES, num_hidden_layers=options.layers, vocab_size=options.vocabulary, tie_word_embeddings=True,
        max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(options.device, dtype).train()


def step_of(net: Any, ids: torch.Tensor, mode: dict[str, Any] | None, mixed: bool) -> Callable[[], None]:
    """A whole step."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=ids.is_cuda)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16) if mixed else nullcontext():
            found: torch.Tensor = net(input_ids=tokens, labels=tokens, use_cache=False).loss
        return found

    forward: Any = loss_of if mode is None else torch.compile(loss_of, fullgraph=True, **mode)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        forward(ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Callable[[], None], device: str) -> float:
    """Seconds of one."""
    began = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Measure each scheme in each mode; print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--tokens", type=int, nargs=2, default=(8, 1024), help="sequences, and tokens of one")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    ids = torch.randint(options.vocabulary, tuple(options.tokens), device=options.device)
    rows: list[dict[str, Any]] = []
    result = {
        "what": (__doc__ or "").split("\n")[0], "versions": versions(), "tokens": list(options.tokens), "rows": rows,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
    }  # fmt: skip
    for name, (scheme, parts) in SCHEMES.items():
        for mixed in (False, True):
            for mode in options.modes:
                torch.compiler.reset()
                dtype = torch.float32 if mixed else torch.bfloat16
                twin = prepare(model(options, dtype), scheme, parts, run=lambda net: net(input_ids=ids[:1])).train()
                float_step = step_of(model(options, dtype), ids, MODES[mode], mixed)
                low_step = step_of(twin, ids, MODES[mode], mixed)
                began = time.perf_counter()
                for _ in range(3):
                    timed(float_step, options.device)
                    timed(low_step, options.device)
                warm = time.perf_counter() - began
                turns = [
                    (timed(float_step, options.device), timed(low_step, options.device)) for _ in range(options.turns)
                ]
                row = {
                    "scheme": name, "weights": "float32, mixed" if mixed else "bfloat16", "mode": mode,
                    "ratio": statistics.median(low / plain for plain, low in turns),
                    "float_ms": 1e3 * statistics.median(plain for plain, _ in turns),
                    "ms": 1e3 * statistics.median(low for _, low in turns), "warm_up_seconds": round(warm, 1),
                }  # fmt: skip
                rows.append(row)
                print(row, flush=True)
                if options.out:
                    atomic_write_json(options.out, result)


if __name__ == "__main__":
    main()
