"""A torch network -> a stack: torch.export writes down what it computes, and every operation gets its layer.

BatchNorms are folded into the convolution before them, since a batch of one has no statistics: they learn as part of
it. Dropouts are left out. What has no form in C is refused, with the layer's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError, UsageError
from nybble.microcontroller.layer import Layer, Shape
from nybble.microcontroller.layers import Activation, Add, AveragePool, Conv, InstanceNorm, Linear, MaxPool, Pointwise
from nybble.microcontroller.layers.pooling import LARGEST_WINDOW
from nybble.microcontroller.stack import Stack
from nybble.microcontroller.transforms import fitting

TAKES = (
    "convolutions (any groups, no dilation), linear layers, instance norm, BatchNorm behind a convolution, ReLU, "
    "ReLU6, leaky ReLU, sigmoid, GELU of tanh, average and max pooling, sums of two branches, flatten, zero padding "
    "before a convolution"
)
Node = torch.fx.Node
Values = tuple[int, ...]


def stack_of(network: nn.Module, shape: Sequence[int]) -> Stack:
    """The layers of a network.

    Args:
        network: takes a batch of images and gives logits (a tensor, or a record with ``logits``); may be on the meta
            device. It is looked at in eval mode.
        shape: of one sample, ``(channels, height, width)``.

    Raises:
        ModelError: an operation that the C has no form for, named with its layer; a network that torch.export can't
            follow.
    """
    from torch.export import export

    modes = {module: module.training for module in network.modules()}
    first = next(iter(network.parameters()), None)
    if first is None:
        raise ModelError(f"{type(network).__name__} has no parameter, so there is nothing to train.")
    given = torch.empty((1, *shape), device=first.device, dtype=first.dtype)
    try:
        network.eval()
        program = export(network, (given,))
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{type(network).__name__} can't be followed on inputs {[1, *shape]}: {said[0]:.200} "
            "It needs a fixed order of layers, for images [1, channels, height, width]."
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    return _Tracing(program).run()


class _Tracing:
    """Goes through the graph of an exported network."""

    def __init__(self, program: Any) -> None:
        signature = program.graph_signature
        self._graph = program.graph
        self._parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._state: Mapping[str, Tensor] = program.state_dict
        self._numbers: dict[Node, int] = {}
        self._padded: dict[Node, tuple[Node, Values]] = {}
        self._layers: list[Layer] = []
        self._shapes: list[Shape] = []
        self._weights: dict[str, dict[str, Tensor]] = {}

    def run(self) -> Stack:
        for node in self._graph.nodes:
            if node.op == "placeholder" and node.name not in self._parameters:
                if self._shapes:
                    raise ModelError(f"the network has a second input, {node.name}; it takes one, of images.")
                self._numbers[node] = self._new(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self._finish(node)
        return Stack(layers=tuple(self._layers), shapes=tuple(self._shapes), weights=self._weights)

    def _call(self, node: Any) -> None:
        name = str(node.target).removeprefix("aten.").partition(".")[0].rstrip("_")
        found = _OPERATIONS.get(name)
        if found is None:
            raise ModelError(f"{_place(node)}: C training code has no form for {name}; it takes {TAKES}.")
        try:
            found(self, node)
        except UsageError as error:
            raise ModelError(f"{_place(node)}: {error}") from error

    def _finish(self, node: Any) -> None:
        results = [n for n in node.all_input_nodes if n in self._numbers]
        if not self._layers or len(results) != 1 or self._numbers[results[0]] != self._layers[-1].output:
            raise ModelError("the network's output has to be one tensor, that of its last layer.")

    # ---------------------------------------------------------------------------------------------- operations
    def convolution(self, node: Any) -> None:
        source, weight, bias, stride, padding, dilation, groups = _arguments(node, 7, None, (1, 1), (0, 0), (1, 1), 1)
        if any(step != 1 for step in _pair(dilation)):
            raise UsageError(f"a dilation of {list(dilation)}; 1 is what the C has.")
        before: Values = (0, 0, 0, 0)
        if source in self._padded:
            source, before = self._padded[source]
        vertical, across = _pair(padding) if not isinstance(padding, str) else self._same(padding)
        up, down, left, right = before
        pads = (up + vertical, down + vertical, left + across, right + across)
        held = self._held(weight=weight, bias=bias)
        shape, kernel = self._shapes[self._number(source)], _pair(held["weight"].shape[2:])
        window = fitting(shape[1], shape[2], kernel, _pair(stride), pads)
        if kernel == (1, 1) and window.stride == (1, 1) and groups == 1 and not any(window.padding):
            self._add(Pointwise, node, [source], held)
        else:
            self._add(Conv, node, [source], held, window=window, groups=groups)

    def linear(self, node: Any) -> None:
        source, weight, bias = _arguments(node, 3, None)
        self._add(Linear, node, [source], self._held(weight=weight, bias=bias))

    def batch_norm(self, node: Any) -> None:
        source, weight, bias, mean, variance = node.args[:5]
        eps = float(node.args[7])
        last = self._layers[-1] if self._layers else None
        here = self._numbers.get(source)
        others = [user for user in source.users if user is not node]
        if not isinstance(last, Conv | Pointwise) or last.output != here or others:
            raise UsageError(
                "a BatchNorm that stands behind no convolution can't be folded, and a batch of one has no statistics; "
                "use InstanceNorm2d."
            )
        held = self._weights[last.name]
        scale = self._tensor(weight, mean, 1.0) / (self._tensor(variance) + eps).sqrt()
        old = held.get("bias", torch.zeros_like(scale))
        held["weight"] = held["weight"] * scale[:, None, None, None]
        held["bias"] = (old - self._tensor(mean)) * scale + self._tensor(bias, mean, 0.0)
        shapes = {role: tuple(value.shape) for role, value in held.items()}
        self._layers[-1] = replace(last, parameters=shapes)
        self._numbers[node] = last.output

    def instance_norm(self, node: Any) -> None:
        source, weight, bias, mean, _, statistics, _, eps = node.args[:8]
        if not statistics or mean is not None:
            raise UsageError("an instance norm with running statistics; track_running_stats=False is what the C has.")
        if (weight is None) != (bias is None):
            raise UsageError("an instance norm with one of weight and bias; it takes both, or none.")
        self._add(InstanceNorm, node, [source], self._held(weight=weight, bias=bias), eps=float(eps))

    def add(self, node: Any) -> None:
        first, second = node.args[:2]
        if not isinstance(second, Node) or node.kwargs.get("alpha", 1) != 1:
            raise UsageError("a sum with a number, or scaled; it takes sums of two branches.")
        self._add(Add, node, [first, second], {})

    def relu(self, node: Any) -> None:
        self._add(Activation, node, [node.args[0]], {}, kind="relu")

    def hardtanh(self, node: Any) -> None:
        source, low, high = _arguments(node, 3, -1.0, 1.0)
        if (low, high) != (0, 6):
            raise UsageError(f"a clamp to {low} and {high}; 0 and 6 (ReLU6) is what the C has.")
        self._add(Activation, node, [source], {}, kind="relu6")

    def relu6(self, node: Any) -> None:
        self._add(Activation, node, [node.args[0]], {}, kind="relu6")

    def leaky_relu(self, node: Any) -> None:
        source, slope = _arguments(node, 2, 0.01)
        self._add(Activation, node, [source], {}, kind="leaky_relu", slope=float(slope))

    def sigmoid(self, node: Any) -> None:
        self._add(Activation, node, [node.args[0]], {}, kind="sigmoid")

    def gelu(self, node: Any) -> None:
        if node.kwargs.get("approximate", "none") != "tanh":
            raise UsageError("GELU of erf; approximate='tanh' is what the C has.")
        self._add(Activation, node, [node.args[0]], {}, kind="gelu")

    def average(self, node: Any) -> None:
        source, kernel, stride, padding, ceil, _, divisor = _arguments(node, 7, None, 0, False, True, None)
        patch = _pair(kernel)
        if _pair(stride or kernel) != patch or any(_pair(padding)) or ceil or divisor is not None:
            raise UsageError("average pooling whose patches don't lie side by side; stride = kernel is what the C has.")
        self._average(node, source, patch)

    def adaptive_average(self, node: Any) -> None:
        source, (_, height, width) = node.args[0], self._shape(node.args[0])
        rows, columns = _pair(node.args[1])
        if height % rows or width % columns:
            raise UsageError(f"{rows} x {columns} patches don't divide {height} x {width}.")
        self._average(node, source, (height // rows, width // columns))

    def mean(self, node: Any) -> None:
        axes = [axis % 4 for axis in node.args[1]]
        if len(self._shape(node.args[0])) != 3 or sorted(axes) != [2, 3]:
            raise UsageError("a mean over other axes than height and width.")
        self._average(node, node.args[0], self._shape(node.args[0])[1:])

    def max_pool(self, node: Any) -> None:
        source, kernel, stride, padding, dilation, ceil = _arguments(node, 6, None, 0, 1, False)
        if any(step != 1 for step in _pair(dilation)) or ceil:
            raise UsageError("max pooling with dilation, or whose last window hangs over.")
        (_, height, width), (up, left) = self._shape(source), _pair(padding)
        window = fitting(height, width, _pair(kernel), _pair(stride or kernel), (up, up, left, left))
        if window.kernel[0] * window.kernel[1] > LARGEST_WINDOW:
            raise UsageError(f"max pooling over {list(window.kernel)}; up to {LARGEST_WINDOW} places can be numbered.")
        self._add(MaxPool, node, [source], {}, window=window)

    def pad(self, node: Any) -> None:
        source, amounts = node.args[:2]
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value", 0.0)
        mode = node.args[2] if len(node.args) > 2 and isinstance(node.args[2], str) else "constant"
        left, right, up, down = (*amounts, 0, 0, 0, 0)[:4]
        users = [str(user.target) for user in node.users]
        if mode != "constant" or value or min(left, right, up, down) < 0 or not all("conv2d" in user for user in users):
            raise UsageError("padding is zeros, and stands before a convolution.")
        self._padded[node] = (source, (up, down, left, right))
        self._numbers[node] = self._number(source)

    def alias(self, node: Any) -> None:
        """Flatten, views of the same order, dropout, copies: the array is the same."""
        self._numbers[node] = self._number(node.args[0])

    # ------------------------------------------------------------------------------------------------- helpers
    def _average(self, node: Any, source: Any, patch: Values) -> None:
        _, height, width = self._shape(source)
        if height % patch[0] or width % patch[1]:
            raise UsageError(f"patches of {list(patch)} don't divide {height} x {width}.")
        self._add(AveragePool, node, [source], {}, patch=patch)

    def _add(
        self, layer_class: Any, node: Any, sources: Sequence[Any], held: dict[str, Tensor], **options: Any
    ) -> None:
        inputs = tuple(self._number(source) for source in sources)
        name, out = self._name(node), self._new(node)
        layer: Layer = layer_class(
            name=name,
            inputs=inputs,
            output=out,
            shapes=tuple(self._shapes[number] for number in inputs),
            out=self._shapes[out],
            parameters={role: tuple(value.shape) for role, value in held.items()},
            **options,
        )
        self._layers.append(layer)
        self._numbers[node] = out
        if held:
            self._weights[name] = held

    def _name(self, node: Any) -> str:
        taken, name = {layer.name for layer in self._layers}, _place(node)
        number = sum(other == name or other.startswith(f"{name}#") for other in taken)
        return f"{name}#{number + 1}" if number else name

    def _new(self, node: Any) -> int:
        shape = tuple(int(size) for size in node.meta["val"].shape)
        if shape[:1] != (1,):
            raise UsageError(f"a tensor of shape {list(shape)}; training is by one sample at a time.")
        self._shapes.append(shape[1:])
        return len(self._shapes) - 1

    def _number(self, node: Any) -> int:
        if node not in self._numbers or node in self._padded:
            raise UsageError("an input that no layer before it made.")
        return self._numbers[node]

    def _shape(self, node: Any) -> Shape:
        return self._shapes[self._number(node)]

    def _held(self, **nodes: Any) -> dict[str, Tensor]:
        return {role: self._tensor(node) for role, node in nodes.items() if node is not None}

    def _tensor(self, node: Any, like: Any = None, filled: float | None = None) -> Tensor:
        """A parameter in float32; where there is none, as many numbers as ``like`` has."""
        if node is None and filled is not None:
            return torch.full_like(self._tensor(like), filled)
        return self._state[self._parameters[node.name]].detach().to(torch.float32, copy=True)

    def _same(self, padding: str) -> Values:
        if padding != "valid":
            raise UsageError(f"padding {padding!r}; say it in numbers.")
        return (0, 0)


def _arguments(node: Any, count: int, *defaults: Any) -> list[Any]:
    """The first ``count`` positional arguments, with what they are where they were left out."""
    given = list(node.args)
    return [*given, *defaults[len(given) - count :]] if len(given) < count else given[:count]


def _pair(value: Any) -> tuple[int, int]:
    """One number for both directions, or two."""
    if isinstance(value, int):
        return value, value
    numbers = list(value)
    return (numbers[0], numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


def _place(node: Any) -> str:
    """The module that an operation is of."""
    stack = node.meta.get("nn_module_stack") or {}
    return str([*stack.values()][-1][0]) if stack and [*stack.values()][-1][0] else node.name


_OPERATIONS: dict[str, Callable[[_Tracing, Any], None]] = {
    "conv2d": _Tracing.convolution, "linear": _Tracing.linear, "batch_norm": _Tracing.batch_norm,
    "instance_norm": _Tracing.instance_norm, "add": _Tracing.add, "relu": _Tracing.relu, "relu6": _Tracing.relu6,
    "hardtanh": _Tracing.hardtanh, "leaky_relu": _Tracing.leaky_relu, "sigmoid": _Tracing.sigmoid,
    "gelu": _Tracing.gelu, "avg_pool2d": _Tracing.average, "adaptive_avg_pool2d": _Tracing.adaptive_average,
    "mean": _Tracing.mean, "max_pool2d": _Tracing.max_pool, "pad": _Tracing.pad, "flatten": _Tracing.alias,
    "view": _Tracing.alias, "reshape": _Tracing.alias, "dropout": _Tracing.alias, "contiguous": _Tracing.alias,
    "squeeze": _Tracing.alias,
}  # fmt: skip
