"""DyBit in training: learned scales on its grid, what is never negative without a sign; integers beside it.

Zhou et al. 2023, arXiv:2302.12510; the format's tables are in tests/parts/formats.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.learned import WEIGHTS
from nybble.learned.lsq import LearnedScale, Lsq
from nybble.nn.fake import FakeLayer
from nybble.quantizer import Quantizer
from nybble.training.convert import convert
from nybble.training.prepare import learning_groups, prepare
from nybble.training.recipe import load_training_recipe

RECIPE = load_training_recipe("dybit-qat")
PARTS: dict[str, Any] = {"weights": "lsq", "inputs": Lsq(unsigned=True)}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )  # fmt: skip


def images() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(32, 3, 8, 8, generator=draw), torch.randint(0, 4, (32,), generator=draw)


def scheme(line: str) -> dict[str, Any]:
    return {"targets": ["Conv", "Linear"], "weights": line, "inputs": f"{line} static", "ignore": []}


@pytest.mark.parametrize("fmt", ["dybit4", "int4"])
def test_signs_go_where_there_are_none(fmt: str) -> None:
    """Training lowers the loss, scales move, and the packed network computes the same."""
    x, y = images()
    model = prepare(network().train(), scheme(f"{fmt} tensor scale=mse"), PARTS, run=lambda m: m(x))
    twins = [m for m in model.modules() if isinstance(m, FakeLayer)]
    entered = [twin.inputs for twin in twins]
    assert all(isinstance(learned, LearnedScale) for learned in entered)
    assert [learned.quantizer.format.name for learned in entered] == [fmt, f"u{fmt}", fmt]  # type: ignore[union-attr]
    began = [p.detach().clone() for twin in twins for p in twin.groups()["inputs.scales"]]
    optimizer = torch.optim.Adam(learning_groups(model, {}), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    moved = [p for twin in twins for p in twin.groups()["inputs.scales"]]
    assert not any(torch.equal(one, other) for one, other in zip(began, moved, strict=True))
    expected = model.eval()(x)
    assert torch.equal(convert(model)(x), expected)


def test_one_negative_number_keeps_the_sign() -> None:
    line = Quantizer("dybit4 static")
    for least, name in ((0.0, "udybit4"), (-1e-6, "dybit4")):
        x = torch.rand(4, 8)
        x[0, 0] = least
        assert Lsq(unsigned=True).make(line, x, side="activations").quantizer.format.name == name
        assert Lsq().make(line, x, side="activations").quantizer.format.name == "dybit4"
    start = line.fit(torch.rand(4, 8))
    assert Lsq(unsigned=True).make(line, torch.rand(4, 8), start, "activations").quantizer == line


def test_gradient_of_the_scale_on_its_grid() -> None:
    """g (round(x / s) - x / s) inside, g times the end outside; in float64."""
    x = 3 * torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    learned = Lsq().make(Quantizer("dybit4 tensor scale=mse"), x)
    assert isinstance(learned, LearnedScale)
    upstream = torch.randn(6, 16, generator=torch.Generator().manual_seed(3))
    (learned.train()(x) * upstream).sum().backward()
    y = x.double() / float(learned.scale.detach())
    grid = torch.tensor([-4, -2, -1.5, -1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.5, 2, 4], dtype=torch.float64)
    nearest = grid[(y[..., None] - grid).abs().argmin(-1)]
    inside = (y >= -4) & (y <= 4)
    expected = (torch.where(inside, nearest - y, nearest) * upstream.double()).sum() / (x.numel() * 4.0) ** 0.5
    assert learned.scale.grad is not None
    assert float(learned.scale.grad) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("float4_e2m1fn static", "no ufloat4_e2m1fn"),
        ("int4 static symmetric=false", "whose offset does the same"),
        ("int4 token", "one scale for all activations"),
    ],
)
def test_refusals(line: str, error: str) -> None:
    with pytest.raises(SchemeError, match=error):
        Lsq(unsigned=True).check(Quantizer(line), "activations")
    with pytest.raises(SchemeError, match="unsigned is for activations"):
        Lsq(unsigned=True).check(Quantizer("int4 channel"), WEIGHTS)


def test_the_recipe_names_what_it_says() -> None:
    learned = RECIPE.options["learned"]
    assert learned == {"weights": "lsq", "inputs": {"lsq": {"unsigned": True}}}
    (rule,) = RECIPE.scheme.rules
    assert (str(rule.weights), str(rule.inputs)) == ("dybit4 scale=mse", "dybit4 scale=mse static")
