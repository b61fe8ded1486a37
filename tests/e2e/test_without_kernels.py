"""The package without its folder of kernels: the same numbers, within the bound of float32 sums."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tests.contracts import compiled
from torch import Tensor

import nybble

SCRIPT = """
import importlib.util, sys, torch
from safetensors.torch import save_file
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.embedding import QuantEmbedding, TiedHead
from nybble.nn.linear import QuantLinear
from nybble.nn.input_rounding import rounded_inputs
from nybble.quantizer import Quantizer

def made(line, k):
    return Quantizer(line).quantize(torch.randn(192, k))

torch.manual_seed(0)
found = {}
with torch.no_grad():
    for line in LINES:
        weights, _, inputs = line.partition(" x ")
        k = 256
        of_x = Quantizer(inputs) if inputs else None
        layer = QuantLinear(made(weights, k), torch.randn(192), of_x and ActivationQuantizer(of_x))
        for m in (0, 1, 3, 8, 40):
            x = torch.randn(m, 2 * k)[:, ::2]
            wide = (of_x.fake_quantize(x) if of_x and m else x).double().abs()
            found |= {f"sum.{line}.{m}": layer(x), f"wide.{line}.{m}": wide @ layer.weight(torch.float64).abs().T}
        found[f"bits.{line}.weight"] = layer.weight(torch.bfloat16)
    for line in ROUNDED:
        found[f"bits.{line}.x"] = rounded_inputs(torch.randn(5, 256) * 3, line)
    table = QuantEmbedding(made("int4 group=32", 256), torch.bfloat16)
    found["bits.rows"] = table(torch.tensor([[3, 191], [0, 0]]))
    head = torch.randn(2, 256)
    found |= {"sum.head": TiedHead(table)(head), "wide.head": head.abs().double() @ table.weight(torch.float64).abs().T}
print(importlib.util.find_spec("nybble.kernels") is not None, *layer.how())
save_file({name: tensor.contiguous() for name, tensor in found.items()}, sys.argv[1])
"""
LINES = (
    "int4 group=32 symmetric=false", "int8 channel", "int3 group=32", "int2 group=16", "mxfp4", "nvfp4", "nf4-dq",
    "q4_k", "float8_e4m3fn channel", "int8 channel x int8 token", "int4 group=64 x int8 token symmetric=false",
    "nvfp4 x nvfp4", "float8_e4m3fn channel x float8_e4m3fn token",
)  # fmt: skip
ROUNDED = ("nvfp4", "mxfp4-ocp", "int8 token", "float8_e4m3fn token")


def run(package: Path, out: Path) -> tuple[str, dict[str, Tensor]]:
    script = SCRIPT.replace("LINES", repr(LINES)).replace("ROUNDED", repr(ROUNDED))
    command = [sys.executable, "-W", "error", "-c", script, str(out)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(package)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip(), load_file(out)


@compiled.needed
def test_the_numbers_stay(tmp_path: Path) -> None:
    whole = Path(nybble.__file__).parent
    shutil.copytree(whole, tmp_path / "nybble", ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    with_them, without = run(whole.parent, tmp_path / "with"), run(tmp_path, tmp_path / "without")
    assert with_them[0].startswith("True True") and without[0] == "False False no kernels for cpu"
    assert with_them[1].keys() == without[1].keys()
    moved = 0
    for name, a in with_them[1].items():
        b = without[1][name]
        assert a.shape == b.shape and a.dtype == b.dtype
        if name.startswith("bits"):
            assert torch.equal(a, b), name
        elif name.startswith("sum"):
            bound = 2 * 260 * 2.0**-24 * (with_them[1][name.replace("sum", "wide", 1)] + 8)
            assert ((a.double() - b.double()).abs() <= bound).all(), name
            moved += not torch.equal(a, b)
    assert moved > len(LINES)  # kernels ran where they are
