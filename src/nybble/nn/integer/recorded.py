"""What a network does between its input and its logits, step by step, as one run of it shows.

Quantized layers are steps of their own; what is between them is what torch dispatches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from nybble.core.errors import ModelError
from nybble.nn.layer import QuantLayer
from nybble.nn.swap import set_module

INPUT, LAYER, RELU, CLIP, ADD, MEAN, PAD, POOL, FLATTEN = (
    "input", "layer", "relu", "clip", "add", "mean", "pad", "max-pool", "flatten",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One of the operations that integers can do too.

    Attributes:
        op: one of the words above.
        inputs: numbers of the steps that it reads.
        layer: name of the quantized layer.
        numbers: of a clip its ends, of a pad its widths, of a pooling kernel, stride, padding and dilation.
        shape: of the result, without the batch.
    """

    op: str
    inputs: tuple[int, ...]
    layer: str
    numbers: tuple[Any, ...]
    shape: tuple[int, ...]


@torch.no_grad()
def recorded(model: nn.Module, x: Tensor) -> list[Step]:
    """Steps in order; the first is the input, the last the logits.

    Args:
        model: with quantized layers; called with ``x``, it gives a tensor or something with ``logits``.
        x: [n, channels, ...], n at least 2, so that a batch is told from other sizes.

    Raises:
        ModelError: it does something that has no form in integers here, by name.
    """
    recorder = _Recorder(x)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    for name, layer in layers.items():
        set_module(model, name, _Leaf(name, layer, recorder))
    try:
        with recorder:
            found = model(x)
    finally:
        for name, layer in layers.items():
            set_module(model, name, layer)
    logits = found if isinstance(found, Tensor) else getattr(found, "logits", None)
    last = recorder.known.get(id(logits))
    if last is None:
        raise ModelError(f"a {type(model).__name__} gives no logits that come from its input; classifiers do.")
    return _reached(recorder.steps, last)


def _reached(steps: list[Step], last: int) -> list[Step]:
    """Those that the last one needs, renumbered."""
    needed, todo = set[int](), [0, last]
    while todo:
        if (at := todo.pop()) not in needed:
            needed.add(at)
            todo.extend(steps[at].inputs)
    number = {old: new for new, old in enumerate(sorted(needed))}
    return [
        Step(s.op, tuple(number[i] for i in s.inputs), s.layer, s.numbers, s.shape)
        for s in (steps[old] for old in number)
    ]


class _Leaf(nn.Module):
    """A quantized layer that is noted as one step. Networks read sizes of their convolutions, as MobileNetV2 does."""

    def __init__(self, name: str, layer: QuantLayer, recorder: _Recorder) -> None:
        super().__init__()
        self.layer, self.recorder, self.name = layer, recorder, name

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, x: Tensor) -> Tensor:
        with _disable_current_modes():
            y: Tensor = self.layer(x)
        self.recorder.note(LAYER, (x,), y, layer=self.name)
        return y


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.known: dict[int, int] = {}
        self.alive: list[Tensor] = []  # so that no other tensor gets an id of theirs
        self.note(INPUT, (), x)

    def note(
        self, op: str, inputs: tuple[Tensor, ...], y: Tensor, numbers: tuple[Any, ...] = (), layer: str = ""
    ) -> None:
        if missing := [t for t in inputs if id(t) not in self.known]:
            raise ModelError(
                f"{layer or op} reads a tensor of {tuple(missing[0].shape)} that is no result of quantized layers and "
                "sums; integers can't follow there."
            )
        self.steps.append(Step(op, tuple(self.known[id(t)] for t in inputs), layer, numbers, tuple(y.shape[1:])))
        self.known[id(y)] = len(self.steps) - 1
        self.alive.append(y)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not any(id(a) in self.known for a in args if isinstance(a, Tensor)):
            return found
        y = found[0] if isinstance(found, tuple) else found
        name = func.overloadpacket.__name__.rstrip("_").lstrip("_")
        if name in _SAME or (name == "constant_pad_nd" and not any(args[1])):
            self.known[id(y)] = self.known[id(args[0])]
            self.alive.append(y)
            return found
        known = _KNOWN.get(name)
        told = None if known is None else known(args, kwargs or {})
        if told is None:
            raise ModelError(
                f"integers can't follow {name} of a tensor of {tuple(args[0].shape)}; they know quantized layers with "
                "their BatchNorms folded in, ReLU, ReLU6, sums, max pooling, and means over all places."
            )
        self.note(told[0], told[1], y, told[2])
        return found


_Told = tuple[str, tuple[Tensor, ...], tuple[Any, ...]] | None
_SAME = {"clone", "detach", "alias", "to_copy"}


def _add(args: Any, kwargs: Mapping[str, Any]) -> _Told:
    x, y = args[:2]
    plain = isinstance(y, Tensor) and x.shape == y.shape and kwargs.get("alpha", 1) == 1
    return (ADD, (x, y), ()) if plain else None


def _clip(args: Any, _: Mapping[str, Any]) -> _Told:
    x, low, high = args[0], *[*args[1:], None, None][:2]
    return (CLIP, (x,), (low, high)) if low is None or low <= 0 else None


def _mean(args: Any, _: Mapping[str, Any]) -> _Told:
    x, dims = args[:2]
    places = sorted(d % x.dim() for d in dims) == list(range(2, x.dim()))
    return (MEAN, (x,), (x.shape[2:].numel(), bool(args[2]) if len(args) > 2 else False)) if places else None


def _pad(args: Any, _: Mapping[str, Any]) -> _Told:
    zeros = (args[2] if len(args) > 2 else 0) == 0
    return (PAD, (args[0],), tuple(args[1])) if zeros else None


def _pool(args: Any, _: Mapping[str, Any]) -> _Told:
    kernel, stride, padding, dilation, ceil = (*args[1:], *([None] * 5))[:5]
    numbers = (kernel, stride or kernel, padding or 0, dilation or 1, bool(ceil))
    return POOL, (args[0],), numbers


def _flatten(args: Any, _: Mapping[str, Any]) -> _Told:
    x, shape = args[:2]
    flat = len(shape) == 2 and (shape[0] in (len(x), -1)) and x.shape[2:].numel() == 1
    return (FLATTEN, (x,), ()) if flat else None


_KNOWN: dict[str, Callable[[Any, Mapping[str, Any]], _Told]] = {
    "relu": lambda args, _: (RELU, (args[0],), ()), "hardtanh": _clip, "clamp": _clip, "add": _add, "mean": _mean,
    "constant_pad_nd": _pad, "max_pool2d_with_indices": _pool, "view": _flatten, "reshape": _flatten,
    "unsafe_view": _flatten,
}  # fmt: skip
