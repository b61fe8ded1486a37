"""Distillation into scales: codes stay, and scales (norms, biases) of the whole network learn what the float one says.

    min over scales   E_x KL( softmax(z_float(x) / T) || softmax(z(x) / T) ) T^2        W_hat = s (q - zero), q fixed

Every method before it looks at a block at a time; what blocks do to each other's errors shows at the logits alone. The
scales are one number in 16, 32 or 64, already in the file, and have room: none is larger after it.

``loss: kl`` is distillation from the float network's logits (Hinton et al. 2015, arXiv:1503.02531), which needs no
label, as MLX's DWQ does it, and NVIDIA's QAD, which trains weights too; with ``top_k`` the float network is run once,
its k likeliest classes are kept and all others count as one, so that it needn't be in memory beside the quantized one.
``loss: nll``, the next token of the data, is the end-to-end phase of EfficientQAT (E2E-QP; Chen et al. 2024,
arXiv:2407.11062, section 3.3). ``loss: mse`` compares whatever a model gives, over its power: hidden states too.

Scales of any stored kind: 16 bits, a power of two, E4M3 under another scale (which stays). Of powers of two the
logarithms learn, ten octaves at a rate of 1: 0.001 is the half octave to the next power in 50 steps, where a share of
the scale would stay where it is. The forward uses what would be stored, with the gradient straight through
(:mod:`nybble.learned.frozen_codes`), and so what is judged is what the file will hold. Activation quantizers are in
place, with the gradient straight through where nothing is clipped.

Some samples are held back. The state that is kept is the one that loses least on these, that of the start among them:
nothing gets worse there. Memory: the blocks' inputs of one forward, logits, dense weights once a step (of one block
where all would be too much); beside the quantized network and the float one.

Where we differ: Adam, and rates as shares of a tensor's mean magnitude (``relative``), so that one serves layers and
formats of all sizes; EfficientQAT's are absolute, and its gradients are cut at 0.3 (``max_norm``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn

from nybble.core.errors import DataError, ModelError, SchemeError
from nybble.core.progress import Progress
from nybble.core.seeds import derive_seed, generator
from nybble.nn.learned_norm import is_norm
from nybble.training.learners import Learners, checkpointed
from nybble.training.steps import Finish, Finished, Student
from nybble.training.steps._distillation import Distillation
from nybble.training.steps._teaching import Teaching, at_once

KINDS = ("scales", "norms", "biases")


@dataclass(frozen=True, kw_only=True)
class Distill(Finish):
    """Options of the method.

    Attributes:
        what: of ``scales`` (and offsets), ``norms`` (weights and biases of normalisation layers) and ``biases`` of
            quantized layers, what learns.
        loss: ``kl`` to the float network's logits, ``nll`` of the data's next tokens, or ``mse`` of what the model
            gives; ``auto`` is the first where a model gives logits of tokens, else the last.
        temperature: of ``kl``'s distributions. top_k: how many of the float network's logits are kept for each row, of
            one run of it; 0: all, in a run at every step unless they are kept (``logits_gb``).
        steps: of the optimizer; 0 turns the step off.
        rates: learning rate by what learns, and ``default`` for the rest.
        relative: rates are shares of each tensor's mean magnitude.
        warmup: the share of the steps over which rates rise. final: the share of a rate that it falls to, as half a
            cosine.
        max_norm: longer gradients, all together, are shortened to it.
        batch: samples a step. micro: samples of them in one forward (0: as many as give up to a gigabyte of logits);
            gradients add up.
        held: the share of the samples that is held back, one at least. every: steps between two looks at these.
        dense_gb: gigabytes that the dense weights of all layers, and the gradients to them, may take together; they
            are then made once a step, and gradients of its forwards add up in the weights' dtype. In a larger network
            they are made in every forward, for a block at a time.
        logits_gb: gigabytes that what the float network gives to all samples may take on the device; it is run once
            then, and let go of. What takes no more than the float network itself is kept in any case.
        patience: looks without a gain after which it ends; 0: never.
        precision: ``bfloat16`` computes the products of a float32 model's training steps in it; ``model`` leaves them.
        samples: how many there are, of a SRC that has as many; 0: those of the calibration.
        optional: leave the step out, with a line that says why, where it can't be done (nothing to learn, a single
            sample, too little memory), or where dense weights don't fit ``dense_gb``: it would take longer than all
            that comes before it.
    """

    what: tuple[Literal["scales", "norms", "biases"], ...] = ("scales",)
    loss: Literal["kl", "nll", "mse", "auto"] = "kl"
    temperature: float = 1.0
    top_k: int = 0
    steps: int = 200
    rates: Mapping[str, float] = field(default_factory=dict)
    relative: bool = True
    warmup: float = 0.05
    final: float = 0.05
    max_norm: float | None = None
    batch: int = 8
    micro: int = 0
    held: float = 0.125
    dense_gb: float = 16.0
    logits_gb: float = 0.0
    every: int = 20
    patience: int = 0
    precision: Literal["model", "bfloat16"] = "model"
    samples: int = 0
    optional: bool = False

    def __post_init__(self) -> None:
        if not self.what or len(set(self.what)) != len(self.what):
            raise SchemeError(f"distill: what={list(self.what)} names each of {', '.join(KINDS)} once, one at least.")
        for name in ("batch", "every"):
            if getattr(self, name) < 1:
                raise SchemeError(f"distill: {name}={getattr(self, name)} is 1 or more.")
        for name in ("micro", "steps", "top_k", "patience", "samples"):
            if getattr(self, name) < 0:
                raise SchemeError(f"distill: {name}={getattr(self, name)} is 0 or more.")
        if self.micro and self.batch % self.micro and self.micro < self.batch:
            raise SchemeError(f"distill: batch={self.batch} is no multiple of micro={self.micro} samples.")
        if not (0 <= self.warmup <= 1 and 0 <= self.final <= 1 and 0 < self.held < 1):
            raise SchemeError(
                f"distill: warmup={self.warmup:g}, final={self.final:g}, held={self.held:g} are shares; held is "
                "neither 0 nor 1."
            )
        for name in ("dense_gb", "logits_gb"):
            if getattr(self, name) < 0:
                raise SchemeError(f"distill: {name}={getattr(self, name):g} is 0 or more gigabytes.")
        self._check_loss()

    def _check_loss(self) -> None:
        if self.temperature <= 0 or (self.max_norm is not None and self.max_norm <= 0):
            raise SchemeError(f"distill: temperature={self.temperature:g}, max_norm={self.max_norm} are more than 0.")
        if self.loss not in ("kl", "auto") and (self.temperature != 1 or self.top_k):
            raise SchemeError(f"distill: temperature and top_k are for loss: kl; loss={self.loss} has neither.")
        for name, rate in self.rates.items():
            if name != "default" and name not in self.what:
                raise SchemeError(f"distill: rates names {name!r}; what learns is {', '.join(self.what)}, or default.")
            if rate < 0:
                raise SchemeError(f"distill: rates: {name} is {rate:g}; a learning rate is 0 or more.")

    @property
    def idle(self) -> bool:  # noqa: D102
        return not self.steps

    def working_bytes(self, elements: int, dtype: torch.dtype) -> int:
        """The float network, codes and their unpacked copy, scales of 16 weights each with moments, what is kept."""
        dense = 2 * elements * dtype.itemsize
        kept = int(1e9 * self.logits_gb) + (0 if self.excess(elements, dtype) else dense)
        return elements * ((0 if self.loss == "nll" else dtype.itemsize) + 3) + kept

    def passes(self, samples: int) -> float:
        """Of steps, in whose backward blocks are run once more, and of looks; each beside the float network."""
        looks, held = 1 + -(-self.steps // self.every), max(1, round(self.held * samples))
        beside = 0 if self.loss == "nll" else 1  # less where what it gives is kept
        return (4 + beside) * self.steps * self.batch + (1 + beside) * looks * held

    def excess(self, elements: int, dtype: torch.dtype) -> str:  # noqa: D102
        dense = 2 * elements * dtype.itemsize  # and their gradients
        return (
            "the model's dense weights and gradients don't fit the step's dense_gb"
            if dense > 1e9 * self.dense_gb
            else ""
        )

    def check(  # noqa: D102
        self, model: nn.Module, layers: Sequence[nn.Module], samples: int | None, token_ids: bool
    ) -> None:
        if self.loss == "nll" and not token_ids:
            raise ModelError(
                f"distill: loss=nll is the likelihood of the next token, which {type(model).__name__} doesn't tell; "
                "use loss: kl, for logits against the float network's, or mse, for any output."
            )
        if samples is not None:
            self._held_of(samples)
        some = {
            "scales": bool(layers),
            "norms": any(map(is_norm, model.modules())),
            "biases": any(getattr(layer, "bias", None) is not None for layer in layers),
        }
        if not any(some[kind] for kind in self.what):
            raise _nothing(self.what)

    def _held_of(self, samples: int) -> int:
        """How many are held back."""
        kept = max(1, round(self.held * samples))
        if kept >= samples:
            raise DataError(
                f"distill trains on some samples and is judged on others, and there is {samples} in all; give two or "
                "more."
            )
        return kept

    def run(self, student: Student, progress: Progress) -> Finished:  # noqa: D102
        order = torch.randperm(student.samples, generator=generator(student.seed, "distill", "held")).tolist()
        kept = self._held_of(student.samples)
        torch.manual_seed(derive_seed(student.seed, "distill"))  # stochastic roundings of activations draw from it
        loss, size = at_once(student, self.batch)
        options = replace(self, loss=loss if self.loss == "auto" else self.loss, micro=self.micro or size)
        lessons = Teaching.of(student, options)
        learners = Learners(student.model, student.weights, self.what)
        try:
            if not learners.parameters():
                raise _nothing(self.what)
            with torch.enable_grad(), checkpointed(student.model, student.blocks):
                entry = Distillation(options, student, lessons, learners, progress).train(order[kept:], order[:kept])
        except BaseException:
            learners.undo()
            raise
        return Finished(entry=entry, scales=learners.settle())


def _nothing(what: Sequence[str]) -> SchemeError:
    return SchemeError(
        f"distill finds nothing to learn: no weight has {' or '.join(what)} that it can move; name others of "
        f"{', '.join(KINDS)}, or leave the step out."
    )


PART = Distill
