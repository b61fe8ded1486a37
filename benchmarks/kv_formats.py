"""What a KV cache in few bits costs SmolLM2 in nats: formats, what stays in float, rotated and sorted channels.

    python benchmarks/kv_formats.py --out benchmarks/results/kv_formats.json
    python benchmarks/kv_formats.py --windows 1 --length 256 --rows "4 bits, rotated"     # a first look

Windows of 1,024 tokens of the half of ``builtin`` that is held out (the English text of ``pydoc_data.topics``) go
through the model in chunks, as a conversation does, so that a query meets the newest tokens in float where a line says
so and all others as the cache has them. Nats a token over the same walk with a float cache (1 % of perplexity is 0.01
nats); ``bytes`` are those of the whole cache at the end, a token.

The bars: 4-bit keys and values within 0.02 nats; 2-bit keys scaled along tokens, with newest tokens in float, far below
2-bit keys scaled within tokens; BFP12 sorted within 1 % of BFP16's perplexity and below unsorted at b = 16 and 32, and
the same at b = 64, where a head is one block.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nybble
from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.data import load_text, token_samples
from nybble.kv_format import KVFormat
from nybble.nn.kv_cache import make_cache
from nybble.nn.kv_model import CacheHook, cache_argument, use_quantized_cache

sys.path.insert(0, str(Path(__file__).parent / "quality"))
from run import hardware

TWO = "int2 group=32 symmetric=false"
ALONG = "keys=(int2 block=32x1 symmetric=false)"
ROWS: dict[str, str] = {
    "8 bits": "int8 token",
    "4 bits, a scale a token": "int4 token",
    "4 bits, groups of 32": "int4 group=32",
    "4 bits, groups of 32, zero points": "int4 group=32 symmetric=false",
    "4 bits, rotated": "int4 group=32 rotate",
    "4 bits, keys along tokens": "keys=(int4 block=32x1) values=(int4 group=32) residual=32",
    "4 bits, keys along tokens, zero points": "keys=(int4 block=32x1 symmetric=false) "
    "values=(int4 group=32 symmetric=false) residual=32",
    "4 bits, keys along tokens, zero points, sink": "keys=(int4 block=32x1 symmetric=false) "
    "values=(int4 group=32 symmetric=false) residual=32 sink=4",
    "4 bits, rotated, sink": "int4 group=32 rotate sink=4",
    "nvfp4": "nvfp4",
    "nvfp4, rotated": "nvfp4 rotate",
    "mxfp4": "mxfp4",
    "mxfp4, rotated": "mxfp4 rotate",
    "2 bits": TWO,
    "2 bits, rotated": f"{TWO} rotate",
    "2 bits, 128 newest": f"{TWO} residual=128",
    "2 bits, keys along tokens": f"{ALONG} values=({TWO})",
    "2 bits, keys along tokens, 128 newest": f"{ALONG} values=({TWO}) residual=128",
    "2 bits, keys along tokens, 128 newest, sink": f"{ALONG} values=({TWO}) residual=128 sink=4",
    "bfp16": "bfp16",
    **{
        f"bfp12, b = {b}{more and ', '}{more}": f"bfp12 group={b} {words}".strip()
        for b in (16, 32, 64)
        for more, words in (("", ""), ("keys sorted", "sort=keys"), ("sorted", "sort"), ("rotated", "rotate"))
    },
}


@torch.no_grad()
def walked(model: Any, tokens: Tensor, chunk: int) -> tuple[float, int]:
    """Nats a token of [windows, length] tokens, fed in chunks, and the bytes of the cache at the end."""
    hook = next((h for h in model._forward_pre_hooks.values() if isinstance(h, CacheHook)), None)
    cache = make_cache(model.config, KVFormat.parse("none")) if hook is None else hook.make(model)
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, tokens.shape[1] - 1, chunk):
        part = tokens[:, start : start + chunk]
        logits = model(part, use_cache=True, **{cache_argument(type(model)): cache}).logits.float()
        wanted = tokens[:, start + 1 : start + 1 + chunk]
        logits = logits[:, : wanted.shape[1]].flatten(0, 1)
        total += nn.functional.cross_entropy(logits, wanted.flatten(), reduction="sum").double()
    return float(total) / (tokens.shape[0] * (tokens.shape[1] - 1)), int(cache.nbytes())


def held_out(tokenizer: Any, windows: int, length: int) -> Tensor:
    """[windows, length] tokens."""
    samples = token_samples(load_text("builtin", "evaluation"), tokenizer, samples=windows, seq_len=length)
    return samples.input_ids


def main() -> None:
    """Each row, printed and written as it comes."""
    options = parsed()
    model, tokenizer = nybble.load(options.smollm2 or options.model, dtype=options.dtype, device=options.device)
    tokens = held_out(tokenizer, options.windows, options.length).to(options.device)
    result: dict[str, Any] = {
        "what": (__doc__ or "").split("\n")[0], "model": "SmolLM2-135M-Instruct Q4_1, in floats",
        "hardware": hardware(options.device), "versions": versions(), "dtype": options.dtype,
        "windows": options.windows, "length": options.length, "chunk": options.chunk, "rows": {},
    }  # fmt: skip
    exact, size = walked(model, tokens, options.chunk)
    result["float"] = {"nll": exact, "bytes": size / tokens.numel()}
    print(f"{'float':48s} {exact:.4f} nats, {size / tokens.numel():.0f} bytes a token", flush=True)
    for name, line in ROWS.items():
        if options.rows and name not in options.rows:
            continue
        began = time.perf_counter()
        use_quantized_cache(model, KVFormat.parse(line))
        nll, size = walked(model, tokens, options.chunk)
        use_quantized_cache(model, None)
        result["rows"][name] = {"line": line, "over_float": nll - exact, "bytes": size / tokens.numel()}
        seconds = time.perf_counter() - began
        print(
            f"{name:48s} {nll - exact:+.4f} nats, {size / tokens.numel():.0f} bytes a token, {seconds:.0f} s",
            flush=True,
        )
        if options.out:
            atomic_write_json(options.out, result)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--smollm2", help="the model's GGUF file, where the package that carries it isn't installed")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--chunk", type=int, default=32, help="tokens that are fed at once")
    parser.add_argument(
        "--rows", nargs="*", default=[], choices=list(ROWS), metavar="ROW", help="those that are wanted"
    )
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
