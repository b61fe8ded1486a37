"""DyBit's search: both constraints kept or refused, monotone, and what it weighs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from tests.tiny import input_ids, tiny_model
from torch import nn

from nybble.core.errors import SchemeError, UsageError
from nybble.costs import Sized, make_cost
from nybble.data.kinds import Batch
from nybble.nn.kinds import targets_of
from nybble.quantizer import Quantizer
from nybble.search.loops.levels import Levels
from nybble.search.problem import Problem
from nybble.search.sensitivities.rmse import Rmse
from nybble.search.study import Layer, Study

WIDTHS = (2, 4, 8)
PAIRS = [*itertools.product(WIDTHS, WIDTHS)]


def problem(layers: int, seed: int, limit: int = 0) -> Problem:
    """Layers of many sizes on the modelled array; errors double with each halving of bits, and vary."""
    drawn, cycles = torch.Generator().manual_seed(seed), make_cost("cycles")
    shapes = torch.randint(3, 200, (layers, 3), generator=drawn).tolist()
    lines = [(Quantizer(f"int{w} channel"), Quantizer(f"int{x}")) for w, x in PAIRS]
    costs = [
        [cycles.of(Sized(name="", shape=(out, into), macs=out * into * rows, inputs=x), w) for w, x in lines]
        for out, into, rows in shapes
    ]
    steps = torch.rand(layers, 2, generator=drawn, dtype=torch.float64) + 0.1
    losses = torch.tensor([[a * 2.0**-w + b * 2.0**-x for w, x in PAIRS] for a, b in steps.tolist()])
    names = [f"layer {i}" for i in range(layers)]
    return Problem(names=names, losses=losses.double(), costs=costs, limit=limit, unit="cycles", bits=PAIRS)


def bits(choice: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([PAIRS[item] for item in choice])


@pytest.mark.parametrize("seed", range(3))
def test_a_speed_up_is_met_or_refused_and_a_larger_one_raises_no_bits(seed: int) -> None:
    """Check 6: alpha from 1 to 8 over uniform 8 bits."""
    given = problem(25, seed)
    eight = given.cost([len(PAIRS) - 1] * 25)
    before = torch.full((25, 2), 8)
    for alpha in (1, 1.5, 2, 3, 4, 8):
        wanted = replace(given, limit=int(eight / alpha))
        found = Levels().solve(wanted)
        assert given.cost(found) * alpha <= eight and found == Levels().solve(wanted)
        assert bool((bits(found) <= before).all())
        before = bits(found)
    assert 2 < before.float().mean() < 8  # nothing was lowered further than it had to be
    with pytest.raises(UsageError, match=r"infeasible.*the least is"):
        Levels().solve(replace(given, limit=given.least - 1))


@pytest.mark.parametrize("beta", [1.5, 2, 4, 8])
def test_an_error_constraint_is_never_violated(beta: float) -> None:
    given = problem(25, 4)
    eight = [len(PAIRS) - 1] * 25
    found = Levels(beta=beta).solve(replace(given, limit=given.most))
    assert given.loss(found) <= beta * given.loss(eight)
    assert given.loss(Levels(beta=beta / 1.2).solve(replace(given, limit=given.most))) <= given.loss(found)
    lowered = [
        given.loss((*found[:i], item, *found[i + 1 :])) - given.loss(found)
        for i in range(25)
        for item, pair in enumerate(PAIRS)
        if pair != PAIRS[found[i]] and all(a <= b for a, b in zip(pair, PAIRS[found[i]], strict=True))
    ]
    assert all(given.loss(found) + more > beta * given.loss(eight) for more in lowered)  # nothing more is acceptable
    with pytest.raises(UsageError, match=f"infeasible with these levels and beta={beta:g}; the least they come to is"):
        Levels(beta=beta).solve(replace(given, limit=given.cost(found) - 1))


def test_the_largest_layer_that_loses_least_steps_down_first_and_by_one_level() -> None:
    """Formats of both sides alike: 8, 4 and 2 bits."""
    losses = torch.tensor([[9.0, 3.0, 0.0], [9.0, 1.0, 0.0], [9.0, 2.0, 0.0]], dtype=torch.float64)
    costs = [[2, 4, 8], [20, 40, 80], [200, 400, 800]]
    given = Problem(
        names=["a", "b", "c"], losses=losses, costs=costs, limit=887, bits=[(2, 2), (4, 4), (8, 8)]
    )  # ranks: a 2 + 2, b 1 + 0, c 0 + 1; of b and c what loses less
    assert Levels().solve(given) == (2, 1, 2)
    assert Levels().solve(replace(given, limit=500)) == (2, 1, 1)
    assert Levels().solve(replace(given, bits=())) == (2, 1, 2)
    leap = replace(given, losses=torch.tensor([[9.0, 3.0, 0.0], [9.0, 1.0, 0.0], [0.5, 2.0, 0.0]]).double())
    assert Levels().solve(leap) == (2, 1, 2)  # 2 bits are two levels from 8, whatever they lose
    with pytest.raises(UsageError, match=r"beta is 0\.5"):
        Levels(beta=0.5)


def test_cycles_are_those_of_the_formula() -> None:
    """100 outputs, 40 columns, 50 rows, 16 x 16 elements: ceil(100 w / 128) ceil(50 x / 128) (40 + 30)."""
    cycles = make_cost("cycles")
    for w, x, wanted in ((8, 8, 7 * 4), (4, 8, 4 * 4), (8, 2, 7 * 1), (2, 2, 2 * 1), (3, 5, 4 * 4)):
        layer = Sized(name="a", shape=(100, 40), macs=100 * 40 * 50, inputs=Quantizer(f"int{x}"))
        assert cycles.of(layer, Quantizer(f"int{w} channel")) == wanted * 70
    with pytest.raises(SchemeError, match="16 bits, and the modelled multipliers have 8"):
        cycles.of(Sized(name="a", shape=(8, 8), macs=64), Quantizer("bf16"))


def test_errors_are_relative_and_of_both_sides() -> None:
    """Against plain sums over the layer's weights and its inputs, watched by a hook of the test's own."""
    model = tiny_model(dtype=torch.float32)
    target = targets_of(model)["model.layers.1.mlp.down_proj"]
    menu = [Quantizer("int4 channel"), Quantizer("dybit4 scale=mse")]
    layer = Layer(target=target, menu=menu, inputs=[Quantizer("int8 token"), None])
    ids = (input_ids(), input_ids().flip(1))
    batches = [Batch(inputs={"input_ids": each}, real=torch.ones_like(each, dtype=torch.bool)) for each in ids]
    batches[1].real[:, -1] = False  # type: ignore[index]
    seen: list[torch.Tensor] = []
    module = model.get_submodule(target.name)
    assert isinstance(module, nn.Linear)
    found = Rmse().measure(Study(model=model, layers=[layer], batches=batches))
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for batch in batches:
        model(**batch.inputs)
    seen[1] = seen[1][:, :-1]
    x, w = torch.cat([each.flatten() for each in seen]).double(), module.weight.detach()
    rounded = torch.cat([Quantizer("int8 token").fake_quantize(each).flatten() for each in seen]).double()
    wanted = [((q.fake_quantize(w) - w).double().square().mean().sqrt() / w.double().std(correction=0)) for q in menu]
    wanted[0] += (rounded - x).square().mean().sqrt() / x.std(correction=0)
    torch.testing.assert_close(found[0], torch.stack(wanted), rtol=1e-5, atol=0)
