"""Kinds of modules of another package are quantized, saved, inspected and loaded; no file of nybble is edited."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PLUGIN = '''
"""Two layers that are no nn.Linear to nybble: one keeps [in, out] and a gain, the other is a child that doubles."""

import torch
from torch import nn

from nybble.nn.kinds import LayerKind
from nybble.nn.linear import QuantLinear


class Gained(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.kernel = nn.Parameter(weight.detach().T.contiguous())
        self.gain = nn.Parameter(torch.linspace(0.5, 2, len(weight)).to(weight.dtype))
        self.bias = None

    def forward(self, x):
        return (x @ self.kernel) * self.gain


class QuantGained(QuantLinear):
    """The gain is in the weight."""


class GainedKind(LayerKind):
    entry = "gained"
    classes = ("Linear",)
    stand_ins = (QuantGained,)
    by_rows = True

    def claims(self, module):
        return isinstance(module, Gained)

    def fits(self, module):
        return isinstance(module, Gained | nn.Linear)

    def parameters(self, leaf):
        return ("kernel", "gain")

    def matrix(self, module, leaf, get):
        return (get("kernel").float() * get("gain").float()).T

    def values(self, module, leaf, matrix):
        return {"kernel": matrix.T / module.gain}

    def stand_in(self, old, weight, bias, made):
        return QuantGained(weight, bias, made.inputs, made.outputs)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class QuantDoubled(QuantLinear):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledKind(LayerKind):
    entry = "doubled"
    classes = ("Linear",)
    stand_ins = (QuantDoubled,)
    by_rows = True

    def claims(self, module):
        return isinstance(module, Doubled)

    def fits(self, module):
        return isinstance(module, nn.Linear)

    def matrix(self, module, leaf, get):
        return get("weight")

    def values(self, module, leaf, matrix):
        return {"weight": matrix}

    def stand_in(self, old, weight, bias, made):
        return QuantDoubled(weight, bias, made.inputs, made.outputs)


GAINED, DOUBLED = GainedKind(), DoubledKind()
NOT_A_KIND = "nothing"


def change(model):
    """Put such layers into a llama."""
    for layer in model.model.layers:
        layer.mlp.down_proj = Gained(layer.mlp.down_proj.weight)
        layer.self_attn.o_proj.__class__ = Doubled
    return model
'''
ENTRIES = """
[nybble.nn.kinds]
gained = more_layers:GAINED
doubled = more_layers:DOUBLED
"""
RUN = """
import json, sys
from pathlib import Path

import torch
import nybble
from nybble.checkpoint.account import inspect
from nybble.data import load_text, token_samples
from nybble.pipelines.request import build_recipe
from nybble.quantizer import Quantizer
from tests.tiny import logits, save_text, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils import logging
import more_layers

torch.set_num_threads(1)
logging.disable_progress_bar()
folder = Path(sys.argv[1])
text = load_text(str(save_text(folder / "text.txt")), "calibration")
tokens = token_samples(text, tiny_tokenizer(), samples=4, seq_len=12, seed=0)
OPTIONS = {
    "rtn": {"weights": "int8 channel"},
    "gptq": {"weights": "int8 channel", "activations": "int8 tensor static"},
}


def run(recipe):
    model = more_layers.change(tiny_model("llama"))
    before = logits(model)
    down = model.model.layers[1].mlp.down_proj
    merged = (down.kernel.float() * down.gain.float()).T.detach().contiguous()
    model, report = nybble.quantize(model, build_recipe(recipe, **OPTIONS[recipe]), tokens)
    out = nybble.save(model, folder / recipe, tiny_tokenizer(), form="native")
    ours, theirs = nybble.load(out)[0], AutoModelForCausalLM.from_pretrained(out)
    block = ours.model.layers[1]
    entries = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    found = inspect(out)
    return {
        "loaded": [torch.equal(logits(m), logits(model)) for m in (ours, theirs)],
        "change": float((logits(model) - before).norm() / before.norm()),
        "classes": [type(block.mlp.down_proj).__name__, type(block.self_attn.o_proj).__name__],
        "entries": [entries[f"model.layers.1.{n}"]["class"] for n in ("mlp.down_proj", "self_attn.o_proj")],
        "rounded": torch.equal(
            block.mlp.down_proj.weight.dequantize(torch.float32), Quantizer("int8 channel").fake_quantize(merged)
        ),
        "rows": {row.name: [row.shape, row.error, row.rtn_error, row.input_scale] for row in report.layers},
        "bytes": [found["total"], sum(found["bytes"].values())],
        "elements": found["modules"]["model.layers.1.mlp.down_proj.weight"]["elements"],
        "unquantized": found["bytes"]["unquantized"],
    }


