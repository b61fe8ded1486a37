"""Restorative LoRA: thin matrices beside the quantized weights learn to bring the network back; both become one weight.

    W' = dequantize(Q(W)) + alpha / rank B A            trained on the next token, Q(W) frozen

Quantization preprocessing of PTQ1.61 (Zhao et al. 2025, arXiv:2502.13179): the network is quantized once by the
recipe's own solver and reconstructions; adapters train on top; what they learned is merged into the *dequantized*
weights (they were trained beside these, not beside the float ones), and the result, a worse float network whose rows
are closer to a few values, is quantized from the start. Nothing is added to the file.

The defaults are the paper's: rank 64, alpha 16, dropout 0.1, AdamW without decay, rates that rise over 5 % of the steps
and fall as a cosine, no adapter at the attention's output. It takes 10,000 steps of 2 samples, of 20,000 samples; the
recipe ``ptq1.61`` takes 2,000 of the calibration's, a fifth of that, so that it ends in minutes, and give it
``steps: 10000`` and ``samples: 20000`` for the paper's.

Where we differ: a share of the samples is held back, and the network quantized from the merged weights has to lose less
on these than the one of the first pass; else the float weights are quantized as if there had been no such step. (A gain
beside the first pass's weights says little: what was merged into them is rounded again.) Any layer with one matrix can
have an adapter, convolutions too. Dropout leaves out input features, for all tokens of a step alike, so that adapted
weights stay one matrix. Models that don't tell the next token are trained to give what the float network gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from nybble.calibration.finite import require_number
from nybble.core.errors import SchemeError
from nybble.core.seeds import generator
from nybble.nn.packed import Packed
from nybble.nn.swap import hold_dense
from nybble.scheme import matches
from nybble.training.steps import Preparation, Trainee


class Adapted(Packed):
    """A packed weight plus a product of two thin matrices, which learn.

    Args:
        base: stays as it is.
        rank, alpha: the product counts ``alpha / rank``.
        dropout: the share of input features that a training step leaves out.
        draws: where the start of A, and what is left out, come from; on the CPU.
    """

    def __init__(self, base: Packed, rank: int, alpha: float, dropout: float, draws: torch.Generator) -> None:
        super().__init__(base.qtensor(), base.dtype)
        rows, columns = self.shape
        self.dropout, self.draws, self.scaling = dropout, draws, alpha / rank
        bound = 1 / math.sqrt(columns)  # kaiming_uniform_(a=sqrt(5)), as LoRA's A begins
        first = torch.empty(rank, columns, dtype=torch.float32).uniform_(-bound, bound, generator=draws)
        self.a = nn.Parameter(first.to(base.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, dtype=torch.float32, device=base.device))

    def product(self, keep: Tensor | None = None) -> Tensor:
        """float32 [out, in]; ``keep``: [in], what is left of A's columns."""
        with torch.autocast(self.a.device.type, enabled=False):
            return self.scaling * (self.b @ (self.a if keep is None else self.a * keep))

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The weight in ``dtype``, with gradients to both matrices."""
        keep = None
        if self.dropout and torch.is_grad_enabled():
            drawn = torch.rand(self.shape[1], generator=self.draws, dtype=torch.float32)
            keep = ((drawn >= self.dropout).float() / (1 - self.dropout)).to(self.a.device)
        return super().forward(dtype) + self.product(keep).to(dtype)

    def merged(self) -> Tensor:
        """float32 [out, in]: what both come to."""
        return self.qtensor().dequantize() + self.product().detach()


@dataclass(frozen=True, kw_only=True)
class RestorativeLora(Preparation):
    """Options of the method.

    Attributes:
        steps: of the optimizer; 0 turns the step off.
        rank: of the adapters. alpha: their weight times the rank. dropout: the share of inputs that a step leaves out.
        rate: the largest learning rate. warmup: the share of the steps over which it rises.
        batch: samples a step. samples: how many there are to draw from, of a SRC that has as many; 0: those of the
            calibration.
        skip: layers without an adapter: full names, or ``re:`` and a pattern for these.
        held: the share of the samples that is held back, at least one of two or more, to judge a second pass by; 0
            takes what training came to, unjudged.
        loss: ``next-token``, ``output`` (what the float network gives), or ``auto``: the first where a model tells it.
    """

    steps: int = 10_000
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1
    rate: float = 1e-4
    warmup: float = 0.05
    batch: int = 2
    samples: int = 0
    held: float = 0.1
    skip: tuple[str, ...] = (r"re:.*\.(o_proj|out_proj)",)
    loss: Literal["auto", "next-token", "output"] = "auto"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.batch < 1:
            raise SchemeError(f"restorative-lora: rank={self.rank}, batch={self.batch}; both are 1 or more.")
        if self.steps < 0 or self.samples < 0 or self.rate <= 0 or self.alpha <= 0:
            raise SchemeError(
                f"restorative-lora: steps={self.steps}, samples={self.samples}, rate={self.rate:g}, alpha="
                f"{self.alpha:g}: steps and samples are 0 or more, rate and alpha more."
            )
        if not (0 <= self.dropout < 1 and 0 <= self.warmup <= 1 and 0 <= self.held < 1):
            raise SchemeError(
                f"restorative-lora: dropout={self.dropout:g}, warmup={self.warmup:g}, held={self.held:g} are shares: "
                "dropout and held below 1."
            )

    @property
    def idle(self) -> bool:  # noqa: D102
        return not self.steps

    def working_bytes(self, elements: int, dtype: torch.dtype) -> int:
        """A dense copy of every weight in ``dtype``, and of the largest layer's one with its gradient, about."""
        return 3 * elements * dtype.itemsize + elements

    def passes(self, samples: int) -> float:
        """Two looks at what is held back, and the steps."""
        return 2 * round(self.held * samples) + 3 * self.steps * self.batch

    @property
    def judges(self) -> bool:  # noqa: D102
        return self.held > 0

    @torch.no_grad()
    def judge(self, trainee: Trainee) -> float | None:
        """The mean loss of the samples that are held back."""
        _, held = self._parts(trainee)
        if not held:
            return None
        for layer in trainee.layers.values():
            assert isinstance(layer.weight, Packed)
            hold_dense(layer, layer.weight.dtype)
        return sum(float(trainee.loss(*trainee.batch([number]))) for number in held) / len(held)

    def run(self, trainee: Trainee) -> dict[str, Tensor]:  # noqa: D102
        draws = generator(trainee.seed, "restorative-lora")
        adapted: dict[str, Adapted] = {}
        for name, layer in trainee.layers.items():
            if not any(matches(pattern, name, ()) for pattern in self.skip):
                assert isinstance(layer.weight, Packed)
                adapted[name] = Adapted(layer.weight, self.rank, self.alpha, self.dropout, draws)
                layer.weight = adapted[name]
        if not adapted:
            raise SchemeError(f"restorative-lora: skip={', '.join(self.skip)} leaves no quantized layer; name fewer.")
        hold_dense(trainee.model, next(iter(adapted.values())).dtype)  # nothing packed is unpacked anew at every step
        parameters = [p for weight in adapted.values() for p in (weight.a, weight.b)]
        learned, _ = self._parts(trainee)
        with torch.enable_grad():
            self._train(trainee, parameters, learned)
        return {name: weight.merged() for name, weight in adapted.items()}

    def _parts(self, trainee: Trainee) -> tuple[list[int], list[int]]:
        """Numbers of the samples that are trained on, and of those that are held back."""
        if not self.held or trainee.samples < 2:
            return list(range(trainee.samples)), []
        count = min(trainee.samples - 1, max(1, round(self.held * trainee.samples)))
        draws = generator(trainee.seed, "restorative-lora", "held")
        mixed = torch.randperm(trainee.samples, generator=draws).tolist()
        return sorted(mixed[count:]), sorted(mixed[:count])

    def _train(self, trainee: Trainee, parameters: list[nn.Parameter], learned: Sequence[int]) -> None:
        for parameter in trainee.model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=self.rate, weight_decay=0.0)
        draws = generator(trainee.seed, "restorative-lora", "samples")
        order: list[int] = []
        for step in range(self.steps):
            while len(order) < self.batch:
                order += [learned[at] for at in torch.randperm(len(learned), generator=draws).tolist()]
            numbers, order = order[: self.batch], order[self.batch :]
            for group in optimizer.param_groups:
                group["lr"] = self.rate * self._share(step)
            batch = trainee.batch(numbers)
            loss = trainee.loss(*batch)
            again = partial(trainee.loss, *batch)
            require_number(float(loss.detach()), step, "restorative-lora", trainee.layers, again)
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _share(self, step: int) -> float:
        """Of the rate: rises in a line, then falls as half a cosine."""
        rising = self.warmup * self.steps
        if step < rising:
            return (step + 1) / math.ceil(rising)
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, self.steps - rising)))


PART = RestorativeLora
