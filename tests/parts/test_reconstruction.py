"""The engine on three small layers: which inputs it reads and in what order, what it aims at, when it goes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nybble.calibration.block import BlockState, Record
from nybble.calibration.error import relative_error
from nybble.calibration.trace import HIDDEN, BlockCall, Tensors
from nybble.calibration.window import Calibration, Window
from nybble.core.errors import LearningError
from nybble.learned import make_part
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.fake import FakeLayer
from nybble.nn.kinds import Quantized, kind_of
from nybble.qtensor import QuantParams
from nybble.quantizer import Quantizer
from nybble.reconstruction import FLOAT
from nybble.reconstruction.engine import reconstruct
from nybble.reconstruction.losses.mse import Mse
from nybble.reconstruction.twins import put_twins, settle_twins, twins_of
from nybble.report.record import block_rows
from nybble.scheme import Rule

BATCHES, LINE = 5, "int3 channel"
MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])
INPUTS = Quantizer("int4 tensor static")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.tanh(self.layer(hidden_states))


class Seen(Mse):
    """Mse that notes what it was asked."""

    def loss(self, output: Tensor, wanted: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
        ASKED.append((wanted[FLOAT], mask, output.requires_grad))
        return super().loss(output, wanted, mask)


ASKED: list[tuple[Tensor, Tensor | None, bool]] = []


def options(**changes: Any) -> Mse:
    return Seen(**{"weights": make_part("adaround", {}), "steps": 7, "penalty": 0.0, **changes})


class Made:
    """A window of quantized blocks; ``given``: its inputs by path; ``read``: path and order of every time it read."""

    def __init__(self, seed: int = 0, part: str = "window-0000", blocks: int = 2) -> None:
        ASKED.clear()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.states = [self.state(index) for index in range(blocks)]
            self.given = {path: torch.randn(BATCHES, 2, 4, 8) for path in ("float", "quantized")}
        self.read: list[tuple[str, list[int] | None]] = []
        calibration = Calibration(
            tokens=40, samples=10, batches=BATCHES, device=torch.device("cpu"), dtype=torch.float32, seed=seed,
            config=None,
        )  # fmt: skip
        self.window = Window(self.states, calibration, self.source, part)

    def state(self, index: int) -> BlockState:
        block = Block().requires_grad_(False)
        kind = kind_of(block.layer)
        assert kind is not None
        rule = Rule(weights=Quantizer(LINE), inputs=INPUTS)
        target = dataclasses.replace(next(iter(kind.targets("layer", block.layer))), rule=rule)
        state, sample = BlockState(block, f"blocks.{index}", None, [target]), torch.randn(64, 8)
        params = INPUTS.fit(sample)
        state.records["layer"] = Record(target=target, quantizer=rule.weights, inputs=(INPUTS, params), sample=sample)
        packed = Quantizer(LINE).quantize(block.layer.weight)
        state.install(target, Quantized(weights=(packed,), inputs=ActivationQuantizer(INPUTS, params)))
        return state

    def source(self, path: str, order: Sequence[int] | None) -> Iterator[tuple[Sequence[BlockCall], Tensors]]:
        self.read.append((path, None if order is None else list(order)))
        call = BlockCall(index=0, args=(), kwargs={}, keyword=None, start=None, mask=MASK)
        for number in range(BATCHES) if order is None else order:
            yield [call] * len(self.states), {HIDDEN: self.given[path][number]}

    @property
    def orders(self) -> list[list[int]]:
        """Of every round, the batches in their order."""
        return [order for _, order in self.read if order is not None]

    def weights(self) -> Tensor:
        """What the layers round to."""
        found: Any = [state.module.get_submodule("layer").weight for state in self.states]
        return torch.stack([w.qtensor().dequantize() for w in found])

    def learned(self) -> list[Tensor]:
        """What the twins have learned."""
        twins = [twin for state in self.states for twin in twins_of(state).values()]
        groups = [part.groups() for twin in twins for _, part in twin.learned()]
        return [p.detach().clone() for found in groups for parameters in found.values() for p in parameters]


def test_every_batch_once_a_round_in_an_order_that_the_seed_decides() -> None:
    def orders(**changes: Any) -> list[list[int]]:
        made = Made(**changes)
        reconstruct(made.window, options(steps=2 * BATCHES + 2))
        return made.orders

    found = orders()
    assert [sorted(order) for order in found[:2]] == [list(range(BATCHES))] * 2 and len(found[2]) == 2
    assert found[0] != found[1] and list(range(BATCHES)) not in found
    assert orders() == found
    assert orders(seed=1) != found and orders(part="window-0002") != found


@pytest.mark.parametrize("feed", ["float", "quantized"])
def test_inputs_come_from_the_path_that_feeds(feed: str) -> None:
    """What it should give is the float blocks' output on the float path, whatever feeds it; padding is left out."""
    made = Made()
    float_blocks = [state.float_module("layer") for state in made.states]
    wanted = made.given["float"]
    for layer in float_blocks:
        wanted = torch.tanh(layer(wanted))
    reconstruct(made.window, options(feed=feed))
    assert made.read[0] == ("float", None) and {path for path, _ in made.read[1:]} == {feed}
    numbers = [*range(BATCHES), *(number for order in made.orders for number in order), *range(BATCHES)]
    assert len(ASKED) == len(numbers) == 2 * BATCHES + 7
    for number, (goal, mask, _) in zip(numbers, ASKED, strict=True):
        assert torch.equal(goal, wanted[number]) and mask is MASK
    assert [learns for _, _, learns in ASKED] == [False] * BATCHES + [True] * 7 + [False] * BATCHES