print(json.dumps({recipe: run(recipe) for recipe in OPTIONS}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outside")


@pytest.fixture(scope="module")
def package(folder: Path) -> Path:
    """A site folder with the package, as pip leaves it."""
    info = folder / "site" / "more_layers-1.0.dist-info"
    info.mkdir(parents=True)
    (info.parent / "more_layers.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: more-layers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    return info.parent


@pytest.fixture(scope="module")
def results(folder: Path, package: Path) -> dict[str, Any]:
    """What RUN says; its folders stay beside the package."""
    done = python(package, RUN, str(folder))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def python(package: Path | None, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    places = [str(root), *sys.path] if package is None else [str(package), str(root), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_quantized_saved_inspected_and_loaded(results: dict[str, Any], recipe: str) -> None:
    found = results[recipe]
    assert found["loaded"] == [True, True]
    assert found["classes"] == ["QuantGained", "QuantDoubled"] and found["entries"] == ["gained", "doubled"]
    assert 0 < found["change"] < 0.05  # eight bits; without the gain or the factor of 2 it would be of order 1
    assert found["rounded"] == (recipe == "rtn")
    assert len(found["rows"]) == 14
    for name in ("mlp.down_proj", "self_attn.o_proj"):
        shape, error, rtn_error, scale = found["rows"][f"model.layers.1.{name}"]
        assert shape == ([32, 48] if name == "mlp.down_proj" else [32, 32])
        assert 0 < error <= rtn_error and (scale is None) == (recipe == "rtn")
        assert error < rtn_error or recipe == "rtn"  # its inputs were seen
    total, accounted = found["bytes"]
    assert total == accounted and found["elements"] == 32 * 48
    # bfloat16: the embeddings, a bias of q, k, v (16 of 32 queries share a key) and o in each layer, five norms
    assert found["unquantized"] == 2 * (300 * 32 + 2 * (32 + 16 + 16 + 32) + 5 * 32)


def test_without_the_package_its_files_say_what_is_missing(folder: Path, results: dict[str, Any]) -> None:
    done = python(None, "import sys, nybble; nybble.load(sys.argv[1])", str(folder / "rtn"))
    assert results and done.returncode == 1
    assert "described as a 'doubled', which this nybble does not know" in done.stderr
    assert "install the package that brings this kind of module" in done.stderr


def test_those_that_fail_are_named_and_the_rest_works(package: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(package, site)
    lines = "absent = nowhere:PART\nempty = more_layers:NOT_A_KIND\nsecond = more_layers:GAINED\n"
    (next(site.glob("*.dist-info")) / "entry_points.txt").write_text(f"{ENTRIES}{lines}")
    code = """
import warnings
warnings.simplefilter("always")
from torch import nn
from nybble.nn.kinds import kind_of
import more_layers
print(kind_of(nn.Linear(2, 2)), kind_of(more_layers.Doubled(2, 2)), kind_of(nn.ReLU()))
"""
    done = python(site, code)
    assert done.returncode == 0 and done.stdout == "linear doubled None\n", done.stderr
    assert done.stderr.count("UserWarning") == 3
    for name, reason in (
        ("absent", "ModuleNotFoundError: No module named 'nowhere'"),
        ("empty", "TypeError: it is 'nothing' and no Kind"),
        ("second", "ValueError: its entry 'gained' is another kind's"),
    ):
        (line,) = (line for line in done.stderr.splitlines() if f"{name!r} of another package is left out" in line)
        assert reason in line
