"""A granularity of another package: installed beside nybble, it works everywhere, and no file of nybble knows of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COLUMNS = '''"""One scale for each N neighbouring columns, of all rows."""

import math
from dataclasses import dataclass

from nybble.core.errors import GranularityError
from nybble.granularity import Granularity


@dataclass(frozen=True)
class PerColumns(Granularity):
    size: int
    word = "columns"
    example = "columns=8"

    @classmethod
    def parse(cls, value, options):
        return cls(int(value))

    def __str__(self):
        return f"columns={self.size}"

    def scale_shape(self, shape):
        if not shape or shape[-1] % self.size:
            raise GranularityError(f"{self} does not divide the columns of {tuple(shape)}.")
        return (*(1,) * (len(shape) - 1), shape[-1] // self.size)

    def to_blocks(self, x):
        count = self.scale_shape(x.shape)[-1]
        return x.reshape(-1, count, self.size).transpose(0, 1).reshape(count, -1)

    def from_blocks(self, blocks, shape):
        count = self.scale_shape(shape)[-1]
        return blocks.reshape(count, -1, self.size).transpose(0, 1).reshape(tuple(shape))


PART = PerColumns
'''

USED = """
import json, sys, warnings
from pathlib import Path

import torch

import nybble
from nybble.core.errors import SchemeError
from nybble.granularity import REGISTRY, make_granularity
from nybble.nn.activation import check_static
from nybble.pipelines.matrix import legal_combinations
from nybble.qtensor import from_spec
from nybble.quantizer import Quantizer
from nybble.recipe import parse_recipe
from nybble.solvers import Stats, Weight, make_solver

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
x = torch.randn(8, 32, generator=generator) * torch.linspace(0.1, 3, 32)
quantizer = Quantizer("int4 columns=8")
stored = quantizer.quantize(x)
again = from_spec(json.loads(json.dumps(stored.spec())), stored.tensors())
scale = (x.abs().view(8, 4, 8).amax((0, 2)) / 7).repeat_interleave(8)
mix = torch.eye(32) + 0.4 * torch.randn(32, 32, generator=generator)
inputs = torch.randn(200, 32, generator=generator) @ mix
stats = Stats(second_moment=inputs.T @ inputs / 200, inputs=inputs)
solved = {
    name: make_solver(name, {}).solve([Weight(name="w", matrix=x, quantizer=Quantizer(line))], stats)[0]
    for name, line in (("rtn", "int4 columns=8"), ("gptq", "int4 columns=8"), ("llm-fp4", "e2m1 columns=8"))
}
recipe = parse_recipe({"name": "x", "scheme": {"weights": "int4 columns=8"}, "steps": [{"solver": "gptq"}]})
folder, text, out = map(Path, sys.argv[1:4])
settings = nybble.Settings(samples=4, seq_len=12)
nybble.quantize(str(folder), recipe, str(text), out=out, settings=settings)
model, _ = nybble.load(out)
try:
    check_static(Quantizer("int4 columns=8 static"))
    static = ""
except SchemeError as error:
    static = str(error)
