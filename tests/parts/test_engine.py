"""The engine's options: rates, update rules, mixed inputs, what is kept, when it stops, what it says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parts.test_reconstruction import BATCHES, LINE, Made, options
from torch import Tensor, nn

from nybble.core.curve import POINTS, curve
from nybble.core.errors import LearningError, SchemeError
from nybble.learned import make_part
from nybble.quantizer import Quantizer
from nybble.reconstruction import FLOAT, LOCAL, make_reconstruction
from nybble.reconstruction.engine import reconstruct
from nybble.reconstruction.inputs import mixed, rounds
from nybble.reconstruction.losses.mse import Mse
from nybble.reconstruction.optimizing import Mover, rate
from nybble.reconstruction.targets import wanted_of
from nybble.reconstruction.twins import settle_twins, twins_of

LSQ = make_part("lsq", {})


def test_rates_are_those_of_torchs_schedules() -> None:
    def torchs(make: Any) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule, found = make(optimizer), list[float]()
        for _ in range(20):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    def ours(**changes: Any) -> list[float]:
        return [rate(options(steps=20, **changes), step) for step in range(20)]

    schedules = torch.optim.lr_scheduler
    cosine = torchs(lambda o: schedules.CosineAnnealingLR(o, 20, eta_min=0.05))
    assert ours(schedule="cosine", final=0.05) == pytest.approx(cosine, rel=1e-9)
    linear = torchs(lambda o: schedules.LinearLR(o, 1.0, 0.1, total_iters=20))
    assert ours(schedule="linear", final=0.1) == pytest.approx(linear, rel=1e-9)
    assert ours(schedule="constant", warmup=0.2) == [0.25, 0.5, 0.75, *[1.0] * 17]
    assert ours(schedule="linear", warmup=0.5)[9:12] == pytest.approx([1.0, 1.0, 0.9])


def test_update_rules() -> None:
    """By hand: signed steps; RMSprop, whose mean of squares begins at a tenth of one; AdamW's decay, (1 -
    rate decay) before the step; a gradient shortened to its norm.
    """

    def moved(gradient: Tensor, **changes: Any) -> tuple[Tensor, Tensor]:
        p = nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))
        chosen = options(rates={"rounding": 0.25}, schedule="constant", **changes)
        mover = Mover({"rounding": [p]}, chosen)
        torch.autograd.backward((p * gradient).sum())
        mover.shape()
        mover.move()
        assert p.grad is not None
        return p.detach(), p.grad

    gradient = torch.tensor([30.0, -40.0, 0.0])
    assert moved(gradient, optimizer="sign")[0].tolist() == [1.75, -0.75, 0.5]
    assert moved(gradient, optimizer="rmsprop")[0].tolist() == pytest.approx(
        [2.0 - 0.25 / 0.1**0.5, -1.0 + 0.25 / 0.1**0.5, 0.5], rel=1e-5
    )
    adamw = moved(gradient, optimizer="adamw", decay=0.1)[0]
    torch.testing.assert_close(adamw, torch.tensor([2.0, -1.0, 0.5]) * (1 - 0.025) - 0.25 * gradient.sign())
    torch.testing.assert_close(moved(gradient, max_norm=5.0)[1], gradient / 10)
    assert torch.equal(moved(gradient, max_norm=51.0)[1], gradient)


@pytest.mark.parametrize("beside", ["norms", "biases"])
def test_a_transform_and_what_it_is_folded_into_dont_learn_together(beside: str) -> None:
    with pytest.raises(SchemeError, match="folds what it learns into norms and biases; leave norms and biases out"):
        make_reconstruction("mse", {"block": "let", "weights": "clip", beside: True})


def test_mixed_inputs() -> None:
    given, exact = {"a": torch.zeros(8, 100, 50), "b": torch.zeros(2)}, {"a": torch.ones(8, 100, 50)}

    def draw(share: float, whole: bool = False, seed: int = 0) -> Tensor:
        return mixed(given, exact, share, whole, torch.Generator().manual_seed(seed))["a"]

    assert float(draw(0.3).mean()) == pytest.approx(0.3, abs=0.01)  # 5 sigma of 40,000 draws: 0.011
    assert not draw(0.0).any() and draw(1.0).all()
    assert torch.equal(draw(0.5), draw(0.5)) and not torch.equal(draw(0.5), draw(0.5, seed=1))
    samples = draw(0.5, whole=True).flatten(1).mean(1)
    assert set(samples.tolist()) == {0.0, 1.0}
    assert torch.equal(mixed(given, exact, 0.9, False, torch.Generator())["b"], given["b"])


def test_a_step_is_fed_both_paths_of_its_batch() -> None:
    made = Made()
    for number, _, given in rounds(made.window, options(mix=0.5, steps=BATCHES + 1)):
        (found,) = given.values()
        one, other = (made.given[path][number] for path in ("float", "quantized"))
        assert ((found == one) | (found == other)).all() and 0.2 < float((found == one).float().mean()) < 0.8
    assert [order for path, order in made.read if path == "float"] == made.orders[::2]


VALUES: dict[bool, list[float]] = {True: [], False: []}


class Valued(Mse):
    """Mse that notes what it gave, in training (True) and when judged."""

    def loss(self, output: Tensor, wanted: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
        found = super().loss(output, wanted, mask)
        VALUES[output.requires_grad].append(float(found.detach()))
        return found


def valued(**changes: Any) -> Valued:
    for values in VALUES.values():
        values.clear()
    return Valued(**{"weights": LSQ, "penalty": 0.0, "schedule": "constant", "steps": 30, **changes})


def entry(made: Made) -> dict[str, Any]:
    learned = made.states[0].records["layer"].learned
    assert learned is not None
    (found,) = learned["windows"]
    return dict(found)


def test_the_best_state_that_was_judged_is_kept() -> None:
    """Every third step the whole window is judged as it would be stored, and at the end."""
    made = Made()
    found = reconstruct(made.window, valued(rates={"default": 0.3}, keep="best", every=3))
    means = [sum(VALUES[False][i : i + BATCHES]) / BATCHES for i in range(0, len(VALUES[False]), BATCHES)]
    judged = means[1:-1]  # the first is of the start, the last of what was kept
    assert len(judged) == 10 and found.before == means[0]
    best = min(judged)
    assert found.kept and found.after == means[-1] == best < judged[-1]
    assert entry(made)["kept"] == 3 * (judged.index(best) + 1)
    assert "the best state, of step" in made.states[0].records["layer"].notes[-1]
    last = Made()
    assert reconstruct(last.window, valued(rates={"default": 0.3})).after > found.after


def test_the_best_state_by_the_steps_own_losses() -> None:
    """Each over what its batch lost at the start; the state is the one that had that loss, before the step."""
    made = Made()
    found = reconstruct(made.window, valued(rates={"default": 0.02}, keep="best"))
    first, order = VALUES[False][:BATCHES], [number for round in made.orders for number in round]
    judged = [loss / first[number] for loss, number in zip(VALUES[True], order, strict=True)]
    best = judged.index(min(judged))
    assert found.kept and 0 < best < 29 and entry(made)["kept"] == best
    again = Made()
    reconstruct(again.window, valued(rates={"default": 0.02}, steps=best))
    assert all(torch.equal(a, b) for a, b in zip(made.learned(), again.learned(), strict=True))


def test_penalties_are_in_units_of_the_loss_at_the_start() -> None:
    """A loss a thousandth as large, all else equal, comes to the same: powers of two and signs leave every bit."""

    def learned(factor: float) -> list[Tensor]:
        class Times(Mse):
            def loss(self, output: Tensor, wanted: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
                return factor * super().loss(output, wanted, mask)

        made = Made()
        part = make_part("adaround", {"warmup": 0.0, "strength": 1.0})
        reconstruct(made.window, Times(weights=part, steps=20, optimizer="sign", penalty=1.0, rates={"rounding": 0.1}))
        return made.learned()

    pairs = list(zip(learned(1.0), learned(2.0**-10), strict=True))
    assert pairs and all(torch.equal(one, other) for one, other in pairs)


def test_what_diverges_is_stopped() -> None:
    """At the end of the first round that lost more than so many times the start; the best state before it is kept."""
    lost: list[float] = []

    class Growing(Valued):
        def loss(self, output: Tensor, wanted: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
            found = super().loss(output, wanted, mask)
            if output.requires_grad:
                found = found * 1.2 ** len(lost)
                lost.append(float(found.detach()))
            return found

    made = Made()
    given: dict[str, Any] = {"weights": LSQ, "penalty": 0.0, "steps": 60, "rates": {"default": 1e-3}}
    found = reconstruct(made.window, Growing(**given, diverged=5.0, keep="best", every=4))
    rounds = [sum(lost[i : i + BATCHES]) / BATCHES for i in range(0, len(lost), BATCHES)]
    assert len(lost) % BATCHES == 0 and len(lost) < 60
    assert rounds[-1] > 5 * found.before and all(mean <= 5 * found.before for mean in rounds[:-1])
    said = entry(made)
    assert said["diverged"] and said["steps"] == len(lost) and found.kept
    assert f"it diverged and was stopped at step {len(lost)} of 60" in made.states[0].records["layer"].notes[-1]


def test_what_diverges_goes_back_to_its_best_round() -> None:
    """With keep=last, to the end of the round that lost least; a run of so many steps comes to the same bits."""
    lost: list[float] = []

    class Growing(Valued):
        def loss(self, output: Tensor, wanted: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
            found = super().loss(output, wanted, mask)
            if output.requires_grad:
                found = found * (1.0 if len(lost) < 3 * BATCHES else 1e3)
                lost.append(float(found.detach()))
            return found

    def run(steps: int) -> tuple[Made, Any]:
        lost.clear()
        made = Made()
        given: dict[str, Any] = {"weights": LSQ, "penalty": 0.0, "schedule": "constant", "rates": {"default": 1e-2}}
        return made, reconstruct(made.window, Growing(**given, steps=steps, diverged=50.0))

    made, found = run(60)
    rounds = [sum(lost[i : i + BATCHES]) / BATCHES for i in range(0, len(lost), BATCHES)]
    best = BATCHES * (1 + rounds.index(min(rounds)))
    said = entry(made)
    assert len(lost) == 4 * BATCHES and rounds[-1] > 50 * found.before > rounds[0]
    assert said["diverged"] and said["kept"] == best < len(lost) and found.kept and found.after < found.before
    note = made.states[0].records["layer"].notes[-1]
    assert f"the best state, of step {best} of 20; it diverged and was stopped at step 20 of 60" in note
    again, _ = run(best)
    assert all(torch.equal(a, b) for a, b in zip(made.learned(), again.learned(), strict=True))


def test_a_loss_that_is_no_number_names_the_layer_and_leaves_the_window_as_it_was() -> None:
    made = Made()
    before = made.weights()
    packed = [state.module.get_submodule("layer") for state in made.states]

    class Poisoned(Mse):
        def loss(self, output: Tensor, wanted: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
            if output.requires_grad and made.orders and len(VALUES[True]) == 3:
                (twin,) = twins_of(made.states[1]).values()
                _, part = twin.learned()[0]
                with torch.no_grad():
                    next(part.parameters()).fill_(torch.nan)
                output = made.window.run(*next(iter(made.window.inputs("quantized"))), "quantized")["hidden"]
            VALUES[output.requires_grad].append(0.0)
            return super().loss(output, wanted, mask)

    valued()
    match = r"blocks\.1\.layer gives NaN or Inf, so the loss of window-0000 is nan at step 3; take smaller rates"
    with pytest.raises(LearningError, match=match):
        reconstruct(made.window, Poisoned(weights=LSQ, steps=9, rates={"default": 1e-3}))
    assert [state.module.get_submodule("layer") for state in made.states] == packed
    assert torch.equal(made.weights(), before)
    reconstruct(made.window, options(steps=2))  # and can be learned on again


@pytest.mark.parametrize("huge", [True, False])
def test_an_infinite_loss_of_finite_outputs_names_the_layer_with_the_largest(huge: bool) -> None:
    """If those are large enough to be the reason: their squares overflow."""
    made = Made()

    class Squared(Mse):
        def loss(self, output: Tensor, wanted: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
            found = super().loss(output, wanted, mask)
            if not output.requires_grad:
                return found
            for number, state in enumerate(made.states):
                (twin,) = twins_of(state).values()
                for parameter in twin.learned()[0][1].parameters():
                    parameter.data.fill_(1e20 if huge and number == 1 else 1.0)  # behind autograd's back
            return found * torch.inf

    said = r"^blocks\.1\.layer gives values up to .*e\+2\d, so the" if huge else "^the"
    with pytest.raises(LearningError, match=said + " loss of window-0000 is inf at step 0"):
        reconstruct(made.window, Squared(weights=make_part("block-ap", {}), steps=3))


@pytest.mark.parametrize("targets", [(FLOAT,), (FLOAT, LOCAL)])
def test_targets_are_in_files_where_states_are_spilled(tmp_path: Path, targets: tuple[str, ...]) -> None:
    made = Made()
    with wanted_of(made.window, targets) as kept:
        found = [kept[number] for number in range(BATCHES)]
    made.window.calibration.spill = tmp_path / "hidden.bin.wanted"
    with wanted_of(made.window, targets) as mapped:
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            f"hidden.bin.wanted.{'hidden' if name == FLOAT else name}" for name in targets
        )
        for number, wanted in enumerate(found):
            read = mapped[number]
            assert tuple(read) == targets and all(torch.equal(read[name], wanted[name]) for name in targets)
    assert not list(tmp_path.iterdir())
    layers = [state.float_module("layer") for state in made.states]
    for name, path in zip(targets, ("float", "quantized"), strict=False):
        x = made.given[path][2]
        for layer in layers:
            x = torch.tanh(layer(x))
        assert torch.equal(found[2][name], x)


def test_bfloat16_products_in_training_alone() -> None:
    """The same numbers twice, others than in float32, and everything learned and judged stays float32."""
    seen: list[torch.dtype] = []

    class Noted(Mse):
        def loss(self, output: Tensor, wanted: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
            seen.append(output.dtype)
            return super().loss(output, wanted, mask)

    def learned(**changes: Any) -> tuple[list[Tensor], dict[str, Any]]:
        made = Made()
        given: dict[str, Any] = {"weights": LSQ, "steps": 5, "rates": {"default": 1e-3}, "penalty": 0.0}
        reconstruct(made.window, Noted(**given, **changes))
        return made.learned(), entry(made)

    plain, said = learned()
    assert "precision" not in said and set(seen) == {torch.float32}
    seen.clear()
    one, said = learned(precision="bfloat16")
    assert said["precision"] == "bfloat16"
    assert seen == [torch.float32] * BATCHES + [torch.bfloat16] * 5 + [torch.float32] * BATCHES
    other, _ = learned(precision="bfloat16")
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, plain, strict=True))
    assert all(p.dtype == torch.float32 for p in one)


def test_what_learning_did_is_told_as_data() -> None:
    """Shares and ratios by hand, of roundings that AdaRound moved and of scales that LSQ did."""
    made = Made()
    reconstruct(made.window, options(steps=60, rates={"rounding": 0.05}))
    weight = made.states[0].get("layer.weight")
    for state in made.states:
        settle_twins(state)
    told = made.states[0].records["layer"].learned
    assert told is not None
    moved = (made.weights()[0] != Quantizer(LINE).fake_quantize(weight)).float().mean()
    assert 0 < float(moved) < 0.5 and told["left_nearest"] == pytest.approx(float(moved), rel=1e-3)
    assert told["scales"] == [1.0, 1.0, 1.0] and told["input_scales"] == [1.0, 1.0, 1.0]
    (window,) = told["windows"]
    assert window["window"] == "window-0000" and window["blocks"] == 2 and window["steps"] == 60
    assert window["kept"] == "last" and not window["diverged"]
    assert window["after"] < window["before"] and 20 <= len(window["curve"]) <= POINTS
    second = made.states[1].records["layer"].learned
    assert second is not None and "curve" not in second["windows"][0]  # once a window

    made = Made(blocks=1)
    reconstruct(made.window, options(weights=LSQ, inputs=LSQ, steps=20, rates={"default": 1e-3}))
    (state,) = made.states
    was = Quantizer(LINE).fit(state.get("layer.weight")).scale
    began = state.records["layer"].inputs[1]
    settle_twins(state)
    told = state.records["layer"].learned
    layer: Any = state.module.get_submodule("layer")
    ratio = torch.as_tensor(layer.weight.qtensor().params.scale) / torch.as_tensor(was)
    assert told is not None and told["left_nearest"] == 0
    middle = ratio.flatten().sort().values[3]
    wanted = [float(v) for v in (ratio.min(), middle, ratio.max())]
    assert told["scales"] == pytest.approx(wanted, rel=1e-3) and wanted[0] < wanted[2]
    assert began is not None and told["input_scales"][0] == pytest.approx(
        float(layer.inputs.params().scale / began.scale), rel=1e-3
    )


def test_a_curve_is_a_few_dozen_means() -> None:
    assert curve([3.0, 1.0]) == [[0, 3.0], [1, 1.0]]
    found = curve([float(i % 2) for i in range(2000)])
    assert len(found) == POINTS and {value for _, value in found} == {0.5}
    assert [step for step, _ in found[:2]] == [24.5, 74.5]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "constant", "final": 0.1}, "schedule=constant doesn't fall"),
        ({"decay": 0.1}, "decay=0.1 is for optimizer=adamw; adam has none"),
        ({"mix": 0.5, "feed": "float"}, "mix=0.5 .* needs feed=quantized"),
        ({"mix": 1.5}, "mix is a share, 0 to 1; got 1.5"),
        ({"warmup": -0.1}, "warmup is a share"),
        ({"every": 3}, "every=3 is how often keep=best looks"),
        ({"keep": "best"}, "adaround trains with weights between .* give every=N"),
        ({"max_norm": 0.0}, "max_norm=0 would leave no gradient"),
        ({"diverged": -1.0}, "diverged is 0 or more"),
        ({"mix_by": "sample"}, "mix=0 mixes none"),
        ({"optimizer": "sign", "max_norm": 1.0}, "optimizer=sign takes the signs alone"),
        ({"rates": {"rounding": 1e38}}, "rates: rounding is 1e\\+38; .* at most 1e\\+06"),
    ],
)
def test_options_that_would_do_nothing_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SchemeError, match=said):
        options(**changes)
