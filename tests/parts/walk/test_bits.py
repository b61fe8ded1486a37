"""The bits a weight that a run announces before it starts are those of the file that it writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_text, save_tiny

import nybble
from nybble.checkpoint.account import inspect
from nybble.quantizer import Quantizer
from nybble.recipe import parse_recipe

CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "group": ("int4 group=16", [{"solver": "rtn"}]),
    "asymmetric": ("int4 group=16 symmetric=false", [{"solver": "gptq"}]),
    "float32 scales": ("float4_e2m1fn group=16 scale_format=float32", [{"solver": "rtn"}]),
    "nested": ("nvfp4", [{"solver": "rtn"}]),
    "double": ("nf4-dq", [{"solver": "rtn"}]),
    "padding": ("int3 group=24 pad=true", [{"solver": "rtn"}]),
    "base 3": ("ternary channel scale=mean packing=base3", [{"solver": "rtn"}]),
    "searched": ("e2m1 channel", [{"solver": "llm-fp4", "rounds": 1}]),
    "low rank": ("int3 channel", [{"solver": "rtn"}, {"correction": "low-rank", "rank": 2}]),
    "rounded factors": (
        "int2 channel",
        [{"solver": "rtn"}, {"correction": "low-rank", "rank": 4, "factors": "int8 channel"}],
    ),
    "vectors": ("binary channel scale=mean", [{"solver": "k-means", "entries": 16, "width": 2, "iterations": 3}]),
    "scaled vectors": (
        "binary channel scale=mean",
        [{"solver": "k-means", "entries": 16, "width": 2, "channel": True}],
    ),
    "outliers": ("int2 channel", [{"solver": "outlier-columns", "share": 0.1}]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bits")
    save_tiny(made / "model", "llama")
    save_text(made / "text.txt")
    return made


@pytest.mark.parametrize("name", CASES)
def test_bits_are_known_before(place: Path, tmp_path: Path, name: str) -> None:
    line, steps = CASES[name]
    recipe = parse_recipe({"name": "x", "scheme": {"weights": line}, "steps": steps})
    lines: list[str] = []
    settings = nybble.Settings(samples=4, seq_len=12, batch=2, dtype=torch.float32)
    nybble.quantize(
        str(place / "model"), recipe, str(place / "text.txt"), out=tmp_path / "out", settings=settings,
        announce=lines.append,
        form="native",
    )  # fmt: skip
    found = inspect(tmp_path / "out")["bits_per_quantized_weight"]
    said = re.search(r"weights in \d+ blocks at ([\d.]+) bits", lines[0])
    assert said is not None and float(said[1]) == pytest.approx(found, abs=0.006)


@pytest.mark.parametrize(
    ("line", "bits"),
    [
        ("float4_e2m1fn group=32", 4.5), ("int4 group=64", 4.25), ("int4 group=64 symmetric=false", 4.3125),
        ("int4 block=8x8", 4.25), ("nf4 flat=64", 4.25), ("int4 group=32 scale=pow2", 4.5), ("mxfp4", 4.25),
        ("int4 group=32 scale_format=float32", 5), ("nf4-bnb", 4.5), ("int4 channel", 4 + 32 / 256),
        ("int4 group=32 scale=minmax(offset=true)", 5), ("float4_e2m1fn group=32 rounding=stochastic", 4.5),
    ],
)  # fmt: skip
def test_many_scales_take_16_bits_or_less(line: str, bits: float) -> None:
    quantizer = Quantizer(line)
    assert 8 * quantizer.stored_bytes((64, 256)) / (64 * 256) == pytest.approx(bits)
    assert Quantizer(str(quantizer)) == quantizer
    assert quantizer.quantize(torch.randn(64, 256)).bits_per_element() == pytest.approx(bits)


def test_a_line_that_changes_its_granularity_changes_what_it_means() -> None:
    plain = Quantizer("int4 channel")
    assert plain.scale_format == "float32" and plain.replace(group=16).scale_format == "float16"
    assert plain.replace(group=16).replace(channel=True) == plain
    assert Quantizer("int4 group=16 scale=pow2").scale_format == "bfloat16"
    assert Quantizer("int4 group=16 scale_format=float32").replace(group=32).scale_format == "float32"
    x = torch.tensor([[2.0**-126, 0.0], [2.0**100, -(2.0**99)]])
    exact = Quantizer("int4 group=2 scale=pow2")  # powers of two that float16 has not
    assert torch.equal(exact.fake_quantize(x), Quantizer("int4 channel scale=pow2").fake_quantize(x))
