"""Rotations that are learned, of the residual stream and inside the heads, for the network with its quantizers.

    R  =  the orthogonal matrix that loses least:    min  L(network(R), rounded),    R R^T = I

Liu et al. 2024, "SpinQuant: LLM Quantization with Learned Rotations", arXiv:2405.16406. R1 turns the residual stream
(as the transform ``rotate`` does with a fixed matrix; both are folded alike, and nothing is left at run time), R2 of
each attention turns its values inside their heads (``hadamard``). Both begin there, and descend on the orthogonal
matrices (:class:`nybble.core.stiefel.CayleyDescent`) on the loss of the whole network, whose layers round their inputs
and, with ``rounds: all``, their weights as the scheme says, with the gradient straight through. The paper learns for
rounded activations alone where GPTQ follows, which repairs what rounding weights does: ``rounds: activations``.

With ``block`` each block of neighbours has a rotation of its own, which is what formats with short blocks (MX: 32) gain
from. Learned before the first block is quantized, from the float network as it came (``train`` steps done), whatever
transforms there are beside it; any solver, format and granularity may follow.

Where we differ: a rotation for every key/value head, not one for all heads of a layer; ``loss: kl`` (of OSTQuant, Hu et
al. 2025, arXiv:2501.13987: what the float network says of the next token, all of it and not its thousand likeliest) by
default, as its gradient is that of rounding alone, where the next token's is mostly that of the text; the gradient goes
through the ranges of weights and activations too; steps are Cayley ADAM's and not SGD's. Five times on the way the
loss of up to 32 samples is taken, and the rotations of the least are kept: never worse there than what they began with.
While it learns, static ranges are those of each batch, and attention's operands, the KV cache and inputs of fused
experts stay in float. Of the paper's two
rotations at run time R4 is ``online-rotation``, learned with if it stands in the recipe; R3 is not here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nybble.calibration.block import BlockState
from nybble.calibration.finite import require_number
from nybble.calibration.lessons import Network
from nybble.calibration.mixing import Places, mixing
from nybble.calibration.window import Window
from nybble.core.curve import curve, short
from nybble.core.errors import ModelError, SchemeError, within
from nybble.core.keeping import Best
from nybble.core.orthogonal import head_rotations, rotation
from nybble.core.stiefel import CayleyDescent, block_diagonal
from nybble.learned import ACTIVATIONS, WEIGHTS
from nybble.learned.ste import Ste
from nybble.models.adapter import Adapter, LinearFold
from nybble.nn.kinds import matrix_at
from nybble.scheme import Rule
from nybble.transforms import Learnt, Rewrite
from nybble.transforms._rounded import Rewrites, RoundedNetwork
from nybble.transforms.rotate import Rotate

STREAM = "stream"
_LOOKS, _JUDGED = 5, 32
"""How often the loss of some samples is looked at, and of how many."""


@dataclass(frozen=True, kw_only=True)
class LearnedRotation(Rotate):
    """Options of the method.

    Attributes:
        matrix: what R1 begins with: ``hadamard``, where the width has one, or ``orthogonal``: random, by the seed.
        block: channels of the stream that are rotated among themselves; 0 rotates all of them together.
        signs: multiply the channels by random signs first.
        stream: whether the residual stream is rotated. heads: whether the channels inside the heads are.
        head_block: channels of a head that are rotated among themselves; 0 means all that a power of two divides at
            the start, and learns to rotate all.
        steps: of the descent; 0 leaves the rotations that it begins with.
        batch: samples a step. samples: how many there are to draw from, of a SRC that has as many; 0: those of the
            calibration.
        rate: radians that a channel turns in a step where the gradients so far agree, falling in a line to 0; other
            than the paper's 1.5, which is per unit of gradient.
        momentum: share of the directions before that is kept.
        rounds: ``all``, or the ``activations`` alone, for weights that a solver rounds well.
        loss: ``kl``, how far what is said of the next token diverges from the float network; ``next-token``, the
            text's own; ``output``, the difference of the two outputs; ``auto``: the first where a model tells a next
            token, else the last.
    """

    stream: bool = True
    heads: bool = True
    head_block: int = 0
    steps: int = 100
    batch: int = 4
    samples: int = 0
    rate: float = 0.05
    momentum: float = 0.9
    rounds: Literal["all", "activations"] = "all"
    loss: Literal["auto", "kl", "next-token", "output"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.stream or self.heads):
            raise SchemeError("learned-rotation: stream and heads are both off, which leaves nothing to rotate.")
        if self.head_block < 0 or self.steps < 0 or self.samples < 0 or self.batch < 1:
            raise SchemeError(
                f"learned-rotation: head_block={self.head_block}, steps={self.steps}, samples={self.samples}, batch="
                f"{self.batch}: a batch has 1 sample or more, the others are 0 or more."
            )
        if not 0 < self.rate <= 1 or not 0 <= self.momentum < 1:
            raise SchemeError(
                f"learned-rotation: rate={self.rate:g} is an angle a step, in radians: above 0 and up to 1 (usual: "
                f"0.05); momentum={self.momentum:g} is from 0 to below 1."
            )

    @property
    def learns(self) -> bool:  # type: ignore[override]
        """Whether there is a step to take."""
        return self.steps > 0

    @property
    def moves_stream(self) -> bool:  # type: ignore[override]
        """Whether the hidden states between blocks are others afterwards."""
        return self.stream

    # ------------------------------------------------------------------------------------------------ what it takes
    def works_on(self, adapter: Adapter, block: Any, config: Any) -> bool:  # noqa: D102
        return (self.stream and super().works_on(adapter, block, config)) or bool(self._folds(adapter, block, config))

    def _folds(self, adapter: Adapter, block: Any, config: Any) -> list[LinearFold]:
        return [fold for fold in adapter.linear_folds_of(block, config) if fold.heads] if self.heads else []

    def check(self, name: str, adapter: Adapter, model: Any) -> None:  # noqa: D102
        if self.loss in ("next-token", "kl") and model.get_output_embeddings() is None:
            raise ModelError(
                f"transform {name!r}: loss={self.loss} is about the next token, and this model tells none; use output."
            )
        reasons = self._reasons(adapter, model) if self.stream else []
        inside = any(self._folds(adapter, block, model.config) for block in adapter.blocks_of(model))
        if reasons and inside:
            raise ModelError(
                f"transform {name!r} can't rotate the residual stream of this model: {'; '.join(reasons)}. "
                "With stream: false it learns the rotations inside the heads alone."
            )
        if self.stream:
            super().check(name, adapter, model)
        elif not inside:
            raise ModelError(
                f"transform {name!r} finds no values of attention to rotate in this model: "
                f"{'; '.join(adapter.limits_of(model.config)) or 'its adapter lists no such pair'}."
            )
        for path, block in zip(adapter.block_names(model), adapter.blocks_of(model), strict=True):
            for fold in self._folds(adapter, block, model.config):
                _begin_heads(BlockState(block, path), fold, model.config, self, 0)

    def check_rules(self, rules: Sequence[Rule]) -> None:  # noqa: D102
        acts = [q for rule in rules for q in (rule.inputs, rule.outputs) if q is not None]
        weights = [rule.weights for rule in rules if rule.weights is not None] if self.rounds == "all" else []
        if self.learns and not (acts or weights):
            raise SchemeError(
                f"learned-rotation: with rounds={self.rounds} nothing of this scheme is rounded while it learns; give "
                "activations a quantizer, or say rounds: all."
            )
        for quantizers, side in ((acts, ACTIVATIONS), (weights, WEIGHTS)):
            for quantizer in quantizers:
                with within("learned-rotation"):
                    Ste().check(quantizer.replace(static=False), side)

    def prepare(self, adapter: Adapter, model: Any) -> None:  # noqa: D102
        if self.stream:
            super().prepare(adapter, model)

    # ------------------------------------------------------------------------------------------------ what it does
    def outside(self, adapter: Adapter, model: Any, seed: int) -> Iterator[Rewrite]:  # noqa: D102
        if self.stream:
            yield from super().outside(adapter, model, seed)

    def rewrites(self, window: Window, adapter: Adapter, path: str) -> Iterator[Rewrite]:  # noqa: D102
        state, calibration = window.block, window.calibration
        if self.stream:
            yield from super().rewrites(window, adapter, path)
        for fold in self._folds(adapter, state.module, calibration.config):
            begun = _begin_heads(state, fold, calibration.config, self, calibration.seed)
            found = self.found.get(f"{state.prefix}{fold.first}", begun.rotation).to(calibration.device)
            yield mixing(state, fold, begun.places, {"rotation": _whole(found, len(begun.places.rows))})

    def _rotation(self, width: int, seed: int, device: torch.device) -> Tensor:
        if STREAM in self.found:
            return block_diagonal(self.found[STREAM]).to(device)
        return super()._rotation(width, seed, device)

    # ------------------------------------------------------------------------------------------------ how it learns
    @property
    def found(self) -> Mapping[str, Tensor]:
        """What was learned, float32 [count, n, n]: of the ``stream``, and by the full names of values' layers."""
        known: Mapping[str, Tensor] = self.__dict__.get("_found", {})
        return known

    def taught(self, found: Mapping[str, Tensor]) -> LearnedRotation:  # noqa: D102
        made = copy.copy(self)
        object.__setattr__(made, "_found", dict(found))
        return made

    def learning_bytes(self, elements: int, largest: int) -> int:
        """The float32 network, a block of it rewritten, rounded and with gradients (10 times), as much for tables."""
        return 4 * elements + 40 * largest

    def learning_passes(self, samples: int) -> float:
        """Of the rounded network and the float one, at each step and each look."""
        return 2 * (1 + _LOOKS) * min(samples, _JUDGED) + 5 * self.steps * self.batch

    def learn(self, network: Network) -> Learnt:  # noqa: D102
        self.prepare(network.adapter, network.model)
        leaves: dict[str, Tensor] = {}
        rounded = RoundedNetwork(network, lambda state: self._learning(state, network, leaves), self.rounds == "all")
        order = network.order(self.steps * self.batch, "learned-rotation", "samples")
        descent = CayleyDescent([*leaves.values()], self.momentum)
        divergence = self.loss == "kl" or (self.loss == "auto" and network.speaks)

        def loss_of(numbers: list[int]) -> Tensor:
            inputs, real = network.batch(numbers)
            return network.judged(rounded(inputs), inputs, real, divergence=divergence)

        def look(step: int) -> float:
            now = self._all(loss_of, min(network.samples, _JUDGED))
            best.see(now, step)
            return now

        best, losses, every = Best([*leaves.values()]), list[float](), max(1, self.steps // _LOOKS)
        before = look(0)
        for step in range(self.steps):
            with torch.enable_grad():
                loss = loss_of(order[step * self.batch : (step + 1) * self.batch])
            losses.append(float(loss.detach()))
            require_number(losses[-1], step, "learned-rotation")
            torch.autograd.backward(loss)
            descent.step(self.rate * (1 - step / self.steps))
            if (step + 1) % every == 0 or step + 1 == self.steps:
                look(step + 1)
        best.restore()
        kept = "start" if not best.step else "last" if best.step == self.steps else best.step
        entry = {
            "window": "network", "blocks": len(rounded.blocks) - 1, "loss": "learned-rotation",
            "before": short(before), "after": short(best.judged), "steps": self.steps, "kept": kept,
            "diverged": False, "curve": curve(losses),
        }  # fmt: skip
        return Learnt(
            parameters={name: leaf.detach().to("cpu", copy=True) for name, leaf in leaves.items()}, entry=entry
        )

    @torch.no_grad()
    def _all(self, loss_of: Callable[[list[int]], Tensor], samples: int) -> float:
        """The loss of the first samples, a mean over batches; what is kept at the end is the least of these."""
        starts = range(0, samples, self.batch)
        found = [float(loss_of(list(range(start, min(start + self.batch, samples))))) for start in starts]
        return sum(found) / len(found)

    def _learning(self, state: BlockState, network: Network, leaves: dict[str, Tensor]) -> Rewrites:
        """The rewrites of a block (or of what is in none), under rotations that are learned: ``leaves``, by name."""
        adapter, model, seed = network.adapter, network.model, network.seed
        config: Any = model.config
        device = next(model.parameters()).device
        found: list[tuple[Rewrite, Any]] = []
        if self.stream:
            if STREAM not in leaves:
                leaves[STREAM] = _leaf(self._blocks(int(config.hidden_size), seed), device)
            whole = self.outside(adapter, model, seed) if not state.name else self.turning(state, adapter, config, {})
            found += [(rewrite, lambda: {"rotation": block_diagonal(leaves[STREAM])}) for rewrite in whole]
        if not state.name:
            return found
        for fold in self._folds(adapter, state.module, config):
            begun, name = _begin_heads(state, fold, config, self, seed), f"{state.prefix}{fold.first}"
            leaves[name] = _leaf(begun.rotation, device)
            count = len(begun.places.rows)

            def now(name: str = name, count: int = count) -> dict[str, Tensor]:
                return {"rotation": _whole(leaves[name], count)}

            found.append((mixing(state, fold, begun.places, {}), now))
        return found

    def _blocks(self, width: int, seed: int) -> Tensor:
        """What R1 begins with, [blocks, n, n]: that of ``rotate`` by the same options."""
        whole, size = rotation(width, self.matrix, self.block, self.signs, seed), self.block or width
        return torch.stack([whole[i : i + size, i : i + size] for i in range(0, width, size)])


@dataclass(frozen=True, kw_only=True)
class _Heads:
    """Where an attention's rotations are, and what they begin with: [heads times parts, n, n]."""

    places: Places
    rotation: Tensor


def _begin_heads(state: BlockState, fold: LinearFold, config: Any, options: LearnedRotation, seed: int) -> _Heads:
    matrix = matrix_at(state.module, fold.second, state.raw)
    places = Places.of(fold, matrix.shape[-1], config, "cpu" if matrix.is_meta else matrix.device)
    heads, width = places.rows.shape
    whole = head_rotations(heads, width, options.head_block, options.signs, seed, "head_block")
    size = options.head_block or width
    parts = [whole[:, i : i + size, i : i + size] for i in range(0, width, size)]
    return _Heads(places=places, rotation=torch.stack(parts, 1).flatten(0, 1))


def _whole(parts: Tensor, heads: int) -> Tensor:
    """[heads times parts, n, n] as [heads, width, width]."""
    return block_diagonal(parts.view(heads, -1, *parts.shape[1:]))


def _leaf(start: Tensor, device: torch.device) -> Tensor:
    return start.to(device, torch.float32, copy=True).requires_grad_(True)


PART = LearnedRotation