print(json.dumps({
    "names": REGISTRY.names(),
    "text": [str(quantizer), str(Quantizer("int4 channel", columns=4)), str(quantizer.replace(group=16))],
    "equal": [
        torch.equal(stored.dequantize(), quantizer.fake_quantize(x)),
        torch.equal(stored.dequantize(), again.dequantize()),
        torch.equal(stored.dequantize(), (x / scale).round() * scale),
        again.granularity == make_granularity("columns=8"),
    ],
    "scale": list(stored.params.scale.shape),
    "errors": {name: [one.error, one.rtn_error] for name, one in solved.items()},
    "matrix": legal_combinations(["rtn", "gptq", "llm-fp4"], ["int4", "nf4"]),
    "static": static,
    "file": sorted({str(m.qtensor().granularity) for m in model.modules() if hasattr(m, "qtensor")}),
    "logits": model(torch.arange(12)[None]).logits.float().abs().sum().item(),
}))
"""


def install(site: Path, name: str, entry: str, source: str, group: str = "nybble.granularity") -> None:
    """A package of one module, as pip leaves it in site-packages."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")]), *(p for p in sys.path if p.endswith("src"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "always"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    install(folder, "stripes", "columns = stripes", COLUMNS)
    return folder


def test_another_package_adds_a_granularity(site: Path, tmp_path: Path) -> None:
    from tests.tiny import save_text, save_tiny

    folder, text = save_tiny(tmp_path / "float"), save_text(tmp_path / "text.txt")
    done = python(site, "-c", USED, str(folder), str(text), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert "columns" in found["names"]
    assert found["text"] == ["int4 columns=8", "int4 columns=4", "int4 group=16"]
    assert found["equal"] == [True] * 4
    assert found["scale"] == [1, 4]
    for name, (error, plain) in found["errors"].items():
        assert error < plain if name != "rtn" else error == plain
    rows = [row for row in found["matrix"] if row["granularity"] == "columns=8"]
    assert [(row["recipe"], row["format"], row["reason"]) for row in rows] == [
        (recipe, fmt, "") for recipe in ("rtn", "gptq", "llm-fp4") for fmt in ("int4", "nf4")
    ]
    assert "static activations have one float32 scale" in found["static"]
    assert found["file"] == ["columns=8"]
    assert found["logits"] > 0


def test_a_package_that_is_gone_is_missed_by_name(tmp_path: Path) -> None:
    done = python(tmp_path, "-c", "from nybble.quantizer import Quantizer; Quantizer('int4 columns=8')")
    assert done.returncode and "unknown word 'columns'" in done.stderr


LISTED = """
from nybble.cli.recipes import command
from nybble.formats import format_names
from nybble.granularity import granularity_words
from nybble.quantizer import Quantizer
from nybble.scales import REGISTRY as SCALES

for _ in range(3):
    print(len(format_names()), len(granularity_words()), len(SCALES.all()), Quantizer("int4 channel"))
print("columns" in granularity_words(), sorted(SCALES.names()) == sorted(SCALES.all()))
command("rtn", matrix=True, json=True)
Quantizer("int4 diagonal")
"""


def test_packages_that_fail_are_named_once_and_the_rest_works(site: Path, tmp_path: Path) -> None:
    install(tmp_path, "torn", "diagonal = torn", "import a_module_that_is_not_there\n")
    install(tmp_path, "worn", "posit = worn:PART", "x = 1\n", "nybble.formats")
    install(tmp_path, "born", "golden = born", "PART = 1 / 0\n", "nybble.scales")
    install(tmp_path, "sworn", "group = sworn", "PART = None\n")
    for copied in site.iterdir():
        (tmp_path / copied.name).symlink_to(copied)
    done = python(tmp_path, "-c", LISTED)
    *three, last, matrix = done.stdout.splitlines()
    assert len(three) == 3 and len(set(three)) == 1 and last == "True True"
    rows = json.loads(matrix)["combinations"]
    assert {row["recipe"] for row in rows} == {"rtn"}
    assert {row["granularity"] for row in rows} >= {"columns=8", "group=16", "rank1"}
    for package, word, why in (
        ("torn", "diagonal", "No module named 'a_module_that_is_not_there'"),
        ("worn", "posit", "has no attribute 'PART'"),
        ("born", "golden", "division by zero"),
        ("sworn", "group", "there is one of that name already"),
    ):
        said = f"'{word}' of the package {package} "
        named = [line for line in done.stderr.splitlines() if said in line and "is left out: " in line]
        assert len(named) == 1 and named[0].endswith(why), done.stderr
    assert "the granularity 'diagonal' of the package torn (torn) can't be imported (ModuleNotFound" in done.stderr
