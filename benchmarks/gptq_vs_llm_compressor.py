"""GPTQ beside llm-compressor: the same model and tokens, each side in a process of its own.

    python benchmarks/gptq_vs_llm_compressor.py --peer-python PEER/bin/python [--device cuda] [--schemes int4-g64 nvfp4]
        [--calibration python3.11-doc.jsonl] [--heldout debian-reference-en.jsonl] [--work FOLDER] [--results FILE]

The peer's environment needs llmcompressor (see benchmarks/peers/llm_compressor_gptq.py). Texts come from
benchmarks/texts.py. Wall times are of the quantization alone, both sides, of a model that is loaded: ours of
``nybble.quantize``, theirs of ``oneshot``; whoever reads them should have had the machine alone. Perplexity is judged
by each side's own code on the same windows; both also judge the float model, so the rulers can be compared. Ours is
given the peer's own conventions: INT4 codes -8 .. 7 with scale absmax / 7.5 in bfloat16, columns in the order of their
inputs' energy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
SCHEMES: dict[str, dict[str, str]] = {
    "int4-g64": {"weights": "int4_full group=64 scale=absmax(target=7.5) scale_format=bfloat16"},
    "nvfp4": {"weights": "nvfp4", "inputs": "nvfp4"},
}


def main() -> None:
    """Prepare, run both sides for each scheme, write one results file."""
    args = _arguments()
    if args.side == "ours":
        _ours(args)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    _prepare(args)
    results: list[dict[str, Any]] = []
    for scheme in args.schemes:
        for side in ("ours", "peer"):
            record = args.work / f"{scheme}-{side}-{args.device}.json"
            record.unlink(missing_ok=True)
            _run(args, scheme, side, record)
            results.append({"side": side, **json.loads(record.read_text())})
        ours, peer = results[-2], results[-1]
        print(
            f"{scheme}: perplexity {ours['ppl']:.3f} against {peer['ppl']:.3f} ({ours['ppl'] / peer['ppl']:.4f} x), "
            f"seconds {ours['seconds']:.1f} against {peer['seconds']:.1f} ({ours['seconds'] / peer['seconds']:.3f} x)",
            flush=True,
        )
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps({"hardware": _hardware(args.device), "rows": results}, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer-python", default=sys.executable, help="python of the environment that holds llmcompressor"
    )
    parser.add_argument("--peer-path", default="", help="PYTHONPATH for the peer's process")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--schemes", nargs="+", choices=tuple(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument(
        "--calibration", default="python3.11-doc.jsonl", help="text file, or prepared tokens (.safetensors)"
    )
    parser.add_argument(
        "--heldout", default="debian-reference-en.jsonl", help="text file, or prepared tokens (.safetensors)"
    )
    parser.add_argument("--work", type=Path, default=Path("benchmark-work"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "gptq_vs_llm_compressor.json")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", choices=("ours",), help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _prepare(args: argparse.Namespace) -> None:
    """The float model as a bfloat16 folder, and token tensors, that both sides read."""
    from safetensors.torch import load_file, save_file

    from nybble.data import load_text, token_samples
    from nybble.models.sources.open import open_source

    source = open_source(args.model)
    if not (args.work / "model").exists():
        source.model(torch.bfloat16).save_pretrained(args.work / "model")
        source.tokenizer().save_pretrained(args.work / "model")
    for name, text, samples in (("calibration", args.calibration, 128), ("heldout", args.heldout, None)):
        target = args.work / f"{name}.safetensors"
        if text.endswith(".safetensors"):
            save_file(load_file(text), target)
        elif not target.exists():
            tokenizer = source.tokenizer()
            tokens = token_samples(load_text(text, "calibration", tokenizer), tokenizer, samples=samples, seq_len=1024)
            save_file({"input_ids": tokens.input_ids}, target, {k: str(v) for k, v in tokens.manifest().items()})


def _run(args: argparse.Namespace, scheme: str, side: str, record: Path) -> None:
    shared = ["--device", args.device]
    if side == "ours":
        command = [
            sys.executable,
            __file__,
            "--side",
            "ours",
            "--schemes",
            scheme,
            "--work",
            str(args.work),
            "--batch",
            str(args.batch),
        ]
        subprocess.run([*command, *shared, "--record", str(record)], check=True)
        return
    command = [
        args.peer_python,
        str(HERE / "peers" / "llm_compressor_gptq.py"),
        "--model",
        str(args.work / "model"),
        "--scheme",
        scheme,
    ]
    tokens = [
        "--calibration",
        str(args.work / "calibration.safetensors"),
        "--heldout",
        str(args.work / "heldout.safetensors"),
    ]
    env = os.environ | ({"PYTHONPATH": args.peer_path} if args.peer_path else {})
    subprocess.run([*command, *tokens, *shared, "--json", str(record)], check=True, env=env)


def _ours(args: argparse.Namespace) -> None:
    """Our side, in this process."""
    from safetensors.torch import load_file

    from nybble.core.versions import versions
    from nybble.data import TokenSamples
    from nybble.eval import evaluate_many
    from nybble.models.sources.open import open_source
    from nybble.nn.swap import hold_dense
    from nybble.pipelines.quantize import quantize
    from nybble.recipe import parse_recipe
    from nybble.walk.settings import Settings

    scheme = args.schemes[0]
    ids = load_file(args.work / "calibration.safetensors")["input_ids"]
    heldout = load_file(args.work / "heldout.safetensors")["input_ids"]
    tokens = TokenSamples(
        input_ids=ids,
        sha256="",
        tokens=ids.numel(),
        available=ids.shape[0],
        source=args.calibration,
        source_sha256="",
        note="",
    )
    recipe = parse_recipe(
        {"name": "gptq", "scheme": SCHEMES[scheme], "steps": [{"solver": "gptq", "activation_order": True}]}
    )
    if args.device == "cuda":
        torch.zeros(1, device="cuda")
        torch.linalg.cholesky(torch.eye(8, device="cuda"))
    float_model = open_source(str(args.work / "model")).model(torch.bfloat16, args.device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    model, report = quantize(float_model, recipe, tokens, settings=Settings(batch=args.batch, device=args.device))
    if args.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = model.to(args.device)
    hold_dense(model, torch.bfloat16)
    reference = open_source(str(args.work / "model")).model(torch.bfloat16, args.device)
    with torch.no_grad():
        found = evaluate_many(reference, {"float": reference, "ours": model}, heldout, ("ppl", "kl"))
    notes = sorted({note for row in report.layers for note in row.notes})
    args.record.write_text(
        json.dumps(
            {
                "scheme": scheme,
                "calibration": list(ids.shape),
                "seconds": seconds,
                "ppl": found["ours"].metrics["ppl"],
                "kl": found["ours"].metrics["kl"],
                "ppl_float": found["float"].metrics["ppl"],
                "predictions": found["ours"].tokens,
                "bits": report.bits,
                "peak_rss_kb": peak,
                "rss_before_kb": before,
                "notes": notes,
                "versions": versions(),
                "quantizers": SCHEMES[scheme],
                "threads": torch.get_num_threads(),
            }
        )
    )


def _hardware(device: str) -> dict[str, str]:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    gpu = torch.cuda.get_device_name(0) if device == "cuda" else ""
    return {"cpu": f"{cpu}, {os.cpu_count()} cores", "gpu": gpu, "python": platform.python_version()}


if __name__ == "__main__":
    main()
