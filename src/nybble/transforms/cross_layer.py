"""Cross-layer equalisation of whatever runs in a row: convolutions and linear layers with a ReLU or pooling between.

Nagel et al. 2019, arXiv:1906.04721, section 4.1, as the post-training recipe of Aggarwal et al. 2023, arXiv:2311.12359,
has it: each channel between two layers is multiplied by ``r2^(1 - alpha) / r1^alpha``, with r1 the largest magnitude in
the first layer's weights (and bias) of that channel and r2 that in the second's, again and again over all pairs until
they agree.

Which layers are pairs is seen by running the block once: nothing but the second layer may read what the first one gave,
and only what commutes with positive factors (ReLU, leaky ReLU, max and mean pooling, zero padding) may lie between.
ReLU6 doesn't commute. Pairs that can't be seen so, but that the model's adapter knows of (values and the output
projection of an attention, the two factors of a gated MLP), are equalised too. A block without pairs stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nybble.calibration.block import BlockState
from nybble.calibration.window import Window
from nybble.core.errors import SchemeError
from nybble.models.adapter import Adapter, LinearFold, NormFold
from nybble.nn.conv import is_conv
from nybble.transforms import Rewrite
from nybble.transforms._folds import Channel, Scaling, safe_factor

LAYER, ZERO_PAD = "layer ", "padding with zeros"
COMMUTE = {
    ZERO_PAD, "relu", "relu_", "leaky_relu", "leaky_relu_", "max_pool1d_with_indices", "max_pool2d_with_indices",
    "max_pool2d", "avg_pool1d", "avg_pool2d", "_adaptive_avg_pool2d", "mean", "squeeze", "view", "_unsafe_view",
    "detach", "alias",
}  # fmt: skip
"""Operators that give c f(x) for c x, any c > 0 for each channel, as long as they leave channels where they are."""


@dataclass(frozen=True, kw_only=True)
class CrossLayer(Scaling):
    """Options of the method.

    Attributes:
        alpha: share of the first layer's range that goes; 0.5 gives both layers the same range.
        iterations: rounds over all pairs; a layer in two of them needs several.
        bias: whether the first layer's bias counts for its range.
    """

    alpha: float = 0.5
    iterations: int = 20
    bias: bool = True

    required: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SchemeError(f"cross-layer: alpha={self.alpha:g} is a share, 0 <= alpha <= 1.")
        if self.iterations < 1:
            raise SchemeError(f"cross-layer: iterations={self.iterations} must be 1 or more.")

    def takes(self, fold: NormFold | LinearFold) -> bool:  # noqa: D102
        return isinstance(fold, LinearFold)

    def factor(self, channel: Channel) -> Tensor:  # noqa: D102
        assert channel.before is not None  # takes() lets linear pairs in alone
        first = channel.before.abs().amax(1)
        second = torch.stack([w.abs().flatten(0, -2).amax(0) for w in channel.behind]).amax(0)
        return 1 / self._factor(first, second)  # channels are divided by what Scaling gets

    def works_on(self, adapter: Adapter, block: Any, config: Any) -> bool:  # noqa: D102
        layers = sum(_is_layer(module) for module in block.modules())
        return layers > 1 or super().works_on(adapter, block, config)

    def rewrites(self, window: Window, adapter: Adapter, path: str) -> Iterator[Rewrite]:  # noqa: D102
        yield from super().rewrites(window, adapter, path)
        state = window.block
        config: Any = window.calibration.config
        known = {fold.first for fold in adapter.linear_folds_of(state.module, config)}
        call, given = next(iter(window.batches(path)()))
        pairs = find_pairs(state.module, lambda: call.run(state.module, given))
        pairs = {first: second for first, second in pairs.items() if first not in known}
        for (first, second), factor in self._factors(state, pairs).items():
            yield multiplying(state, first, second, factor)

    def _factors(self, state: BlockState, pairs: Mapping[str, str]) -> dict[tuple[str, str], Tensor]:
        """By pair, what its channels are multiplied by after all rounds."""
        layers = {name for pair in pairs.items() for name in pair}
        weights = {name: state.get(f"{name}.weight") for name in layers}
        biases = {name: state.get(f"{name}.bias") for name in layers if self.bias and state.has(f"{name}.bias")}
        found = {pair: torch.ones(len(weights[pair[0]]), device=weights[pair[0]].device) for pair in pairs.items()}
        for _ in range(self.iterations):
            for (first, second), total in found.items():
                before, groups = weights[first].flatten(1).abs().amax(1), _groups(state.module, second)
                if first in biases:
                    before = torch.maximum(before, biases[first].abs())
                by = self._factor(before, _by_input(weights[second], groups).abs().amax((0, 2)))
                weights[first] = times_rows(weights[first], by)
                weights[second] = times_columns(weights[second], 1 / by, groups)
                biases |= {first: biases[first] * by} if first in biases else {}
                total *= by
        return found

    def _factor(self, first: Tensor, second: Tensor) -> Tensor:
        return safe_factor(second ** (1 - self.alpha) / first**self.alpha, (first > 0) & (second > 0))


def multiplying(state: BlockState, first: str, second: str, factor: Tensor) -> Rewrite:
    """Multiply the channels between two layers, and divide the second's weights by it."""
    groups = _groups(state.module, second)
    names = [f"{first}.weight", f"{second}.weight", *([f"{first}.bias"] if state.has(f"{first}.bias") else [])]

    def function(weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        by = parameters["factor"]
        found = {
            f"{first}.weight": times_rows(weights[f"{first}.weight"], by),
            f"{second}.weight": times_columns(weights[f"{second}.weight"], 1 / by, groups),
        }
        if f"{first}.bias" in weights:
            found[f"{first}.bias"] = weights[f"{first}.bias"] * by
        return found

    return Rewrite(weights=tuple(names), parameters={"factor": factor}, function=function)


def times_rows(weight: Tensor, by: Tensor) -> Tensor:
    """A weight [out, ...] with each output channel multiplied by its factor."""
    return weight * by.view(-1, *[1] * (weight.dim() - 1))


def times_columns(weight: Tensor, by: Tensor, groups: int) -> Tensor:
    """A weight [out, in / groups, ...] with each input channel multiplied by its factor [in]."""
    return (
        (_by_input(weight, groups) * by[None, :, None])
        .view(len(weight) // groups, groups, weight.shape[1], -1)
        .transpose(0, 1)
        .reshape(weight.shape)
    )


def _by_input(weight: Tensor, groups: int) -> Tensor:
    """A weight [out, in / groups, ...] as [out / groups, in, kernel]."""
    out, columns = weight.shape[:2]
    return (
        weight.reshape(groups, out // groups, columns, -1).transpose(0, 1).reshape(out // groups, groups * columns, -1)
    )


@torch.no_grad()
def find_pairs(block: nn.Module, run: Callable[[], Any]) -> dict[str, str]:
    """Layers of which only one other reads what they give, through nothing but what commutes with factors.

    Args:
        block: where to look.
        run: calls the block once, and returns what it gives.

    Returns:
        Names of first layers -> of second layers.
    """
    weights = Counter(id(p) for _, p in block.named_parameters(remove_duplicate=False))
    names = {m: n for n, m in block.named_modules() if _is_layer(m) and weights[id(m.weight)] == 1}
    watch = _Watch()
    handles = [module.register_forward_pre_hook(watch.enter(name), with_kwargs=True) for module, name in names.items()]
    handles += [module.register_forward_hook(watch.leave(name)) for module, name in names.items()]
    try:
        with watch:
            for tensor in tree_leaves(run()):
                watch.use(tensor, None, None)
    finally:
        for handle in handles:
            handle.remove()
    pairs = {name: watch.reader(name, block) for name in watch.given if watch.calls[name] == 1}
    return {name: second for name, second in pairs.items() if second is not None and watch.calls[second] == 1}


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Who makes each tensor and who reads it; what happens inside a layer is the layer's own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given: dict[str, Tensor] = {}
        self.calls: Counter[str] = Counter()
        self.uses: dict[int, list[tuple[str | None, Tensor | None]]] = {}
        self.alive: list[Tensor] = []  # so that no other tensor gets the id of one that was seen
        self.inside = ""

    def enter(self, name: str) -> Callable[..., None]:
        """A hook before a layer."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inside = name
            self.calls[name] += 1
            for tensor in tree_leaves((args, kwargs)):
                self.use(tensor, f"{LAYER}{name}", None)

        return hook

    def leave(self, name: str) -> Callable[..., None]:
        """A hook behind it."""

        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            self.inside, self.given[name] = "", output

        return hook

    def use(self, tensor: object, by: str | None, gives: Tensor | None) -> None:
        """Note a reader: an operator's name, ``LAYER`` and a name, or None for the block's own output."""
        if isinstance(tensor, Tensor):
            self.uses.setdefault(id(tensor), []).append((by, gives))
            self.alive.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not self.inside:
            first = next((t for t in tree_leaves(found) if isinstance(t, Tensor)), None)
            for tensor in tree_leaves((args, kwargs)):
                self.use(tensor, _name(func, args), first)
        return found

    def reader(self, name: str, block: nn.Module) -> str | None:
        """The layer that alone reads what a layer gave."""
        tensor: Tensor | None = self.given[name]
        dim = 1 if is_conv(block.get_submodule(name)) else self.given[name].dim() - 1
        channels = self.given[name].shape[dim]
        while tensor is not None:
            uses = self.uses.get(id(tensor), [])
            while uses and uses[0][1] is tensor and uses[0][0] in COMMUTE:  # in place
                uses = uses[1:]
            by, gives = uses[0] if len(uses) == 1 else (None, None)
            if by is None:
                return None
            if by.startswith(LAYER):
                second = by.removeprefix(LAYER)
                wanted = 1 if is_conv(block.get_submodule(second)) else tensor.dim() - 1
                return second if dim == wanted else None
            if by not in COMMUTE or gives is None or gives.dim() <= dim or gives.shape[dim] != channels:
                return None
            if gives.shape[:dim] != tensor.shape[:dim]:
                return None
            tensor = gives
        return None


def _name(func: Any, args: Any) -> str:
    """An operator's name; padding commutes where it pads zeros, a mean where it is over what is behind channels."""
    name = str(func.overloadpacket.__name__)
    if name == "constant_pad_nd" and (len(args) < 3 or args[2] == 0):
        return ZERO_PAD
    if name == "mean" and not (len(args) > 1 and args[1] and all(d % args[0].dim() > 1 for d in args[1])):
        return "mean over channels or samples"
    return name


def _is_layer(module: nn.Module) -> bool:
    return is_conv(module) or type(module) is nn.Linear


def _groups(block: nn.Module, name: str) -> int:
    return int(getattr(block.get_submodule(name), "groups", 1))


PART = CrossLayer
