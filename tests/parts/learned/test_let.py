"""LET's parameters: where they begin, what shares one, what they take, and that gradients reach them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.core.errors import SchemeError, UsageError
from nybble.learned.transforms import Extent, Place, make_learned_transform
from nybble.learned.transforms.let import Let


def function(weights: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {"w": weights["w"] * given["factor"]}
    return found | ({"b": weights["b"] + weights["w"] @ given["shift"]} if "shift" in given else {})


def place(**changes: Any) -> Place:
    given: dict[str, Any] = {
        "name": "norm -> layer", "kind": "norm", "makers": ("norm",), "readers": ("layer",), "weights": ("w", "b"),
        "function": function, "units": torch.arange(6), "shifts": True, "rounded": True, **changes,
    }  # fmt: skip
    return Place(**given)


def extent() -> Extent:
    low = torch.tensor([-1.0, -8, 2, 0, -3, -5])
    return Extent(lowest=low, highest=torch.tensor([3.0, 8, 6, 0, 1, 5]), behind=torch.tensor([1.0, 2, 1, 1, 4, 0]))


def test_begins_as_the_paper_says() -> None:
    """s = range^alpha / weight^(1 - alpha) of the shifted channel, delta its middle; dead channels keep 1."""
    alive = torch.tensor([True, True, True, False, True, False])
    for alpha in (0.0, 0.5, 0.75):
        given = Let(alpha=alpha).begin([place()], [extent()]).parameters_of(0)
        half = torch.tensor([2.0, 8, 2, 0, 2, 5])
        wanted = half**alpha / extent().behind ** (1 - alpha)
        torch.testing.assert_close(given["factor"], torch.where(alive, wanted, 1.0), rtol=1e-6, atol=0)
        assert given["shift"].tolist() == [1, 0, 4, 0, -1, 0]
    plain = Let(shift=False).begin([place()], [extent()]).parameters_of(0)
    largest = torch.tensor([3.0, 8, 6, 0, 3, 5])
    assert set(plain) == {"factor"}
    torch.testing.assert_close(plain["factor"], torch.where(alive, (largest / extent().behind).sqrt(), 1.0))


def test_a_fixed_range_begins_at_one_and_so_does_a_product() -> None:
    for changes, extents in (({"static": True}, extent()), ({"kind": "product", "shifts": False}, None)):
        given = Let().begin([place(**changes)], [extents]).parameters_of(0)
        assert given["factor"].tolist() == [1.0] * 6
        assert given.get("shift", torch.zeros(6)).tolist() == [0.0] * 6


def test_channels_of_one_unit_share_their_factor() -> None:
    """The widest range and the largest weight among them."""
    units = torch.tensor([0, 1, 0, 2, 1, 2])
    given = Let().begin([place(units=units)], [extent()]).parameters_of(0)
    half, behind = torch.tensor([3.5, 8, 5]), torch.tensor([1.0, 4, 1])  # of -1 .. 6, -8 .. 8, -5 .. 5
    torch.testing.assert_close(given["factor"], (half / behind).sqrt()[units])
    assert given["shift"].tolist() == [2.5, 0, 2.5, 0, 0, 0]


def test_gradients_reach_factors_and_shifts_and_rates_are_relative() -> None:
    moving = Let().begin([place()], [extent()])
    weights = {"w": torch.randn(4, 6), "b": torch.randn(4)}
    (parameters,) = moving.groups().values()
    assert len(parameters) == 2 and all(p.dtype == torch.float32 and not p.any() for p in parameters)
    before = moving.parameters_of(0)
    new = moving.rewritten(weights)
    (new["w"].square().sum() + new["b"].square().sum()).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and bool(p.grad.all()) for p in parameters)
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(-3.0)
    after = moving.parameters_of(0)
    torch.testing.assert_close(after["factor"] / before["factor"], torch.full((6,), -3.0).exp())  # never negative
    reach = torch.tensor([2.0, 8, 2, 1, 2, 5])  # half of each channel's range; 1 of one without any
    torch.testing.assert_close(after["shift"] - before["shift"], -3 * reach)
    x = torch.randn(5, 6)
    torch.testing.assert_close(moving.inputs("layer", x), (x - after["shift"]) / after["factor"])
    assert torch.equal(moving.inputs("other", x), x)


def test_a_state_dict_is_all() -> None:
    moving = Let().begin([place()], [extent()])
    with torch.no_grad():
        for parameter in moving.parameters():
            parameter.normal_()
    again = Let().begin([place()], None)
    again.load_state_dict(moving.state_dict())
    for name, value in moving.parameters_of(0).items():
        assert torch.equal(again.parameters_of(0)[name], value)


@pytest.mark.parametrize(
    ("where", "kind", "shifts", "rounded", "taken"),
    [
        ("auto", "norm", False, True, True),  # weights and activations: everywhere
        ("auto", "norm", False, False, False),  # weights alone: not in a llama
        ("auto", "norm", True, False, True),  # but in an OPT
        ("rounded", "norm", True, False, False),
        ("all", "norm", False, False, True),
        ("all", "product", False, False, False),  # nothing depends on it
        ("auto", "product", False, True, True),
        ("all", "linear", False, True, False),
        ("auto", "attention", False, True, True),
    ],
)
def test_what_it_takes(where: Any, kind: Any, shifts: bool, rounded: bool, taken: bool) -> None:
    assert Let(where=where).takes(place(kind=kind, shifts=shifts, rounded=rounded)) == taken
    assert Let(where=where, down=True).takes(place(kind="linear", shifts=False, rounded=True))


def test_refusals() -> None:
    with pytest.raises(SchemeError, match=r"alpha=1\.5 is a share"):
        Let(alpha=1.5)
    with pytest.raises(UsageError, match=r"unknown learned transform 'lett'\. Did you mean 'let'"):
        make_learned_transform("lett", {})
    with pytest.raises(SchemeError, match="no option 'shfit'"):
        make_learned_transform("let", {"shfit": True})