def test_before_and_after_are_means_over_all_batches() -> None:
    made = Made()
    found = reconstruct(made.window, options(steps=60, rates={"rounding": 0.05}))
    assert found.kept and found.after < 0.9 * found.before
    losses = [
        float(Mse.loss(options(), made.window.run(calls, given, "quantized")[HIDDEN], {FLOAT: goal}, MASK))
        for (calls, given), goal in zip(
            made.window.inputs("quantized"),
            [made.window.run(calls, given, "float")[HIDDEN] for calls, given in made.window.inputs("float")],
            strict=True,
        )
    ]
    assert found.after == pytest.approx(sum(losses) / BATCHES, rel=1e-6)


def test_each_group_has_its_rate_and_the_schedule_falls() -> None:
    def moved(**changes: Any) -> list[Tensor]:
        made = Made()
        inputs = make_part("lsq", {})
        for state in made.states:
            put_twins(state, state.targets, options(inputs=inputs))
        before = made.learned()
        reconstruct(made.window, options(inputs=inputs, **changes))
        after = made.learned()
        return [a - b for a, b in zip(after, before, strict=True)]

    def kinds(found: list[Tensor]) -> tuple[bool, bool]:
        rounding, scales = [x for x in found if x.numel() > 1], [x for x in found if x.numel() == 1]
        assert len(rounding) == len(scales) == 2
        return any(bool(x.any()) for x in rounding), any(bool(x.any()) for x in scales)

    assert kinds(moved(rates={"rounding": 0.001, "default": 0.0})) == (True, False)
    assert kinds(moved(rates={"rounding": 0.0, "default": 1e-6})) == (False, True)
    # Adam goes a step of about the rate each time: 7 of them, or with the cosine about half of that.
    rates = {"rounding": 1e-4, "default": 0.0}
    far = [
        float(torch.cat([x.flatten() for x in moved(schedule=word, rates=rates)]).abs().amax())
        for word in ("constant", "cosine")
    ]
    assert far[0] == pytest.approx(7e-4, rel=0.05) and far[1] == pytest.approx(4e-4, rel=0.05)


def test_the_penalty_decides_roundings() -> None:
    def undecided(penalty: float) -> float:
        made = Made(blocks=1)
        reconstruct(made.window, options(steps=200, penalty=penalty, rates={"rounding": 0.2}))
        (twin,) = twins_of(made.states[0]).values()
        return float(twin.penalty(1.0).detach())

    assert undecided(1e4) < 0.04 < undecided(0.0)


