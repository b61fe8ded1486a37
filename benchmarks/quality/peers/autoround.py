"""AutoRound as a peer: Intel's sign-gradient tuning of weight rounding on run.py's own calibration tokens.

    PYTHONPATH=src:benchmarks/quality PEER/bin/python benchmarks/quality/peers/autoround.py
        --calibration calibration.jsonl --out "AutoRound INT4 g64" [--model FOLDER] [--device cuda] [--iters 200]
        [--samples 128] [--seq-len 1024]
    python benchmarks/quality/run.py --folder "AutoRound INT4 g64" ...

PEER holds auto-round with what it asks for, and what nybble needs: model and tokens are made as run.py makes them.
Symmetric integers with a float16 scale for each group of a row; embeddings and lm_head stay in float; every setting
that has no option here is auto-round's own. The folder holds the weights after quantization and back, and peer.json
says what was done. A GPU compiles auto-round's steps first; TORCHDYNAMO_DISABLE=1 goes without.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from run import named

from nybble.data import TokenSamples, load_text, token_samples
from nybble.models.sources.open import open_source


def main() -> None:
    """Tune, dequantize, save."""
    args = arguments()
    source = open_source(args.model)
    tokenizer = source.tokenizer()
    text = load_text(args.calibration, "calibration", tokenizer)
    tokens = token_samples(text, tokenizer, samples=args.samples, seq_len=args.seq_len, seed=0)
    model = source.model(torch.bfloat16, args.device)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    tuner = AutoRound(
        model, tokenizer, bits=args.bits, group_size=args.group, sym=True, dataset=batches(tokens, args.batch),
        iters=args.iters, seqlen=args.seq_len, nsamples=args.samples, batch_size=args.batch, device_map=args.device,
    )  # fmt: skip
    model, layers = tuner.quantize()
    if args.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    facts = {
        "tool": "auto-round",
        "version": version("auto-round"),
        "layer_bits": args.bits + 16 / args.group,  # float16 scale; the zero point of symmetric groups is fixed
        "seconds": round(seconds, 2),
        "device_memory": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
        "layers": sum(layer.get("bits", 16) < 16 for layer in layers.values()),
        "iters": args.iters,
        "calibration": named(tokens),
    }
    (args.out / "peer.json").write_text(json.dumps(facts) + "\n")


def batches(tokens: TokenSamples, size: int) -> list[dict[str, torch.Tensor]]:
    """What the model is called with. The mask says that all tokens count.

    Without it auto-round takes every token equal to the padding token for padding; SmolLM2 pads with its
    end-of-sequence token, which stands between documents here.
    """
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in torch.split(tokens.input_ids, size)]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--iters", type=int, default=200, help="steps of the tuning, for each decoder block")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
