"""An ONNX file judged layer by layer: every layer, and what stands between two, from equal inputs.

Rounding makes a network chaotic: a sum whose last bit differs moves what stands on a tie to the next code, and 1/127 of
the largest input goes on from there. Whole outputs then say little about a file. So onnxruntime runs it once, all
layers' codes and outputs are kept, and nybble's model is run with onnxruntime's in place of its own, layer after layer:
what is between two layers starts from onnxruntime's output of the first, a product from onnxruntime's codes. No error
is carried on, and each operator of the network is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nybble.core.errors import FileError
from nybble.core.guard import reading
from nybble.export._onnx_graph import MARK
from nybble.export._onnx_verify import session
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.embedding import QuantEmbedding
from nybble.nn.layer import QuantLayer

EQUAL = 0.999
"""Share of a layer's codes that has to be equal; float32's last bits move one in some ten thousand."""
NEAR = 1e-4
"""Most that a layer's output may differ from equal codes, over its largest: float32 sums of some thousand products."""
_FEW = 1000
"""Of fewer codes one may differ."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What the layers showed.

    Attributes:
        layers: how many were compared, and, last, what follows them. codes: how many went into and out of them.
        unequal: share of the codes that is the next one. worst: the largest such share of one layer.
        largest: largest difference of a layer's output from equal codes, over its largest value.
        end: the same of the network's output, from equal outputs of all its layers.
    """

    layers: int
    codes: int
    unequal: float
    worst: float
    largest: float
    end: float


@dataclass(frozen=True)
class _Place:
    """A layer in the graph: names of its output, and of its inputs' and outputs' codes with scale and zero point."""

    output: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@torch.no_grad()
def judge_layers(path: Path, model: nn.Module, given: Mapping[str, Tensor]) -> Judged:
    """Compare every layer, and what stands between them.

    Args:
        path: the file.
        model: nybble's; its outputs are compared too.
        given: inputs by name.

    Raises:
        FileError: a layer has codes that are further than a step apart, more unequal ones than :data:`EQUAL` lets be,
            or an output further off than :data:`NEAR`; or the file doesn't name a layer.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer | QuantEmbedding)}
    places, held = _run(path, list(layers), given)
    judge = _Judge(path, places, held)
    hooks = [module.register_forward_hook(judge.of(name), with_kwargs=True) for name, module in layers.items()]
    try:
        ours = next(value for value in model(**given).values() if isinstance(value, Tensor))
    finally:
        for hook in hooks:
            hook.remove()
    end = judge.near("what follows its layers", ours, torch.from_numpy(held[""]))
    left = sorted(layers.keys() - judge.seen)
    if left:
        raise FileError(f"{path}: {left[0]} is never called by the model that it is of.")
    return Judged(
        layers=len(judge.seen), codes=judge.codes, unequal=judge.unequal / max(1, judge.codes), worst=judge.worst,
        largest=judge.largest, end=end,
    )  # fmt: skip


class _Judge:
    """Compares layers as they are called, and puts onnxruntime's outputs in the place of theirs."""

    def __init__(self, path: Path, places: Mapping[str, _Place], held: Mapping[str, Any]) -> None:
        self.path, self.places, self.held = path, places, held
        self.seen: set[str] = set()
        self.codes, self.unequal, self.worst, self.largest = 0, 0, 0.0, 0.0

    def of(self, name: str) -> Any:
        """The hook of a layer."""

        def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> Tensor:
            self.seen.add(name)
            place = self.places[name]
            theirs = torch.from_numpy(self.held[place.output]).view(y.shape)
            if isinstance(module, QuantEmbedding):
                self.largest = max(self.largest, self.near(name, y, theirs))
                return theirs
            x = [*args, *kwargs.values()][0]
            if module.inputs is not None:
                x = self._same_codes(f"the inputs of {name}", module.inputs, x, place.inputs)
            weight = module.weight(x.dtype) if isinstance(module.weight, nn.Module) else module.weight
            product = module.product(x, weight, module.bias)
            if module.outputs is not None:
                self._same_codes(f"the outputs of {name}", module.outputs, product, place.outputs)
            else:
                self.largest = max(self.largest, self.near(name, product, theirs))
            return theirs

        return hook

    def near(self, name: str, ours: Tensor, theirs: Tensor) -> float:
        """The largest difference over the largest value."""
        off = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-30))
        if not off <= NEAR:  # NaN too
            raise FileError(
                f"{self.path}: from equal inputs, onnxruntime makes others of {name}, {off:.2g} of the largest off."
            )
        return off

    def _same_codes(self, name: str, quantizer: ActivationQuantizer, x: Tensor, names: tuple[str, ...]) -> Tensor:
        """Compare codes; returns onnxruntime's, dequantized."""
        if not names:
            raise FileError(f"{self.path}: nothing rounds {name}.")
        codes, scale, zero = (torch.from_numpy(self.held[part]).float() for part in names)
        scales, zeros = (part.view(-1, *(1,) * (codes.dim() - 1)) if part.dim() else part for part in (scale, zero))
        values = ((codes - zeros) * scales).view(x.shape)
        steps = _places(quantizer, quantizer(x), scale, x.shape) - _places(quantizer, values, scale, x.shape)
        unequal, most = int((steps != 0).sum()), int(steps.abs().max())
        count = steps.numel()
        self.codes, self.unequal = self.codes + count, self.unequal + unequal
        self.worst = max(self.worst, unequal / count)
        if most > 1 or unequal > max((1 - EQUAL) * count, 1 if count < _FEW else 0):
            raise FileError(
                f"{self.path}: from equal inputs, onnxruntime has other codes of {name}: {unequal} of {count}, by up "
                f"to {most} steps."
            )
        return values