def test_what_is_worse_goes_back() -> None:
    """New twins make room for the packed layers; one that the window before left keeps what it had learned there."""
    made = Made()
    put_twins(made.states[0], made.states[0].targets, options())
    twin = twins_of(made.states[0])["layer"]
    (v,) = next(groups["rounding"] for _, part in twin.learned() if "rounding" in (groups := part.groups()))
    with torch.no_grad():
        v.add_(0.3 * torch.randn(v.shape, generator=torch.Generator().manual_seed(1)))
    learned, packed = v.detach().clone(), made.states[1].module.get_submodule("layer")

    class Backwards(Seen):
        def loss(self, output: Tensor, wanted: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
            sign = -1 if output.requires_grad else 1  # it learns to be worse
            return sign * super().loss(output, wanted, mask)

    found = reconstruct(
        made.window, Backwards(weights=make_part("adaround", {}), steps=40, penalty=0.0, rates={"rounding": 0.3})
    )
    assert not found.kept and found.after == found.before
    assert torch.equal(v, learned) and made.states[1].module.get_submodule("layer") is packed
    assert all("went back" in state.records["layer"].notes[-1] for state in made.states)


def test_records_say_what_was_learned_of_inputs() -> None:
    made = Made(blocks=1)
    before = made.states[0].records["layer"].inputs[1]
    reconstruct(made.window, options(inputs=make_part("lsq", {}), rates={"default": 1e-3}, steps=20))
    settle_twins(made.states[0])
    record, layer = made.states[0].records["layer"], made.states[0].module.get_submodule("layer")
    inputs: Any = layer.inputs
    assert record.changed and record.inputs[1] is not None and before is not None
    found = torch.as_tensor(record.inputs[1].scale)
    assert torch.equal(found, inputs.params().scale) and not torch.equal(found, torch.as_tensor(before.scale))
    (row,) = block_rows(made.states[0])
    x, truth = record.sample, made.states[0].get("layer.weight")
    assert x is not None and row.error is not None and row.rtn_error is not None
    second = x.T @ x / len(x)  # errors are of outputs, on the inputs that were kept
    assert row.error == pytest.approx(relative_error(truth, made.weights()[0], second), rel=1e-5)
    plain = Quantizer(LINE).quantize(truth).dequantize()
    assert row.rtn_error == pytest.approx(relative_error(truth, plain, second), rel=1e-5)


def test_a_penalty_is_a_mean_in_units_of_the_loss_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """By plain gradient descent on a penalty with the gradient 1, where the loss itself is 5 whatever comes out."""
    progress: list[float] = []

    class Flat(Mse):
        def loss(self, output: Tensor, wanted: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
            return 0 * output.sum() + 5

    def penalty(twin: FakeLayer, t: float) -> Tensor:
        progress.append(t)
        return torch.stack([p.sum() for _, part in twin.learned() for p in part.groups().get("rounding", ())]).sum()

    monkeypatch.setattr(FakeLayer, "penalty", penalty)
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    made, weights = Made(), make_part("adaround", {})
    choices = Flat(weights=weights, steps=4, penalty=3.0, rates={"rounding": 0.1}, schedule="constant")
    for state in made.states:
        put_twins(state, state.targets, choices)
    before = made.learned()
    assert reconstruct(made.window, choices).kept
    elements = 2 * 8 * 8
    for was, now in zip(before, made.learned(), strict=True):
        assert torch.allclose(was - now, torch.tensor(4 * 0.1 * 3.0 * 5 / elements), rtol=1e-3)
    assert progress == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


def test_twins_begin_with_what_the_solver_and_calibration_found() -> None:
    """Scales of weights and inputs that aren't those of the quantizers' own rules, and what rounds the outputs."""
    made = Made(blocks=1)
    (state,), x = made.states, made.given["float"][0]
    (target,), params = state.targets, QuantParams(torch.tensor([[0.7]]))
    state.records["layer"].inputs = INPUTS, params
    weight = Quantizer(f"{LINE} scale=mse").quantize(state.get("layer.weight"))
    outputs = ActivationQuantizer(Quantizer("int4 token"))
    made_of = Quantized(weights=(weight,), inputs=ActivationQuantizer(INPUTS, params), outputs=outputs)
    packed = state.install(target, made_of)
    wanted = packed(x)
    put_twins(state, state.targets, options(inputs=make_part("lsq", {})))
    twin = twins_of(state)["layer"]
    assert torch.equal(twin(x), wanted) and torch.equal(twin.settle()(x), wanted)


def test_nothing_but_the_learned_parts_asks_for_gradients() -> None:
    """While it trains; a model in memory may have parameters that do."""
    made = Made()
    others = [state.module.get_submodule("layer").bias for state in made.states]
    norms = [nn.LayerNorm(8) for _ in made.states]
    for state, norm in zip(made.states, norms, strict=True):
        state.module.add_module("norm", norm)
    asked: list[bool] = []

    class Noted(Seen):
        def loss(self, output: Tensor, wanted: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
            if output.requires_grad:
                asked.extend(norm.weight.requires_grad for norm in norms)
            return super().loss(output, wanted, mask)

    reconstruct(made.window, Noted(weights=make_part("adaround", {}), steps=3, rates={"rounding": 1e-3}))
    assert asked == [False] * 6 and all(norm.weight.requires_grad for norm in norms)
    assert not any(isinstance(b, nn.Parameter) and b.requires_grad for b in others)
    assert all(p.grad is None for state in made.states for p in state.module.parameters())


def test_a_window_that_comes_to_no_number_is_refused() -> None:
    class Broken(Seen):
        def loss(self, output: Tensor, wanted: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
            found = super().loss(output, wanted, mask)
            return found if output.requires_grad or len(ASKED) <= BATCHES else found * torch.inf

    with pytest.raises(LearningError, match=r"^the loss of window-0000 is inf at step 2; take smaller rates"):
        reconstruct(Made().window, Broken(weights=make_part("adaround", {}), steps=2))


def test_a_last_step_that_leaves_no_number_names_the_layer() -> None:
    """The step's own loss was a number; what it moved is none."""
    made = Made()
    before = made.weights()

    class Poisoned(Seen):
        def loss(self, output: Tensor, wanted: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
            found = super().loss(output, wanted, mask)
            if sum(learns for _, _, learns in ASKED) == 3:
                (twin,) = twins_of(made.states[1]).values()
                for parameter in twin.learned()[0][1].parameters():
                    parameter.data.fill_(torch.nan)  # behind autograd's back
            return found

    match = r"^blocks\.1\.layer gives NaN or Inf, so the loss of window-0000 is nan at step 3; take smaller rates"
    with pytest.raises(LearningError, match=match):
        reconstruct(made.window, Poisoned(weights=make_part("lsq", {}), steps=3))
    assert torch.equal(made.weights(), before)


def test_a_loss_of_nothing_is_nothing() -> None:
    """A window of zeros: 0, not NaN."""
    zeros = torch.zeros(2, 4, 8)
    assert float(Mse.loss(options(), zeros, {FLOAT: zeros}, MASK)) == 0.0
