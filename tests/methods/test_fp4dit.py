"""FP4DiT (arXiv:2503.15465) whole: what its sheet asks beside tests/parts/learned/test_adaround.py (checks 1-3, 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.diffusion import inputs, save_pipeline
from tests.tiny import shortened
from torch import Tensor
from torch.nn import functional

import nybble
from nybble.checkpoint.account import inspect
from nybble.core.errors import FormatError, GranularityError, NybbleError, SchemeError
from nybble.learned import WEIGHTS, make_part
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.fake import FakeLayer
from nybble.pipelines.request import build_recipe
from nybble.quantizer import Quantizer
from nybble.recipe import load_recipe
from nybble.reconstruction import make_reconstruction
from nybble.scheme import parse_scheme

A8, A6 = "e3m4_finite token", "float6_e2m3fn token"


def learned_error(aware: bool, w: Tensor, x: Tensor, rate: float, steps: int) -> float:
    """Output error over nearest rounding's, after training."""
    quantizer = Quantizer("float4_e2m1fn group=64")
    part = make_part("adaround", {"scale_aware": aware}).make(quantizer, w, None, WEIGHTS).train()
    adam = torch.optim.Adam(part.parameters(), lr=rate)
    second, nearest = x.T @ x / len(x), quantizer.fake_quantize(w)

    def error(made: Tensor) -> Tensor:
        return ((made - w) @ second * (made - w)).sum()

    begun = error(nearest)
    for step in range(steps):
        adam.zero_grad()
        loss: Any = 100 * error(part(w)) / begun + part.penalty(step / steps)
        loss.backward()
        adam.step()
    return float(error(part.eval()(w)) / begun)


def test_rounding_that_knows_its_step_learns_at_the_papers_rate() -> None:
    """Check 4: at 1e-4, 500 steps, 20 % less than nearest rounding; the plain form gains less than 10 %."""
    draw = torch.Generator().manual_seed(0)
    w = 0.02 * torch.randn(16, 64, generator=draw)
    x = torch.randn(512, 64, generator=draw) @ (torch.eye(64) + 0.3 * torch.randn(64, 64, generator=draw))
    aware, plain = (learned_error(kind, w, x, 1e-4, 500) for kind in (True, False))
    assert aware < 0.8
    assert plain > 0.9


def test_e3m0_keeps_what_is_near_zero_in_front_of_gelu() -> None:
    """Check 6: on heavy-tailed weights, where the pre-activation is small, E3M0 loses less than E1M2 behind GELU."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(64, 128, generator=draw) ** 5
    x = 0.05 * torch.randn(256, 128, generator=draw)
    before = x @ w.T
    near = before.abs() < before.abs().median()
    found = {}
    for name in ("e3m0_finite", "e1m2_finite"):
        after = functional.gelu(x @ Quantizer(f"{name} group=128").fake_quantize(w).T)
        found[name] = float((after - functional.gelu(before))[near].square().mean())
    assert found["e3m0_finite"] < found["e1m2_finite"]


def test_tokens_have_scales_of_their_own() -> None:
    """Check 7: a token that grows changes no other; order doesn't matter; A8 < A6 < one scale for all in A6."""
    x = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0))
    x[0, 3] *= 50
    for line in (A8, A6):
        quantizer, grown, order = Quantizer(line), x.clone(), torch.randperm(12)
        grown[1, 5] *= 1000
        before, after = quantizer.fake_quantize(x), quantizer.fake_quantize(grown)
        others = torch.ones(2, 12, dtype=torch.bool)
        others[1, 5] = False
        assert torch.equal(before[others], after[others])
        assert torch.equal(quantizer.fake_quantize(x[:, order]), before[:, order])
        assert torch.equal(quantizer.fake_quantize(torch.zeros(1, 3, 8)), torch.zeros(1, 3, 8))
    errors = [float((Quantizer(line).fake_quantize(x) - x)[others].square().mean())
              for line in (A8, A6, "float6_e2m3fn tensor")]  # fmt: skip
    assert errors[0] < errors[1] < errors[2]


def test_the_recipe_is_the_papers() -> None:
    recipe = load_recipe("fp4dit")
    formats = [str(rule.weights).removesuffix(" group=128 pad=true") for rule in recipe.scheme.rules]
    assert formats == ["float4_e3m0_finite", "float4_e2m1fn"]
    assert parse_scheme(recipe.scheme.to_dict()) == recipe.scheme  # the optional rule, too
    with pytest.raises(SchemeError, match="optional is true or false"):
        parse_scheme({"rules": [{"targets": ["Linear"], "weights": "int8", "optional": "yes"}]})


@pytest.mark.parametrize("kind", ["dit", "pixart", "hunyuan"])
def test_on_diffusion_transformers(kind: str, tmp_path: Path) -> None:
    """Formats by role; the folder is the model in memory, bit for bit; every byte of the pipeline is accounted for."""
    folder, given = save_pipeline(tmp_path / "p", kind), inputs(kind, 6)
    settings: dict[str, Any] = {"batch": 3, "dtype": "float32"}
    recipe = shortened(build_recipe("fp4dit", effort="quick"))
    model, report = nybble.quantize(folder, recipe, given, settings=settings)
    formats = {row.name.endswith("ff.net.0.proj"): Quantizer(str(row.weights)).format.name for row in report.layers}
    assert formats == {True: "float4_e3m0_finite", False: "float4_e2m1fn"}
    assert {row.inputs for row in report.layers} == {str(Quantizer(A8))}
    assert all(row.learned and row.learned["windows"] for row in report.layers)
    nybble.quantize(folder, recipe, given, settings=settings, out=tmp_path / "out")
    again, _ = nybble.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(**given).logits, again(**given).logits)
    found = inspect(tmp_path / "out")
    assert found["total"] == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_bad_input(tmp_path: Path) -> None:
    folder, given = save_pipeline(tmp_path / "p", "dit"), inputs("dit")
    cases: list[tuple[dict[str, Any], type[NybbleError], str]] = [
        ({"weights": "float4_e2m1fn group=24"}, GranularityError, "group=24 does not divide"),
        ({"weights": "float4_e2m5 group=32"}, FormatError, "float4_e2m5"),
        ({"activations": "e9m9 token"}, FormatError, "e9m9"),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            nybble.quantize(folder, "fp4dit", given, settings={"dtype": "float32"}, **changes)


def test_inputs_are_left_alone_while_weights_learn() -> None:
    """Section D: rounded inputs come later, in eval mode and in the packed layer; the recipe says so, and others not."""
    linear, x = torch.nn.Linear(32, 8), torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    twin = FakeLayer(linear, inputs=ActivationQuantizer(Quantizer("float6_e2m3fn tensor")))
    rounded = Quantizer("float6_e2m3fn tensor").fake_quantize(x)
    with torch.no_grad():
        for rounds, training, wanted in ((True, True, rounded), (False, True, x), (False, False, rounded)):
            twin.rounds_inputs = rounds
            assert torch.equal(twin.train(training)(x), linear(wanted))
    options = [make_reconstruction(s.name, s.options) for n in ("fp4dit", "adaround") for s in load_recipe(n).steps
               if s.kind == "reconstruction"]  # fmt: skip
    assert [option.rounds_inputs for option in options] == [False, True]
    with pytest.raises(SchemeError, match="leave one of them out"):
        make_reconstruction("mse", {"inputs": "lsq", "rounds_inputs": False})
