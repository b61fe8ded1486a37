"""LLM-QAT on SmolLM2: trained on texts of its own and on real ones, beside the best of post-training at equal bits.

    python benchmarks/llm_qat.py --device cuda --texts build/llm_qat/texts.jsonl --count 20000 --make
    python benchmarks/llm_qat.py --device cuda --texts build/llm_qat/texts.jsonl --rows W4A8KV4 --out a.json
    python benchmarks/llm_qat.py --merge a.json b.json --out benchmarks/results/llm_qat.json

Weights are 4 bits a row, inputs 8 or 4 bits a token, the KV cache 4 bits a token; embeddings and head are float, as in
the paper. Everyone has the same scheme. ``self`` trains on what the model made of itself (greedy for three to five
tokens, then drawn), ``real`` on the calibration half of ``builtin`` (the English text of ``pydoc_data.topics``) over
and over, for as many updates; all are judged on its other half, which nobody has seen. The post-training recipes are
calibrated on the real half. Perplexity, and nats a token over the float model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import nybble
from nybble.core.files import atomic_write_json
from nybble.core.progress import Silent
from nybble.core.seeds import derive_seed
from nybble.core.versions import versions
from nybble.pipelines.dataset import generate_dataset
from nybble.pipelines.evaluate import run_eval
from nybble.pipelines.request import build_recipe
from nybble.pipelines.train import train
from nybble.training.generated import Generation

SCHEMES = {
    f"W4A{bits}KV4": {"weights": "int4 channel", "inputs": f"int{bits} token", "kv": "int4 token"} for bits in (8, 4)
}
POST = ("rtn", "gptq", "smoothquant", "quarot", "signround")
DATA = ("self", "real")
ROTATED = ", rotated"
"""Of a training that begins with QuaRot's folded rotations: the same network in float, without outliers."""


