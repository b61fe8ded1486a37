"""An integer network as a graph of ONNX's integer operators, with the same codes at every step.

Products are ConvInteger and MatMulInteger, of inputs and weights moved to uint8 with a zero point, since that is what
onnxruntime's CPU kernels read; a requantization is a multiplication in int64 and a shift of what was made positive.
Floats are the input before it is rounded, and the logits' scale. Source: github.com/onnx/onnx, ``docs/Operators.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from nybble.core.errors import FileError, SchemeError
from nybble.core.guard import reading
from nybble.export._onnx_layers import OPSET
from nybble.export._onnx_verify import session
from nybble.nn.integer import modules
from nybble.nn.integer.network import IntegerNetwork

_POSITIVE = 62
"""``q m`` is below 2^62 in magnitude: plus that it is no less than 0, and the shift of an unsigned number."""
_MIDDLE = 128
INPUT, OUTPUT = "pixel_values", "logits"
Ends = tuple[int, int] | None


class Read(NamedTuple):
    """What a step reads: names, and the shape of the first, a batch of one."""

    names: list[str]
    shape: tuple[int, ...]


class _Graph:
    """Nodes and constants as they are added, with the ends of codes that are known to have some."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.ends: dict[str, Ends] = {}

    def constant(self, value: Any, dtype: Any) -> str:
        from onnx import numpy_helper

        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def cast(self, x: str, to: str) -> str:
        from onnx import TensorProto

        return self.node("Cast", x, to=getattr(TensorProto, to))


def write_integer_graph(network: IntegerNetwork, path: Path) -> None:
    """Write the file: images in float, of any number, to logits in float.

    Args:
        network: its requantizations round ties up.
        path: where to.

    Raises:
        SchemeError: an operator that ONNX has in other types only.
    """
    from onnx import TensorProto, helper, save

    graph, blank = _Graph(), torch.zeros(1, *network.shape, dtype=torch.int32)
    values, shapes = [_entered(graph, network)], [blank.shape, *(y.shape for _, y in network.codes(blank))]
    for step, reads, name in zip(network.steps, network.reads, network.names, strict=True):
        read = Read([values[i] for i in reads], tuple(shapes[reads[0]]))
        values.append(_PARTS[type(step)](graph, step, read, name))
    scale = graph.constant(network.get_buffer("scale").numpy(), np.float64)
    graph.cast(graph.node("Mul", graph.cast(values[-1], "DOUBLE"), scale), "FLOAT")
    graph.nodes[-1].output[0] = OUTPUT
    shape = ["batch", *network.shape]
    made = helper.make_graph(
        graph.nodes, "integer", [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", *shapes[-1][1:]])], graph.constants,
    )  # fmt: skip
    save(helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10), path)


def compare_integer_graph(path: Path, network: IntegerNetwork, x: torch.Tensor) -> None:
    """Run the file on images, float32 [n, channels, height, width]: its logits are the network's, bit for bit.

    Raises:
        FileError: it doesn't run, or they are others.
    """
    with reading(f"{path} by onnxruntime"):
        theirs = torch.from_numpy(session(path).run([OUTPUT], {INPUT: x.numpy()})[0])
    if not torch.equal(theirs, network(x)):
        raise FileError(f"{path}: onnxruntime's logits are not those of the integer network.")


def _entered(graph: _Graph, network: IntegerNetwork) -> str:
    """Codes of the input, int32: divided, rounded half to even and clipped as the quantizer does."""
    grid = network.entrance
    rounded = graph.node("Round", graph.node("Div", INPUT, graph.constant(grid.scale, np.float32)))
    ends = (graph.constant(end, np.float32) for end in (grid.low, grid.high))
    found = graph.cast(graph.node("Clip", rounded, *ends), "INT32")
    graph.ends[found] = (grid.low, grid.high)
    return found


def _unsigned(graph: _Graph, x: str, name: str) -> tuple[str, int]:
    """Codes in uint8, and which of them is 0."""
    ends = graph.ends.get(x)
    zero = 0 if ends is None else -min(ends[0], 0)
    if ends is None or max(ends[1], 0) + zero > 255:
        raise SchemeError(f"{name}: what enters it has more than 256 codes, and ONNX's integer operators read 8 bits.")
    moved = x if zero == 0 else graph.node("Add", x, graph.constant(zero, np.int32))
    return graph.cast(moved, "UINT8"), zero


def _product(graph: _Graph, step: Any, read: Read, name: str) -> str:
    x, zero = _unsigned(graph, read.names[0], name)
    zeros = (graph.constant(zero, np.uint8), graph.constant(_MIDDLE, np.uint8))
    weight = (step.get_buffer("weight").to(torch.int16) + _MIDDLE).numpy().astype(np.uint8)
    bias, geometry = step.get_buffer("bias").numpy(), step.geometry
    if geometry is None:
        sums = graph.node("MatMulInteger", x, graph.constant(weight.T, np.uint8), *zeros)
        return graph.node("Add", sums, graph.constant(bias, np.int32))
    around = {"auto_pad": "SAME_UPPER"} if geometry.padding is None else {"pads": [*geometry.padding] * 2}
    sums = graph.node(
        "ConvInteger", x, graph.constant(weight.reshape(geometry.shape), np.uint8), *zeros, group=geometry.groups,
        kernel_shape=list(geometry.kernel), strides=list(geometry.stride), dilations=list(geometry.dilation), **around,
    )  # fmt: skip
    return graph.node("Add", sums, graph.constant(_along(bias, read), np.int32))


