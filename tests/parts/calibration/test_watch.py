"""What solvers are shown of a layer's inputs."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from nybble.calibration.block import BlockState
from nybble.calibration.groups import trace_groups
from nybble.calibration.statistics import InputSample, Range
from nybble.calibration.trace import HIDDEN, BlockCall
from nybble.calibration.watch import see_block
from nybble.calibration.window import Calibration, Window
from nybble.nn.kinds import kind_of
from nybble.quantizer import Quantizer
from nybble.scheme import Rule
from nybble.solvers import make_solver


def test_moments_are_of_inputs_under_the_scale_that_will_be_stored() -> None:
    """Static inputs: one scale over all batches, also for the quiet one."""
    block = nn.Sequential(nn.Linear(6, 4)).requires_grad_(False)
    kind, inputs = kind_of(block[0]), Quantizer("int4 tensor static")
    assert kind is not None
    rule = Rule(weights=Quantizer("int4 channel"), inputs=inputs)
    target = dataclasses.replace(next(iter(kind.targets("0", block[0]))), rule=rule)
    given = [torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0)) * size for size in (1.0, 20.0)]
    call = BlockCall(index=0, args=(), kwargs={}, keyword=None, start=None)
    calibration = Calibration(
        tokens=12, samples=4, batches=2, device=torch.device("cpu"), dtype=torch.float32, seed=0, config=None
    )
    state = BlockState(block, "", None, [target])
    window = Window([state], calibration, lambda path, order: [([call], {HIDDEN: x}) for x in given], "block-0000")
    seen = see_block(window, "quantized", make_solver("gptq", {}))
    x = torch.cat(given).flatten(0, 1)
    rounded = inputs.fake_quantize(x, inputs.fit(x))
    torch.testing.assert_close(seen.moments["0"].mean("0"), rounded.T @ rounded / 12)


def test_samples_are_spread_evenly_over_batches() -> None:
    """Every third of ten tokens, whatever pieces they come in; never more than were asked for."""
    x = torch.arange(20.0).reshape(10, 2)
    for sizes in ([10], [1] * 10, [2, 3, 4, 1], [7, 3]):
        sample = InputSample(2, 10, 4)
        for piece in torch.split(x, sizes):
            sample.add(piece)
        found = sample.all()
        assert found is not None and torch.equal(found, x[::3])
    assert InputSample(2, 10, 20).stride == 1 and InputSample(2, 10, 20).all() is None


def test_a_range_keeps_both_extremes_of_all_batches() -> None:
    seen = Range(12)
    for low, high in ((-8.0, 1.0), (-2.0, 3.0), (-1.0, 2.0)):
        seen.add(torch.tensor([[low, high]]))
    line = Quantizer("uint8 tensor static symmetric=false")
    found, wanted = seen.fit(line, "x"), line.fit(torch.tensor([-8.0, 3.0]))
    assert torch.equal(torch.as_tensor(found.scale), torch.as_tensor(wanted.scale))
    thin = Range(1 << 30)  # every 1024th value is kept: the extremes are not among them
    for low, high in ((-8.0, 1.0), (-2.0, 3.0), (-1.0, 2.0)):
        thin.add(torch.cat([torch.zeros(1), torch.tensor([low, high])])[None])
    thinned = thin.fit(line, "x")
    assert torch.equal(torch.as_tensor(thinned.scale), torch.as_tensor(wanted.scale))


def test_a_tensor_that_was_written_to_is_another_input() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, hidden_states: Tensor) -> Tensor:
            x = hidden_states.clone()
            y = self.a(x) + self.b(x)
            return y + self.c(x.add_(1))  # type: ignore[no-any-return]

    call = BlockCall(index=0, args=(), kwargs={}, keyword=None, start={HIDDEN: torch.randn(1, 2, 4)})
    assert trace_groups(Block(), call).groups == (("a", "b"), ("c",))


def test_every_block_and_phase_draws_its_own() -> None:
    calibration = Calibration(
        tokens=1, samples=1, batches=1, device=torch.device("cpu"), dtype=torch.float32, seed=0, config=None
    )

    def drawn(part: str, phase: str, seed: int = 0) -> float:
        with torch.random.fork_rng(devices=[]):
            Window([], dataclasses.replace(calibration, seed=seed), None, part).seed(phase)
            return float(torch.rand(()))

    assert drawn("block-0000", "see") == drawn("block-0000", "see")
    others = drawn("block-0001", "see"), drawn("block-0000", "solve"), drawn("block-0000", "see", seed=1)
    assert len({drawn("block-0000", "see"), *others}) == 4