def rows_of(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Scheme and way, of those that are wanted."""
    every = [
        (scheme, way)
        for scheme in SCHEMES
        for way in (*POST, *(f"llm-qat, {data}{more}" for more in ("", ROTATED) for data in DATA))
    ]
    words = options.rows
    return [row for row in every if not words or any(word in f"{row[0]} {row[1]}" for word in words)]


def quantized(scheme: str, way: str, options: argparse.Namespace, out: Path) -> str:
    """A folder."""
    recipe = build_recipe(way, scheme=SCHEMES[scheme], effort="quick" if way == "signround" else "full")
    settings = {"samples": options.samples, "seq_len": 512, "batch": 8, "device": options.device}
    nybble.quantize(options.smollm2 or options.model, recipe, "builtin", out=out, form="native", settings=settings)
    return str(out)


def rotated(options: argparse.Namespace, work: Path) -> str:
    """A folder with the float model whose rotations are folded: packed as float16, and made dense again."""
    recipe = build_recipe("quarot", weights="float16 tensor scale=one", activations="none")
    settings = {"samples": 1, "seq_len": 512, "device": options.device}
    nybble.quantize(options.smollm2 or options.model, recipe, "builtin", out=work / "turned", settings=settings)
    nybble.export(work / "turned", work / "rotated", target="dense")
    return str(work / "rotated")


def trained(scheme: str, data: str, options: argparse.Namespace, out: Path) -> tuple[str, dict[str, Any]]:
    """A folder, and what is to be said of the training."""
    turned = data.endswith(ROTATED)
    data = data.removesuffix(ROTATED)
    model = rotated(options, out.parent) if turned else options.smollm2 or options.model
    src = str(options.texts) if data == "self" else "builtin"
    settings = {
        "steps": options.steps, "batch": options.batch, "accumulate": 1, "seq_len": options.length, "lr": options.lr,
        "device": options.device, "dtype": "bfloat16" if options.device == "cuda" else "float32",
        "checkpointing": False, "optimizer": "torch.AdamW fused=true", "save_every": 1_000_000,
    }  # fmt: skip
    found = train(
        "llm-qat", model, out, src, scheme=SCHEMES[scheme], settings=settings, form="native",
        progress=Silent(),
    )  # fmt: skip
    found["data"]["source"] = Path(found["data"]["source"]).name  # not where the machine has it
    curve = found["curve"][:: max(1, len(found["curve"]) // 100)]
    return str(out), {
        "steps": found["steps"], "curve": curve, "memory": found["memory"], "data": found["data"],
        "seconds": round(found["seconds"], 1),
    }  # fmt: skip


def judged(model: str, options: argparse.Namespace) -> dict[str, float]:
    """On the half of builtin that nobody has seen."""
    found = run_eval({"it": model}, "builtin", metrics=["ppl", "nll"], seq_len=512, samples=options.windows,
                     device=options.device)  # fmt: skip
    metrics: dict[str, float] = found["models"]["it"]
    return metrics


def main() -> None:
    """Make texts, or quantize, train, judge, print, write after each."""
    options = parsed()
    if options.merge:
        files = [json.loads(Path(file).read_text()) for file in options.merge]
        whole = files[0]
        for other in files[1:]:
            whole["rows"] |= other["rows"]
        shown(whole)
        atomic_write_json(options.out, whole)
        return
    model = options.smollm2 or options.model
    if options.make:
        options.texts.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        made = Generation(
            count=options.count, length=options.length, batch=options.make_batch, seed=derive_seed(0, "llm-qat"),
            strategy=options.strategy,
        )  # fmt: skip
        found = generate_dataset(model, options.texts, made, dtype="bfloat16", device=options.device, resume=True)
        print(f"{found['texts']} texts, {found['tokens']} tokens in {time.perf_counter() - began:.0f} s", flush=True)
        return
    result: dict[str, Any] = {
        "what": (__doc__ or "").split("\n")[0], "model": "SmolLM2-135M-Instruct Q4_1",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU", "versions": versions(),
        "training": {key: getattr(options, key) for key in ("steps", "batch", "length", "lr")},
        "samples": options.samples, "windows": options.windows, "rows": {},
    }  # fmt: skip
    result["float"] = judged(model, options)
    began = time.perf_counter()
    for scheme, way in rows_of(options):
        if time.perf_counter() - began > options.seconds:
            print(f"not begun: {scheme} {way}")
            continue
        start, more = time.perf_counter(), dict[str, Any]()
        work = Path(tempfile.mkdtemp())
        try:
            if way.startswith("llm-qat"):
                done, more = trained(scheme, way.removeprefix("llm-qat, "), options, work / "out")
            else:
                done = quantized(scheme, way, options, work / "out")
            metrics = judged(done, options)
        finally:
            shutil.rmtree(work)
        nats = metrics["nll"] - result["float"]["nll"]
        result["rows"][f"{scheme} {way}"] = {**metrics, "over_float": nats, **more}
        print(
            f"{scheme} {way}: ppl {metrics['ppl']:.3f}, {nats:+.4f} nats, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        if options.out:
            atomic_write_json(options.out, result)


def shown(result: dict[str, Any]) -> None:
    """A line a row."""
    print(f"float: ppl {result['float']['ppl']:.3f}")
    for name, row in result["rows"].items():
        print(f"{name:28s} ppl {row['ppl']:8.3f}  {row['over_float']:+.4f} nats")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--smollm2", help="the model's GGUF file, where the package that carries it isn't installed")
    parser.add_argument("--texts", type=Path, default=Path("build/llm_qat/texts.jsonl"))
    parser.add_argument("--make", action="store_true", help="make the texts, and nothing else")
    parser.add_argument("--make-batch", type=int, default=2048)
    parser.add_argument("--strategy", default="hybrid", choices=("hybrid", "greedy", "sample"))
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--length", type=int, default=256, help="tokens of a text")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rows", nargs="*", default=[], help="words of the rows that are wanted")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, help="of the held-out half; left out: all")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row later")
    parser.add_argument("--merge", nargs="+", help="results of several calls, into --out")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