def _places(quantizer: ActivationQuantizer, values: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
    """int64: which of the format's numbers, in order, each value is, under a scale for all or one for each row."""
    fmt = quantizer.quantizer.format
    by = scale if scale.dim() == 0 else scale.view(*shape[:-1], 1)
    found = (values / by).numpy()
    if fmt.is_integer:
        return torch.from_numpy(np.rint(found)).to(torch.int64)
    grid = np.asarray(fmt.grid)
    return torch.from_numpy(np.searchsorted((grid[1:] + grid[:-1]) / 2, found))


def _run(path: Path, layers: list[str], given: Mapping[str, Tensor]) -> tuple[dict[str, _Place], Any]:
    """Each layer's place, and values by name; the network's first output by the empty one."""
    import onnx
    from onnx import TensorProto, helper

    with reading(f"{path} by onnx"):
        model = onnx.load(path, load_external_data=False)
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    marked = {p.value: node.output[0] for node in graph.node for p in node.metadata_props if p.key == MARK}
    missing = [name for name in layers if name not in marked]
    if missing:
        raise FileError(f"{path}: no node is marked as the output of {missing[0]}.")
    places = {name: _place(makers, marked[name]) for name in layers}
    wanted = {part for place in places.values() for part in (place.output, *place.inputs, *place.outputs) if part}
    first, outputs = graph.output[0].name, {output.name for output in graph.output}
    names: dict[str, str] = {"": first}
    for number, name in enumerate(sorted(wanted)):
        if name in outputs:
            names[name] = name
            continue
        names[name] = f"judged_{number}"  # a cast: what it reads goes on being fused as it would be
        graph.node.append(helper.make_node("Cast", [name], [names[name]], to=TensorProto.FLOAT))
        graph.output.append(helper.make_tensor_value_info(names[name], TensorProto.FLOAT, None))
    with NamedTemporaryFile(dir=path.parent, prefix="judged.", suffix=".onnx") as file:  # finds what stands beside it
        file.write(model.SerializeToString())
        file.flush()
        with reading(f"{path} by onnxruntime"):
            found = session(Path(file.name)).run(list(names.values()), {key: v.numpy() for key, v in given.items()})
    return places, dict(zip(names, found, strict=True))


def _place(makers: Mapping[str, Any], output: str) -> _Place:
    """Follow a layer's output up to its codes."""
    node = makers[output]
    outputs = _codes(makers, node)
    if outputs:
        node = makers[makers[outputs[0]].input[0]]
    while node is not None and node.op_type not in ("MatMul", "Gemm", "Conv"):
        node = makers.get(node.input[0])
    node = None if node is None else makers.get(node.input[0])
    while node is not None and node.op_type in ("Reshape", "Pad"):
        node = makers.get(node.input[0])
    return _Place(output, _codes(makers, node), outputs)


def _codes(makers: Mapping[str, Any], node: Any) -> tuple[str, ...]:
    """Codes, scale and zero point of a DequantizeLinear of rounded inputs."""
    if node is None or node.op_type != "DequantizeLinear":
        return ()
    made = makers.get(node.input[0])
    return tuple(node.input) if made is not None and made.op_type == "QuantizeLinear" else ()
