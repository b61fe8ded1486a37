"""Oscillations against a count by hand, their cure; confidence-guided annealing against its formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.learned import Part
from nybble.learned import make_part as make_learned
from nybble.nn.fake import FakeLayer
from nybble.training.callbacks import Acting, make_part
from nybble.training.callbacks.oscillation import Flips
from nybble.training.prepare import prepare

INT, STATS = {"weights": "int4 channel scale=learned"}, {"weights": "midrise2 channel scale=max-entropy"}


def layer(scheme: dict[str, Any], part: str | Part, weight: Tensor) -> FakeLayer:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    made = prepare(linear, scheme, {"weights": part}).train()
    assert isinstance(made, FakeLayer)
    return made


def put(made: FakeLayer, acting: Acting, values: Tensor) -> dict[str, float]:
    """An update that comes to these weights."""
    acting.before_update(1.0)
    with torch.no_grad():
        made.weight.latent.copy_(values)
    acting.after_update(1.0)
    return acting.newest()


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def codes(made: FakeLayer) -> Tensor:
    found: Any = made.weight.packed()
    return found.unpacked()  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------- oscillations
def test_flips_are_counted() -> None:
    """To and fro is one, on in the same direction none, a rest between changes nothing (int4, codes by hand)."""
    made = layer(INT, "lsq", torch.ones(1, 4))
    with torch.no_grad():
        made.weight.learned.scale.fill_(1.0)  # type: ignore[union-attr,operator]
        made.weight.latent.zero_()
    acting = make_part("oscillation", {}).attach(made)
    path = [[1, 1, 1, 0], [0, 2, 1, 0], [1, 3, 0, 0], [0, 2, 0, 0.4], [0, 3, 1, 0.4]]
    found = [put(made, acting, torch.tensor([row]).float())["flips"] for row in path]
    assert found == [0, 1, 2, 2, 2]
    assert acting.layers() == {"": {"weights": 4, "flips": 7, "resets": 0}}


@pytest.mark.parametrize(
    ("scheme", "part"),
    [
        (INT, "lsq"), ({"weights": "int4 group=8 symmetric=false"}, "ste"),
        ({"weights": "float4_e2m1fn group=8"}, "ste"), ({"weights": "nf4 channel"}, "lsq"),
    ],
)  # fmt: skip
def test_the_cure(scheme: dict[str, Any], part: str) -> None:
    """Those that flipped twice become what they are rounded to: same code, no error; no other weight moves."""
    start = random(3, 16)
    start[:, ::8], start[:, 1::8] = 3.0, -3.0  # what decides scales stays
    made = layer(scheme, part, start)
    acting = make_part("oscillation", {"reset_every": 4, "reset_at": 2}).attach(made)
    moves = torch.zeros(3, 16)
    moves[1, 3], moves[2, 5] = 0.9, 1.2  # wide enough for another code
    for sign in (1, -1, 1):
        put(made, acting, start + sign * moves)
    put(made, acting, start + 0.45 * moves)
    latent, rounded = made.weight.latent.detach(), made.eval().weight(torch.float32)
    reset = latent != start + 0.45 * moves
    assert reset.nonzero().tolist() == [[1, 3], [2, 5]]
    assert torch.equal(latent[reset], rounded[reset])
    assert acting.layers()[""]["resets"] == 2
    for sign in (1, -1, 1, -1):  # counted from 0 again: three changes to come, two of them flips
        put(made, acting, start + sign * moves)
    assert acting.layers()[""]["resets"] == 4


def test_counts_begin_anew_behind_each_cure() -> None:
    """Oscillations are those since the last of them, and of what isn't reset a flip across one counts."""
    flips = Flips(torch.zeros(2, dtype=torch.uint8))
    for codes, reset in (((1, 0, 1), False), ((0, 1), False), ((0, 1, 0), True)):
        for code in codes:
            flips.count(torch.tensor([code, 0], dtype=torch.uint8), "uint2")
        assert flips.cured(3).tolist() == [reset, False]
    flips.count(torch.tensor([1, 0], dtype=torch.uint8), "uint2")  # the first change of one that was reset is none
    assert flips.number("total") == 7 and flips.number("resets") == 1


