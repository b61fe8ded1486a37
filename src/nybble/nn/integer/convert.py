"""From a quantized classifier to an integer network: where codes are rounded again, to which scale, and why it fits.

A tensor that quantized layers read is rounded once, to their input's scale, and the identity of a residual block reads
the same codes. A sum has a scale 2^k times finer than what reads it next (k is 8, or less where 32 bits would not do);
each branch is brought there by its own dyadic number and rounded by itself (HAWQ-V3, section 3.2). Layers whose inputs
were calibrated apart are rounded apart. A mean over places is the sum of its codes at a scale that is divided: no
division is left to do, where HAWQ-V3 truncates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError, SchemeError
from nybble.nn.integer import modules
from nybble.nn.integer.accumulators import check_fits, extremes
from nybble.nn.integer.dyadic import LIMIT, Dyadic, Ties
from nybble.nn.integer.entrance import Grid
from nybble.nn.integer.network import IntegerNetwork, Node
from nybble.nn.integer.recorded import ADD, CLIP, FLATTEN, LAYER, MEAN, PAD, POOL, RELU, Step, recorded
from nybble.nn.integer.weights import codes_of
from nybble.nn.layer import QuantLayer

FINER = 8
"""A sum's scale is 2^-8 of its reader's."""
BITS = 32


@dataclass(frozen=True)
class Value:
    """What a node gives.

    Attributes:
        node: its number.
        scale: float64, [1] or [channels].
        low, high: of its codes whatever comes in, int64, [1] or [channels].
    """

    node: int
    scale: Tensor
    low: Tensor
    high: Tensor

    @property
    def ends(self) -> tuple[int, int]:
        """Of all channels."""
        return int(self.low.min()), int(self.high.max())

    def at(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest codes at another scale, rounded by whatever rule."""
        by = self.scale / scale
        return torch.floor(self.low * by).long() - 1, torch.ceil(self.high * by).long() + 1


