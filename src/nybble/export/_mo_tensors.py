"""The bytes of ModelOpt's folders, from a tensor's own: codes keep their value, nothing is rounded.

=============================  ====================================================================================
NVFP4                          ``weight`` uint8 [out, in / 2], low nibble first; ``weight_scale`` float8_e4m3fn;
                               ``weight_scale_2`` float32 [], by which the scales are *multiplied*
mxfp4                          ``weight`` the same; ``weight_scale`` uint8 exponents [out, in / 32]
MXFP8                          ``weight`` float8_e4m3fn; ``weight_scale`` uint8 exponents
FP8, FP8_PER_CHANNEL..., W8..  ``weight`` float8_e4m3fn or int8; ``weight_scale`` float32 [] or [out]
fp8_pb_wo                      ``weight`` float8_e4m3fn; ``weight_scale`` float32 [out / 128, 1, in / 128, 1]
W4A16_AWQ                      ``weight`` uint8 [out / 2, in], the first of two rows in the low nibble;
                               ``weight_scale`` float32 [out, in / group]
=============================  ====================================================================================
Where inputs are rounded with one number, or NVFP4's under one: ``input_scale`` float32 [], a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nybble.core.tensorfile import Planned
from nybble.export._ct_layers import nvfp4_groups, stored_under
from nybble.export._ct_tensors import Matrix, scale_of
from nybble.export._mo_scheme import NEAREST, Algorithm, algorithm_of
from nybble.export._modules import check_apart, check_module
from nybble.export._reciprocal import reciprocals
from nybble.export._source import Layer, Source
from nybble.models.sources.layouts._ct_args import CannotError
from nybble.nn.activation import ActivationQuantizer
from nybble.packing._nibbles import CHUNK, interleave
from nybble.qtensor import Inverse, dense
from nybble.qtensor.block import BlockQTensor

_E4M3 = torch.float8_e4m3fn
_FORMS = {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized", "mxfp8": "mxfp8-quantized"}


@dataclass(frozen=True)
class Placed:
    """A module of the checkpoint.

    Attributes:
        name: of it there. layer: what it is of. algorithm: what it is. matrix: its weight.
        factor: of an NVFP4 weight, ``weight_scale_2``.
    """

    name: str
    layer: Layer
    algorithm: Algorithm
    matrix: Matrix
    factor: float | None = None

    def tensors(self, source: Source) -> dict[str, Planned]:
        """What is written, by full name."""
        found = self._weight()
        filled = source.activation(self.layer, "inputs")
        if filled is not None and filled.quantizer.static:
            value = input_factor(filled).reshape(())
            found["input_scale"] = _made("F32", (), lambda: value)
        return {f"{self.name}.{name}": plan for name, plan in found.items()}

    def _weight(self) -> dict[str, Planned]:
        algo, matrix = self.algorithm.name, self.matrix
        rows, columns = matrix.shape
        if algo == "W4A16_AWQ":
            return {
                "weight": _made("U8", (rows // 2, columns), lambda: _row_pairs(matrix.read())),
                "weight_scale": self._plain((rows, columns // self.algorithm.group_size)),
            }
        given = matrix.tensors()
        found = {"weight": given.get("weight_packed", given.get("weight"))}
        if matrix.form in _FORMS.values():
            found["weight_scale"] = given["weight_scale"]
            if self.factor is not None:
                factor = torch.tensor(self.factor, dtype=torch.float32)
                found["weight_scale_2"] = _made("F32", (), lambda: factor)
        else:
            found["weight_scale"] = self._plain(self._scale_shape())
        return {name: plan for name, plan in found.items() if plan is not None}

    def _scale_shape(self) -> tuple[int, ...]:
        rows, columns = self.matrix.shape
        if self.algorithm.name == "fp8_pb_wo":
            return rows // 128, 1, columns // 128, 1
        return () if self.matrix.args["strategy"] == "tensor" else (rows,)

    def _plain(self, shape: tuple[int, ...]) -> Planned:
        return _made("F32", shape, lambda: _scales(self.matrix.read()).reshape(shape))


def input_factor(filled: ActivationQuantizer) -> Tensor:
    """``input_scale`` of a static quantizer, float32 [1]: of a divisor what has it as its reciprocal, if anything."""
    state = filled.state_dict()
    return torch.tensor(next(reciprocals(state["divisor"]))) if "divisor" in state else state["scale"].float()


def _made(dtype: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Planned:
    return Planned(dtype=dtype, shape=shape, bytes_from=make)


def _scales(tensor: BlockQTensor) -> Tensor:
    scale = tensor.params.scale
    if scale is None:
        return torch.ones(tensor.granularity.scale_shape(tensor.shape))
    assert isinstance(scale, Tensor | BlockQTensor)
    return dense(scale)


def _row_pairs(tensor: BlockQTensor) -> Tensor:
    """int4 [rows, columns] -> uint8 [rows / 2, columns]."""
    if tensor.layout != "dense" or tensor.shape[1] % 2:
        codes = tensor.unpacked()  # two's complement in both
        return codes[::2] | codes[1::2] << 4
    pairs = tensor.codes.view(tensor.shape[0] // 2, 2, -1).numpy()
    out = np.empty((len(pairs), tensor.shape[1]), np.uint8)
    step = max(1, CHUNK // tensor.shape[1])
    for start in range(0, len(pairs), step):
        part = pairs[start : start + step]
        out[start : start + step] = interleave(part[:, 0], part[:, 1])
    return torch.from_numpy(out)


# ------------------------------------------------------------------------------------------------ NVFP4's factor
def exact_factor(outer: Tensor | Inverse) -> float | None:
    """What E4M3 scales are multiplied with to give the values that they have; None where no float32 does.

    A factor is kept. Of a divisor it is the reciprocal or a neighbour of it: one that gives the same float32 products
    where there is one (of a power of two there is), else the same in bfloat16, in which ModelOpt calculates.
    """
    if not isinstance(outer, Inverse):
        return outer.float().reshape(-1)[0].item()
    return _exact(outer.divisor.float().reshape(-1)[0].item())


@cache
def _exact(value: float) -> float | None:
    divisor = torch.tensor([value], dtype=torch.float32)
    scales = torch.arange(1, 127, dtype=torch.uint8).view(_E4M3).float()
    halves = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float32)[:, None]
    wanted = halves * (scales / divisor)
    candidates = list(reciprocals(divisor))
    products = [halves * (scales * each) for each in candidates]
    for dtype in (torch.float32, torch.bfloat16):
        for each, product in zip(candidates, products, strict=True):
            if torch.equal(product.to(dtype), wanted.to(dtype)):
                return each
    return None


def factor_of(source: Source, layer: Layer, prefix: str) -> float | None:
    """:func:`exact_factor` of an NVFP4 weight; one number is read, once."""
    key = ("factor", prefix)
    if key not in source.known:
        source.known[key] = _factor_of(source, layer, prefix)
    found: float | None = source.known[key]
    return found


def _factor_of(source: Source, layer: Layer, prefix: str) -> float | None:
    weight = layer.weights[prefix]
    assert isinstance(weight, BlockQTensor)
    outer = scale_of(weight).params.scale
    name = "scale.scale.divisor" if isinstance(outer, Inverse) else "scale.scale"
    value = source.tensor(f"{prefix}.{name}")
    return exact_factor(Inverse(value) if isinstance(outer, Inverse) else value)


# --------------------------------------------------------------------------------------------------------- the model
def algorithm(model: nn.Module, layer: Layer) -> Algorithm:
    """What a layer is.

    Raises:
        CannotError: ModelOpt has none.
    """
    kind = layer.kind
    if kind.reads_another or (not kind.fused and isinstance(model.get_submodule(layer.name), nn.Embedding)):
        raise CannotError("a quantized embedding", "embeddings in float")
    if kind.operands:
        raise CannotError("the operands of attention", "--matmuls left out")
    if not kind.fused:
        check_module(model.get_submodule(layer.name))
    if kind.fused and layer.weights:
        rows = next(iter(layer.weights.values())).shape[0]
        check_apart(model, layer.name, len(layer.weights), rows, bool(layer.entry.get("transposed", False)))
    sides = [None if side is None else side.quantizer for side in (layer.inputs, layer.outputs)]
    found = {algorithm_of(weight, *sides).name: algorithm_of(weight, *sides) for weight in layer.weights.values()}
    if len(found) != 1:
        if not layer.weights:
            algorithm_of(None, *sides)
        raise CannotError("experts in different formats", "one format for all experts of a layer")
    return next(iter(found.values()))


def shared_factors(source: Source, model: Any) -> dict[str, tuple[float, float | None]]:
    """NVFP4 layers that runtimes join, whose factors differ and can be made one: layer -> factor, and its divisor.

    Only powers of two lie between such; a block's scale takes up the difference.
    """
    found: dict[str, tuple[float, float | None]] = {}
    for group, divisor in nvfp4_groups(source, model):
        own = {
            factor_of(source, source.layers[name], prefix) for name in group for prefix in source.layers[name].weights
        }
        if len(own) > 1 and divisor is not None:
            factor = exact_factor(Inverse(torch.tensor([divisor])))
            if factor is not None:
                found |= dict.fromkeys(group, (factor, divisor))
    return found


def placed(source: Source, model: Any) -> Iterator[Placed]:
    """All quantized modules of the checkpoint.

    Raises:
        CannotError: one that ModelOpt has no words for; ``check`` said so.
    """
    shared = shared_factors(source, model)
    for layer in source.layers.values():
        found = algorithm(model, layer)
        for name, prefix, rows in stored_under(source, model, layer, layer):
            kind = next((form for word, form in _FORMS.items() if _is(layer, prefix, word)), "")
            form = kind or ("float-quantized" if found.args["type"] == "float" else "int-quantized")
            factor, divisor = shared.get(layer.name, (None, None))
            if form == _FORMS["nvfp4"] and factor is None:
                factor = factor_of(source, layer, prefix)
                if factor is None:
                    raise CannotError("NVFP4 over a divisor", NEAREST)
            matrix = Matrix(source, layer, prefix, rows, found.args, form, divisor)
            yield Placed(name, layer, found, matrix, factor)


def _is(layer: Layer, prefix: str, word: str) -> bool:
    weight = layer.weights[prefix]
    assert isinstance(weight, BlockQTensor)
    nested = isinstance(weight.params.scale, BlockQTensor)
    if word == "mxfp8":
        return nested and weight.format.bits == 8 and weight.format.name == "float8_e4m3fn"
    mx = nested and scale_of(weight).format.name == "float8_e8m0fnu"
    return nested and weight.format.name == "float4_e2m1fn" and mx == (word == "mxfp4")


def decoded(found: Mapping[str, Tensor], algo: Algorithm) -> Tensor:
    """The values of a module's tensors by ModelOpt's formulas, in torch's own dtypes: float32 [out, in]."""
    weight, scale = found["weight"], found["weight_scale"]
    if algo.name == "W4A16_AWQ":
        codes = torch.stack([weight & 15, weight >> 4], 1).flatten(0, 1)
        values = ((codes ^ 8).to(torch.int16) - 8).float()
        return values * scale.repeat_interleave(algo.group_size, 1)
    if weight.dtype != torch.uint8:
        values = weight.float()
        if scale.dtype == torch.uint8:
            return values * torch.exp2(scale.float() - 127).repeat_interleave(32, 1)
        if scale.dim() == 4:
            return values * scale[:, 0, :, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
        return values * scale.reshape(-1, 1)
    half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([half, -half])[torch.stack([weight & 15, weight >> 4], -1).flatten(1).long()]
    if scale.dtype == torch.uint8:
        return values * torch.exp2(scale.float() - 127).repeat_interleave(32, 1)
    each = scale.float() * found["weight_scale_2"].float()
    return values * each.repeat_interleave(algo.group_size, 1)
