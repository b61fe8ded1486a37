"""Inputs made of what BatchNorms remember, to calibrate without data: ``synthetic[:COUNT]``.

A BatchNorm keeps mean and variance of what it was trained on. From uniform noise, inputs are moved by Adam until what
comes to every BatchNorm has about these: ZeroQ (Cai et al. 2020, arXiv:2001.00281) for images; with the divergence of
Gaussians as distance, Q-ASR (Kim et al. 2021, arXiv:2103.16827) for speech, whose numbers the defaults are. No labels
are needed, and no weights move.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import DataError, ModelError, UsageError
from nybble.core.seeds import generator
from nybble.nn.in_place import evaluation_mode

WORD = "synthetic"
EPS = 1e-6
_Norm = nn.modules.batchnorm._BatchNorm


def is_synthetic(data: object) -> bool:
    """Whether a SRC asks for inputs that are made: ``synthetic``, ``synthetic:COUNT``."""
    return isinstance(data, str) and data.partition(":")[0] == WORD


def synthetic_count(src: str) -> int | None:
    """How many a SRC asks for; None where it doesn't say.

    Raises:
        UsageError: another count than a whole number above 0.
    """
    found = re.fullmatch(rf"{WORD}(?::([1-9]\d*))?", src)
    if found is None:
        raise UsageError(f"data {src!r}: say {WORD}, or {WORD}:COUNT with a count above 0 ({WORD}:64).")
    return None if found[1] is None else int(found[1])


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """How inputs are made.

    Attributes:
        samples: how many. batch: of them are made together, by statistics over all of them.
        iterations: steps of Adam for each batch. lr: of the first ones; a tenth after 25 without gain, 1e-4 at least.
        spread: inputs begin uniform in -spread .. spread. seed: of these.
    """

    samples: int = 128
    batch: int = 8
    iterations: int = 200
    lr: float = 0.01
    spread: float = 0.3
    seed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class SyntheticSamples:
    """Inputs that were made.

    Attributes:
        inputs: by the model's argument, the main one first, float32. tokens: of the main one, about.
        losses: divergence at the beginning and at the end, mean of the batches. sha256: of the main input.
        seed: they were made with.
    """

    inputs: dict[str, Tensor]
    tokens: int
    losses: tuple[float, float]
    sha256: str
    seed: int
    source: str = WORD

    @property
    def available(self) -> int:
        """All."""
        return len(next(iter(self.inputs.values())))

    def manifest(self) -> dict[str, Any]:
        """What stands beside every number from these inputs."""
        return {
            "source": self.source, "inputs_sha256": self.sha256, "samples": self.available, "seed": self.seed,
            "divergence": list(self.losses),
        }  # fmt: skip


def require_norms(model: nn.Module) -> None:
    """Refuse a model without statistics to go by; its weights may be on the meta device.

    Raises:
        ModelError: says why, and what to give.
    """
    if not _norms(model):
        raise ModelError(
            f"{type(model).__name__} has no BatchNorm, whose means and variances say what its inputs are like, so none "
            "can be synthesised. Give data to calibrate on; a language model makes texts by itself (nybble generate "
            "MODEL --dataset FILE)."
        )


def synthesise(model: nn.Module, example: Mapping[str, Tensor], options: Synthesis | None = None) -> SyntheticSamples:
    """Make inputs.

    Args:
        model: float, on its device; its BatchNorms were trained. It is left as it is.
        example: one sample by argument, the main one, float, first; its values don't matter, the others' are repeated.
        options: how many, how.

    Raises:
        ModelError: no BatchNorms, or their statistics are no numbers. DataError: no float input comes first.
    """
    options = options or Synthesis()
    require_norms(model)
    main = next(iter(example), "")
    if not main or not example[main].is_floating_point():
        raise DataError(f"inputs that are moved by a gradient are float; {main or 'the example'} is not.")
    first, made, losses = next(model.parameters()), list[Tensor](), list[tuple[float, float]]()
    with evaluation_mode(model), _frozen(model):
        for start in range(0, options.samples, options.batch):
            count = min(options.batch, options.samples - start)
            drawn = torch.rand(count, *example[main].shape[1:], generator=generator(options.seed, WORD, str(start)))
            x = ((2 * drawn - 1) * options.spread).to(first.device)
            rest = {n: t.expand(count, *t.shape[1:]).to(first.device) for n, t in example.items() if n != main}
            x, found = _moved(model, main, x, rest, options)
            made.append(x.cpu())
            losses.append(found)
    inputs = torch.cat(made)
    ends = torch.tensor(losses, dtype=torch.float64).mean(0).tolist()
    tokens = inputs.shape[0] * max(1, inputs[0].numel() // inputs.shape[-1])
    digest = hashlib.sha256(inputs.numpy().astype("<f4").tobytes()).hexdigest()
    others = {name: t.expand(len(inputs), *t.shape[1:]).clone() for name, t in example.items() if name != main}
    return SyntheticSamples(
        inputs={main: inputs, **others}, tokens=tokens, losses=(ends[0], ends[1]), sha256=digest, seed=options.seed
    )


def _moved(
    model: nn.Module, main: str, x: Tensor, rest: Mapping[str, Tensor], options: Synthesis
) -> tuple[Tensor, tuple[float, float]]:
    """One batch after its steps, and its divergence before and after them."""
    x = x.clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=options.lr)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, factor=0.1, patience=25, min_lr=1e-4)
    begun = 0.0
    with torch.enable_grad():
        for step in range(options.iterations):
            adam.zero_grad()
            loss = divergence(model, {main: x, **rest})
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            plateau.step(loss.item())
            begun = loss.item() if step == 0 else begun
    with torch.no_grad():
        ended = float(divergence(model, {main: x, **rest}))
    if not (torch.isfinite(x).all() and ended == ended):
        raise ModelError(
            f"inputs synthesised for {type(model).__name__} come to NaN or infinity: look at the statistics of its "
            "BatchNorms."
        )
    return x.detach(), (begun, ended)


def divergence(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """How far what comes to BatchNorms is from what they remember: of all their layers, the sum of their means.

    Args:
        model: in eval mode.
        inputs: what it is called with.
    """
    found = list[Tensor]()

    def see(norm: Any, args: tuple[Any, ...]) -> None:
        x = args[0].float()
        over = [0, *range(2, x.dim())]
        mean, var = x.mean(over), x.var(over, unbiased=True)
        found.append(gaussian_kl(norm.running_mean.float(), norm.running_var.float() + EPS, mean, var + EPS).mean())

    handles = [norm.register_forward_pre_hook(see) for norm in _norms(model)]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found).sum()


def gaussian_kl(mean: Tensor, var: Tensor, found_mean: Tensor, found_var: Tensor) -> Tensor:
    """KL(N(m, v) || N(m', v')) of each element, (log(v'/v) + (v + (m - m')^2) / v' - 1) / 2; primed is what came."""
    return 0.5 * (torch.log(found_var / var) + (var + (mean - found_mean) ** 2) / found_var - 1)


def _norms(model: nn.Module) -> Sequence[nn.Module]:
    return [m for m in model.modules() if isinstance(m, _Norm) and m.running_mean is not None]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for weights within."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)
