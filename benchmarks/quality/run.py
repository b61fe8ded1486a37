"""Quality of methods on SmolLM2, one protocol for all: the same calibration tokens, the same held-out texts.

    python benchmarks/texts.py python3.11-doc calibration.jsonl        (and debian-reference-en, perl-doc)
    python benchmarks/quality/run.py --calibration calibration.jsonl --texts debian-reference-en.jsonl perl-doc.jsonl
        [--device cuda] [--rows NAME ...] [--samples 128] [--seq-len 1024] [--out benchmarks/results/quality.jsonl]

Every row of rows.py is one line of JSON in the results: bits, seconds, memory, perplexity, mean NLL and KL to the float
model on each text, versions, hardware, and hashes of the tokens. A row with the same name, tokens and machine replaces
the earlier one. Peers write float folders of what they compute (benchmarks/quality/peers), which are judged here too
(``--folder``). ``table.py`` turns the results into a table and a plot.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rows import ROWS, Row

import nybble
from nybble.core.progress import Bars
from nybble.core.versions import versions
from nybble.data import TokenSamples, load_text, token_samples
from nybble.eval import evaluate_many
from nybble.models.sources.open import open_source
from nybble.nn.kinds import quant_modules
from nybble.nn.swap import hold_dense
from nybble.pipelines.request import build_recipe
from nybble.recipe import load_recipe
from nybble.report.record import Report

RESULTS = Path(__file__).parents[1] / "results" / "quality.jsonl"
METRICS = ("nll", "ppl", "kl", "agreement")


def main() -> None:
    """Quantize and judge every row that is asked for."""
    args = arguments()
    source = open_source(args.model)
    calibration, texts = tokens_of(args, source.tokenizer())
    reference = source.model(torch.bfloat16, args.device)
    float_row = {"name": "float", "tool": "nybble", "bits": "16/16/16", "layer_bits": 16.0, "seconds": 0.0}
    about = {"model": args.model, "hardware": hardware(args.device), "versions": versions()}
    if args.beside:
        about["beside"] = args.beside
    for folder in args.folder:
        facts = json.loads((folder / "peer.json").read_text())
        model = open_source(str(folder)).model(torch.bfloat16, args.device)
        found = judge({folder.name: model}, reference, texts)[folder.name]
        record(args.out, {"name": folder.name, "bits": "16/4/16", **facts} | about | {"texts": found})
    for name in [] if args.folder else args.rows:
        if name == "float":
            record(args.out, float_row | about | {"texts": judge({"float": reference}, reference, texts)["float"]})
            continue
        model, _, facts = run_row(ROWS[name], source, calibration, args)
        found = judge({name: model}, reference, texts)[name]
        row = {"name": name, "tool": "nybble", "bits": ROWS[name].bits, **facts}
        seen = {"calibration": named(calibration)} if facts.pop("calibrated") else {}
        record(args.out, row | about | seen | {"texts": found})
        shown = ", ".join(f"{text} {values['ppl']:.3f}" for text, values in found.items())
        print(f"{name}: perplexity {shown}; {facts['seconds']:.1f} s", flush=True)
        del model


def tokens_of(args: argparse.Namespace, tokenizer: Any) -> tuple[TokenSamples, dict[str, TokenSamples]]:
    """What calibrates, and each held-out text by name."""
    calibration = token_samples(
        load_text(args.calibration, "calibration", tokenizer), tokenizer, samples=args.samples, seq_len=args.seq_len,
        seed=0,
    )  # fmt: skip
    texts = {}
    for path in args.texts:
        whole = token_samples(load_text(path, "evaluation", tokenizer), tokenizer, samples=None, seq_len=1024)
        wanted = min(args.windows, whole.available)
        texts[Path(path).stem] = token_samples(
            load_text(path, "evaluation", tokenizer), tokenizer, samples=wanted, seq_len=1024
        )
    return calibration, texts


def run_row(
    row: Row, source: Any, calibration: TokenSamples, args: argparse.Namespace
) -> tuple[Any, Report, dict[str, Any]]:
    """The quantized model, dense for speed, what was done to its layers, and what it cost."""
    searches = bool(load_recipe(row.recipe).solver.quick)
    effort = (args.effort or row.effort) if searches else None
    recipe = build_recipe(
        row.recipe, weights=row.weights, activations=row.inputs or ("none" if row.weights else None),
        embeddings=row.embeddings,
        effort=effort or "full",
    )  # fmt: skip
    model = source.model(torch.bfloat16, args.device)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    model, report = nybble.quantize(
        model, recipe, calibration, settings=nybble.Settings(batch=args.batch, device=args.device), progress=Bars()
    )
    if args.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    hold_dense(model, torch.bfloat16)
    formats: dict[str, int] = {}
    for layer in report.layers:
        key = f"{(layer.weights or 'float').split()[0]} x {(layer.inputs or 'float').split()[0]}"
        formats[key] = formats.get(key, 0) + 1
    errors = [layer.error for layer in report.layers if layer.error is not None]
    facts = {
        "effort": effort,
        "recipe": recipe.to_dict(),
        "calibrated": report.manifest["data"] is not None,
        "layer_bits": report.bits,
        "seconds": round(seconds, 2),
        "device_memory": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
        "layers": sum(1 for _ in quant_modules(model)),
        "mean_layer_error": sum(errors) / max(1, len(errors)),
        "formats": formats,
        "fallbacks": sum(bool(layer.notes) for layer in report.layers),
    }
    return model, report, facts


@torch.no_grad()
def judge(models: dict[str, Any], reference: Any, texts: dict[str, TokenSamples]) -> dict[str, dict[str, Any]]:
    """Metrics of each model on each text."""
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    for text, tokens in texts.items():
        for name, result in evaluate_many(reference, models, tokens.input_ids, METRICS).items():
            found[name][text] = result.metrics | {"predictions": result.tokens, "tokens_sha256": tokens.sha256}
    return found


def named(samples: Any) -> dict[str, Any]:
    """Where samples come from, without the folders of this machine."""
    source = samples.source
    return {k: v.replace(source, Path(source).name) if isinstance(v, str) else v for k, v in samples.manifest().items()}


def record(path: Path, row: dict[str, Any]) -> None:
    """Add a line, in place of an earlier one of the same tool, name, model, device and calibration."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [line for line in lines if identity(line) != identity(row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in [*kept, row]))


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two lines results of the same run."""
    calibration = row.get("calibration") or {}
    gpu, tokens = row["hardware"].get("gpu"), calibration.get("tokens_sha256")
    return row["tool"], row["name"], row.get("effort"), row["model"], gpu, tokens


def hardware(device: str) -> dict[str, Any]:
    """Names of the processor and the GPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu}


def common_arguments(description: str | None, windows: int) -> argparse.ArgumentParser:
    """A parser of what every script on this protocol asks; ``windows`` is the default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--effort", choices=("quick", "full"), help="of the recipes that search, over the rows' own")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=windows, help="held-out windows of 1,024 tokens of each text")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = common_arguments(__doc__, windows=64)
    parser.add_argument("--folder", type=Path, nargs="*", default=[], help="judge what peers/weights.py wrote instead")
    parser.add_argument("--rows", nargs="+", default=["float", *ROWS], choices=["float", *ROWS], metavar="ROW")
    parser.add_argument("--beside", type=int, default=0, help="so many other runs share the machine: said with seconds")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