def _along(values: Any, read: Read) -> Any:
    """Values of channels, or one, in the shape that meets what is read."""
    return np.asarray(values).reshape(1, -1, *[1] * (len(read.shape) - 2))


def _requantized(graph: _Graph, step: Any, read: Read, name: str) -> str:
    if step.ties != "half-up":
        raise SchemeError(f"{name}: shifts round ties up, and this network's go to even.")
    m, e = step.get_buffer("mantissa"), step.get_buffer("exponent")
    m, e = torch.where(e > _POSITIVE, 0, m), e.clamp(max=_POSITIVE)  # 0 comes to 0 by any shift
    up, back = (1 << (e - 1)) + 2**_POSITIVE, torch.ones_like(e) << (_POSITIVE - e)
    by, up, by_shift, back = (
        graph.constant(_along(part.numpy(), read), kind)
        for part, kind in ((m, np.int64), (up, np.int64), (e, np.uint64), (back, np.int64))
    )
    raised = graph.node("Add", graph.node("Mul", graph.cast(read.names[0], "INT64"), by), up)
    shifted = graph.node("BitShift", graph.cast(raised, "UINT64"), by_shift, direction="RIGHT")
    ends = (graph.constant(end, np.int64) for end in (step.low, step.high))
    whole = graph.node("Clip", graph.node("Sub", graph.cast(shifted, "INT64"), back), *ends)
    found = graph.cast(whole, "INT32")
    graph.ends[found] = (step.low, step.high)
    return found


def _added(graph: _Graph, step: Any, read: Read, name: str) -> str:
    parts = (
        _requantized(graph, part, Read([x], read.shape), name)
        for part, x in zip((step.first, step.second), read.names, strict=True)
    )
    return graph.node("Add", *parts)


def _clipped(graph: _Graph, step: Any, read: Read, name: str) -> str:
    found, ends = read.names[0], graph.ends.get(read.names[0])
    for end, kind, tighter in (("low", "Max", max), ("high", "Min", min)):
        values = step._buffers[end]
        if values is not None:
            found = graph.node(kind, found, graph.constant(_along(values.numpy(), read), np.int32))
            if ends is not None:
                at = int(values.min()) if end == "low" else int(values.max())
                ends = (tighter(ends[0], at), ends[1]) if end == "low" else (ends[0], tighter(ends[1], at))
    graph.ends[found] = ends
    return found


def _total(graph: _Graph, step: Any, read: Read, name: str) -> str:
    axes = graph.constant(range(2, len(read.shape)), np.int64)
    return graph.node("ReduceSum", read.names[0], axes, keepdims=int(step.keep))


def _padded(graph: _Graph, step: Any, read: Read, name: str) -> str:
    return _around(graph, read, step.widths, 0)


def _around(graph: _Graph, read: Read, widths: tuple[int, ...], value: int) -> str:
    """``widths`` as torch has them, the last dimension first."""
    pairs = [*zip(widths[::2], widths[1::2], strict=True), *[(0, 0)] * (len(read.shape) - len(widths) // 2)][::-1]
    pads = [side for sides in zip(*pairs, strict=True) for side in sides]
    found = graph.node("Pad", read.names[0], graph.constant(pads, np.int64), graph.constant(value, np.int32))
    graph.ends[found] = graph.ends.get(read.names[0])
    return found


def _pooled(graph: _Graph, step: Any, read: Read, name: str) -> str:
    """The largest of slices: onnxruntime's MaxPool has no int32."""
    kernel, stride, padding, dilation, ceil = step.arguments
    if ceil:
        raise SchemeError(f"{name}: pooling whose last windows reach beyond the padding has no integer graph.")
    kernels, strides, pads, gaps = (
        (v[0], v[-1]) if isinstance(v, list | tuple) else (v, v) for v in (kernel, stride, padding, dilation)
    )
    x = _around(graph, read, (pads[1], pads[1], pads[0], pads[0]), -(2**31))
    sizes = [size + 2 * pad for size, pad in zip(read.shape[2:], pads, strict=True)]
    reach = [  # from the first window's element to behind the last one's
        (size - (k - 1) * gap - 1) // step * step + 1
        for size, k, step, gap in zip(sizes, kernels, strides, gaps, strict=True)
    ]
    axes, steps = graph.constant((2, 3), np.int64), graph.constant(strides, np.int64)
    parts = []
    for place in np.ndindex(*kernels):
        start = [at * gap for at, gap in zip(place, gaps, strict=True)]
        end = [at + far for at, far in zip(start, reach, strict=True)]
        parts.append(
            graph.node("Slice", x, graph.constant(start, np.int64), graph.constant(end, np.int64), axes, steps)
        )
    found = graph.node("Max", *parts)
    graph.ends[found] = graph.ends.get(read.names[0])
    return found


def _flat(graph: _Graph, step: Any, read: Read, name: str) -> str:
    found = graph.node("Flatten", read.names[0], axis=1)
    graph.ends[found] = graph.ends.get(read.names[0])
    return found


_PARTS: dict[type[nn.Module], Callable[[_Graph, Any, Read, str], str]] = {
    modules.Product: _product, modules.Requantize: _requantized, modules.Add: _added, modules.Clip: _clipped,
    modules.Total: _total, modules.Pad: _padded, modules.MaxPool: _pooled, modules.Flatten: _flat,
}  # fmt: skip