def integer_network(model: nn.Module, x: Tensor, ties: Ties = "half-up") -> IntegerNetwork:
    """Convert a classifier.

    Args:
        model: its layers quantized, weights with a scale a row, inputs with a calibrated one; BatchNorms folded.
        x: an input as of calibration, [n, channels, height, width], n at least 2.
        ties: of requantizations.

    Raises:
        SchemeError: a layer that has no integer form, or whose sums could overflow. ModelError: a network that does
            something else between its layers.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
    steps = recorded(model, x.to(dtype))
    if not any(step.op == LAYER for step in steps):
        raise ModelError(f"a {type(model).__name__} without quantized layers has no integer form; quantize it first.")
    if steps[-1].op != LAYER:
        raise ModelError(f"the logits are what a {steps[-1].op} gives; integers alone end at a quantized layer's sums.")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    return _Conversion(steps, layers, ties).network()


class _Conversion:
    def __init__(self, steps: Sequence[Step], layers: dict[str, QuantLayer], ties: Ties) -> None:
        self.steps, self.layers, self.ties = steps, layers, ties
        self.readers: list[list[int]] = [[] for _ in steps]
        for at, step in enumerate(steps):
            for read in step.inputs:
                self.readers[read].append(at)
        self.nodes: list[Node] = []
        self.values: dict[int, Value] = {}
        self.rounded: dict[tuple[int, Grid], Value] = {}

    def network(self) -> IntegerNetwork:
        behind = 0
        while len(self.readers[behind]) == 1 and self.steps[self.readers[behind][0]].op == PAD:
            behind = self.readers[behind][0]  # zeros are the code 0 on any grid
        entrance = self._grid_of(behind)
        if entrance is None:
            raise ModelError("nothing but quantized layers can read the input of an integer network.")
        self.values[0] = Value(0, _one(entrance.scale), *_both(entrance))
        for at, step in enumerate(self.steps[1:], 1):
            self.values[at] = self._made(at, step)
        return IntegerNetwork(entrance, self.nodes, self.values[len(self.steps) - 1].scale, self.steps[0].shape)

    def _made(self, at: int, step: Step) -> Value:
        if step.op == LAYER:
            return self._layer(step)
        if step.op == ADD:
            return self._sum(at, step)
        value = self.values[step.inputs[0]]
        if step.op in (RELU, CLIP):
            return self._clipped(value, (0.0, None) if step.op == RELU else step.numbers)
        if step.op == MEAN:
            return self._mean(at, value, *step.numbers)
        kept = {PAD: modules.Pad, POOL: modules.MaxPool, FLATTEN: modules.Flatten}[step.op]
        module = kept(step.numbers) if step.op == PAD else kept(*step.numbers)
        return self._add(module, (value,), step.op, value.scale, value.low.clamp(max=0), value.high.clamp(min=0))

    def _add(
        self, module: nn.Module, reads: Sequence[Value], name: str, scale: Tensor, low: Tensor, high: Tensor
    ) -> Value:
        check_fits(low, high, BITS, name)
        self.nodes.append(Node(module, tuple(value.node for value in reads), name))
        return Value(len(self.nodes), scale, low, high)

    # -------------------------------------------------------------------------------------------- layers
    def _grid_of(self, at: int) -> Grid | None:
        """That of the first quantized layer that reads a step's result as it is."""
        names = [self.steps[reader].layer for reader in self.readers[at] if self.steps[reader].op == LAYER]
        return Grid.of(names[0], self.layers[names[0]].inputs) if names else None

    def _layer(self, step: Step) -> Value:
        name, layer = step.layer, self.layers[step.layer]
        if layer.outputs is not None:
            raise SchemeError(f"{name}: its output is rounded too; integer networks round what enters layers.")
        geometry = getattr(layer, "geometry", None)
        if geometry is not None and geometry.padding_mode != "zeros":
            raise SchemeError(f"{name}: integers alone pad with zeros, not by {geometry.padding_mode}; ignore it.")
        entering = self._at(step.inputs[0], Grid.of(name, layer.inputs), name)
        found = codes_of(name, layer, float(entering.scale))
        low, high = extremes(found.weight, *entering.ends, found.bias)
        product = modules.Product(found.weight, found.bias, geometry)
        return self._add(product, (entering,), name, found.scale, low, high)

    def _at(self, step: int, grid: Grid, name: str) -> Value:
        """A step's result on a layer's grid, rounded at most once."""
        key = step, grid
        value, scale = self.values[step], _one(grid.scale)
        if torch.equal(value.scale, scale) and grid.low <= value.ends[0] and value.ends[1] <= grid.high:
            return value
        if key not in self.rounded:
            self.rounded[key] = self._requantized(value, scale, *_both(grid), f"{name}.inputs")
        return self.rounded[key]

    def _requantized(self, value: Value, scale: Tensor, low: Tensor, high: Tensor, name: str) -> Value:
        module = self._to(value, scale, low, high)
        return self._add(module, (value,), name, scale, low, high)

    def _to(self, value: Value, scale: Tensor, low: Tensor, high: Tensor) -> modules.Requantize:
        return modules.Requantize(Dyadic.of(value.scale / scale, self.ties), int(low.min()), int(high.max()))

    # -------------------------------------------------------------------------------------------- between layers
    def _sum(self, at: int, step: Step) -> Value:
        """Each branch at the sum's scale; one that layers read too is read as they do."""
        branches = []
        for read in step.inputs:
            grid = self._grid_of(read)
            branches.append(self.values[read] if grid is None else self._at(read, grid, self._reader(read)))
        name, scale = f"sum {at}", self._finer(at, branches, 1)
        ends = [branch.at(scale) for branch in branches]
        parts = [self._to(branch, scale, *end) for branch, end in zip(branches, ends, strict=True)]
        (low, high), (more_low, more_high) = ends
        return self._add(modules.Add(*parts), branches, name, scale, low + more_low, high + more_high)

    def _reader(self, at: int) -> str:
        return next(self.steps[r].layer for r in self.readers[at] if self.steps[r].op == LAYER)

    def _finer(self, at: int, parts: Sequence[Value], times: int) -> Tensor:
        """The finest scale with which a sum stays in 32 bits whatever comes in, up to 2^-8 of its reader's."""
        scale = _one(self._next(at).scale)
        for k in range(FINER, -1, -1):
            ends = [part.at(scale / 2**k) for part in parts]
            reach = torch.stack([torch.maximum(-low, high).max() for low, high in ends]).sum()
            if int(reach) * times < LIMIT:
                fine: Tensor = scale / 2**k
                return fine
        raise SchemeError(
            f"what {self.steps[at].op} {at} adds can leave {BITS} bits at the scale of what reads it. Calibrate on "
            "more data, or give weights or inputs fewer bits."
        )

    def _next(self, at: int) -> Grid:
        """The grid of the first layer that a result comes to."""
        todo = [at]
        while todo:
            step = todo.pop(0)
            if (grid := self._grid_of(step)) is not None:
                return grid
            todo.extend(self.readers[step])
        raise ModelError("a sum that no quantized layer reads has no scale; integer networks end at a layer's sums.")

    def _clipped(self, value: Value, numbers: Sequence[float | None]) -> Value:
        """A clip's ends in codes; those beyond what the value can reach change nothing."""
        low, high = (None if end is None else torch.round(end / value.scale) for end in numbers)
        least = value.low if low is None else torch.maximum(low.clamp(min=-LIMIT).long(), value.low)
        most = value.high if high is None else torch.minimum(high.clamp(max=LIMIT - 1).long(), value.high)
        ends = (None if low is None else least.int(), None if high is None else most.int())
        return self._add(modules.Clip(*ends), (value,), "clip", value.scale, least, most)

    def _mean(self, at: int, value: Value, places: int, keep: bool) -> Value:
        if int(torch.maximum(-value.low, value.high).max()) * places >= LIMIT:
            scale = self._finer(at, [value], places)
            value = self._requantized(value, scale, *value.at(scale), f"before mean {at}")
        low, high = value.low.clamp(max=0) * places, value.high.clamp(min=0) * places
        return self._add(modules.Total(keep), (value,), f"mean {at}", value.scale / places, low, high)


def _one(scale: float) -> Tensor:
    return torch.tensor([scale], dtype=torch.float64)


def _both(grid: Grid) -> tuple[Tensor, Tensor]:
    return torch.tensor([grid.low]), torch.tensor([grid.high])