def test_a_mean_that_is_not_put_back() -> None:
    """BiT's signs: the middle of a cell is the mean and the level."""
    part = make_learned("statistics", {"center": "tensor", "raw": True})
    made = layer({"weights": "binary tensor scale=mean"}, part, random(2, 8) + 0.5)
    acting = make_part("oscillation", {"reset_every": 3, "reset_at": 1}).attach(made)
    values = made.weight.latent.detach().clone()
    for value in (9.0, -9.0, 9.0):
        values[0, 0] = value
        put(made, acting, values)
    wide, mean = values.double(), values.double().mean()
    assert made.weight.latent[0, 0].item() == pytest.approx(float(wide.abs().mean() + mean), rel=1e-6)


def test_annealing_ends_it() -> None:
    """OFQ, check 7, on a regression in 2 bits: behind 60 updates of annealing hardly a weight flips any more."""
    draw = torch.Generator().manual_seed(0)
    x, wanted = torch.randn(256, 16, generator=draw), torch.randn(4, 16, generator=draw)
    y = x @ wanted.T + 0.5 * torch.randn(256, 4, generator=draw)
    late: list[float] = []
    for names in (["oscillation"], ["oscillation", "annealing"]):
        made = layer(STATS, "statistics", wanted)
        acting = [make_part(name, {"start": 0.4} if name == "annealing" else {}).attach(made) for name in names]
        optimizer, flips = torch.optim.Adam(made.parameters(), lr=0.01), 0.0
        for step in range(120):
            some = torch.randint(256, (64,), generator=draw)
            optimizer.zero_grad()
            (made(x[some]) - y[some]).square().mean().backward()
            for each in acting:
                each.before_update(step / 119)
            optimizer.step()
            for each in acting:
                each.after_update(step / 119)
            flips += acting[0].newest()["flips"] if step >= 110 else 0
        late.append(flips)
    assert late[0] > 30 and late[1] <= 0.1 * late[0]


# ---------------------------------------------------------------------------------------------------------- annealing
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("within", [0.0, 0.005, 0.2, 0.5])
def test_who_trains(bits: int, within: float) -> None:
    """CGA's band on StatsQ, in float64; the frozen ones stay bit for bit under momentum and decay, others all move."""
    made = layer({"weights": f"midrise{bits} channel scale=max-entropy"}, "statistics", random(6, 64))
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3, weight_decay=0.3)
    for _ in range(3):  # momentum of all
        made(random(4, 64)).sum().backward()
        optimizer.step()
    acting = make_part("annealing", {"start": 0.0, "range": within}).attach(made)
    before = made.weight.latent.detach().clone()
    wide, n = before.double(), 2 ** (bits - 1)
    u = (wide / (2 * wide.abs().mean(1, keepdim=True))).clamp(-1, 1 - 1e-6) * n - 0.5
    boundaries = torch.arange(-n, n - 1, dtype=torch.float64) + 0.5
    distance = (u[..., None] - boundaries).abs().amin(-1)
    acting.before_update(0.0)
    assert made.weight.latent.grad is not None
    trains = made.weight.latent.grad != 0
    optimizer.step()
    acting.after_update(0.0)
    sure = (distance - within).abs() > 1e-6
    assert torch.equal(trains[sure], (distance <= within)[sure])
    moved = made.weight.latent.detach() != before
    assert torch.equal(moved, trains)
    assert acting.newest()["frozen"] == pytest.approx(1 - trains.double().mean().item())
    between = (u > boundaries[0]) & (u < boundaries[-1])
    if within == 0.5:
        assert bool(trains[between & sure].all())
    if within == 0:
        assert not bool(trains.any())


def test_before_its_start_nothing_is_frozen() -> None:
    made = layer(INT, "lsq", random(2, 8))
    acting = make_part("annealing", {"start": 0.5, "range": 0.0}).attach(made)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for progress, frozen in ((0.49, 0.0), (0.5, 1.0)):
        optimizer.zero_grad()
        made(random(4, 8)).square().sum().backward()
        before = made.weight.latent.detach().clone()
        acting.before_update(progress)
        optimizer.step()
        acting.after_update(progress)
        assert acting.newest() == {"frozen": frozen}
        assert torch.equal(made.weight.latent, before) == bool(frozen)


def test_bad_options() -> None:
    for name, options, says in (
        ("annealing", {"range": -0.1}, "range=-0.1.*0 or more"), ("annealing", {"start": 1.0}, "start=1.*below 1"),
        ("annealing", {"range": float("nan")}, "range is a finite number"),
        ("oscillation", {"reset_every": -1}, "reset_every=-1"),
        ("oscillation", {"reset_at": 0}, "reset_at=0"),
        ("oscillation", {"reset_every": 4}, "no weight oscillates 4 times in 4 updates"),
    ):  # fmt: skip
        with pytest.raises(SchemeError, match=says):
            make_part(name, options)
