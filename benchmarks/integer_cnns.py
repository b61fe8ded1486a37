"""CNNs in integers alone: their codes against the simulation's in floats, their classes against the float network's.

    python benchmarks/small_models.py resnet18 --out models/resnet18 --steps 120 --batch 128
    python benchmarks/integer_cnns.py models/resnet18 --count 200 --out benchmarks/results/integer_cnns.json

Each is quantized by the recipe hawq-v3 (8 bits) and with 4-bit weights and activations, both without training.
Every tensor of every step is compared, image after image. Beside it: how many codes of layers' inputs a network whose
sums stay in float, the usual fake quantization, has otherwise. Where onnxruntime is installed, it runs the same
network in ONNX's integer operators: images whose logits are other than nybble's, and bytes beside the float file's.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from small_models import DEVIATION, FOLDER, MEAN, NAMES, find, tensors
from torch import Tensor, nn

import nybble
from nybble.core.files import atomic_write_text
from nybble.core.versions import versions
from nybble.data.images import Preparation
from nybble.data.labelled_images import load_labelled_images
from nybble.nn.integer.convert import integer_network
from nybble.nn.integer.dtypes import operations
from nybble.nn.integer.entrance import Grid
from nybble.nn.integer.network import IntegerNetwork
from nybble.nn.kinds import quant_modules

SCHEMES: dict[str, dict[str, str]] = {
    "W8A8": {},
    "W4A4": {"weights": "int4 channel", "activations": "uint4 symmetric=false static"},
}
CALIBRATION, PART = 256, 100


def main() -> None:
    """Measure all, write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders of small_models.py")
    parser.add_argument("--images", type=Path, default=FOLDER)
    parser.add_argument("--count", type=int, default=10_000, help="images to judge")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    wants = Preparation(height=32, width=32, channels=1, mean=(MEAN,), std=(DEVIATION,))
    train, test = (load_labelled_images(str(find(args.images, part)), wants, NAMES) for part in ("train", "t10k"))
    given, held = tensors(train, CALIBRATION, "cpu")[0], tensors(test, args.count, "cpu")
    found = {
        folder.name: {name: measured(folder, lines, given, *held) for name, lines in SCHEMES.items()}
        for folder in args.models
    }
    about = {"calibration": CALIBRATION, "images": len(held[1]), "test": test.manifest() | {"source": "t10k"}}
    made = {folder.name: json.loads((folder / "made.json").read_text()) for folder in args.models}
    about |= {"made": made, "hardware": platform.processor() or platform.machine(), "versions": versions()}
    result = {"models": found, **about}
    atomic_write_text(args.out, json.dumps(result, indent=1) + "\n")


@torch.no_grad()
def measured(folder: Path, lines: dict[str, str], given: Tensor, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Of one model in one scheme."""
    plain: Any = nybble.load(folder, dtype=torch.float32)[0]
    model: Any = nybble.load(folder, dtype=torch.float32)[0]
    model = nybble.quantize(model, "hawq-v3", given, **lines)[0]  # type: ignore[arg-type]
    net = integer_network(model, images[:2])
    traced = operations(net, images[:2])
    counts = {"codes": 0, "codes unlike the simulation": 0, "inputs": 0, "inputs unlike float sums": 0}
    right = dict.fromkeys(("float", "float sums", "integer"), 0)
    for x, y in zip(images.split(PART), labels.split(PART), strict=True):
        logits, theirs = compared(net, model, x, counts)
        for name, found in (("float", plain(x).logits), ("float sums", theirs), ("integer", logits)):
            right[name] += int((found.argmax(-1) == y).sum())
    return {
        "top1": {name: count / len(labels) for name, count in right.items()}, **counts, "steps": len(net.names),
        **in_onnx(net, images, folder),
        "operations": len(traced), "operations with a float": sum(not op.integer for op in traced),
        "types": sorted({str(dtype).removeprefix("torch.") for op in traced for dtype in op.outputs}),
    }  # fmt: skip


def in_onnx(net: IntegerNetwork, images: Tensor, folder: Path) -> dict[str, Any]:
    """Images of which onnxruntime's integer operators have other logits, and the file's bytes; nothing without it."""
    if find_spec("onnxruntime") is None:
        return {}
    from nybble.export._onnx_integer import INPUT, OUTPUT, write_integer_graph
    from nybble.export._onnx_verify import session

    with TemporaryDirectory() as room:
        path = Path(room) / "model.onnx"
        write_integer_graph(net, path)
        ran, size, unlike = session(path), path.stat().st_size, 0
    for x in images.split(PART):
        theirs = torch.from_numpy(ran.run([OUTPUT], {INPUT: x.numpy()})[0])
        unlike += int((theirs != net(x)).any(1).sum())
    floats = (folder / "model.safetensors").stat().st_size
    return {"images unlike in onnxruntime": unlike, "onnx bytes": size, "float bytes": floats, "smaller": floats / size}


def compared(net: IntegerNetwork, model: nn.Module, x: Tensor, counts: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Logits in integers (their codes tell the class with one scale a class), and of float sums; counts grow."""
    usual: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(noting(f"{name}.inputs", Grid.of(name, layer.inputs), usual))
        for name, layer in quant_modules(model)
    ]
    theirs = model(x).logits
    for handle in handles:
        handle.remove()
    q = net.entrance.codes(x)
    ours = q
    for (name, ours), (_, simulated) in zip(net.codes(q), net.codes(q.double()), strict=True):
        counts["codes"] += ours.numel()
        counts["codes unlike the simulation"] += int((ours.double() != simulated).sum())
        if name in usual:
            counts["inputs"] += ours.numel()
            counts["inputs unlike float sums"] += int((ours.int() != usual[name]).sum())
    return ours * net.get_buffer("scale"), theirs


def noting(name: str, grid: Grid, found: dict[str, Tensor]) -> Any:
    """A hook that keeps the codes of what enters a layer."""

    def hook(_: nn.Module, entering: tuple[Tensor, ...]) -> None:
        found[name] = grid.codes(entering[0])

    return hook


if __name__ == "__main__":
    main()
