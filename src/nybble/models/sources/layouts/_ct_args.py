"""Which of compressed-tensors' QuantizationArgs a tensor or a quantizer is, if any; without that library.

Fields are those of its ``quantization/quant_args.py``. What it can't say comes with the nearest line that it can.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from nybble.formats import NumberFormat
from nybble.granularity import Granularity, fitting_sizes
from nybble.kv_format import KVFormat, one_scale, tokens_a_scale
from nybble.nn.kv_model import KVRecord
from nybble.qtensor import Inverse, QTensor
from nybble.qtensor.block import BlockQTensor
from nybble.qtensor.low_rank_sum import LowRankSum
from nybble.qtensor.outer_scaled import OuterScaled
from nybble.quantizer import Quantizer

Args = dict[str, Any]
E4M3, E2M1, E2M3, E8M0 = "float8_e4m3fn", "float4_e2m1fn", "float6_e2m3fn", "float8_e8m0fnu"
_FLOATS = {E4M3: 8, E2M1: 4, E2M3: 6}
_INTEGER = re.compile(r"(u?)int([1-8])(_full)?|ternary")
_WITHOUT = {
    "low-rank-sum": "the same without the correction lorc, or a merged adapter",
    "split": "one quantizer for all columns",
    "vector": "a scalar format, int2 group=64 symmetric=false",
}


def _without(tensor: QTensor) -> str:
    """What is nearest to a tensor that is more than codes and scales."""
    if isinstance(tensor, OuterScaled) and isinstance(tensor.base, BlockQTensor):  # factors of rows go into scales
        bits = tensor.base.format.bits
        return "int2 group=64 symmetric=false" if bits < 3 else f"int{bits} {'channel' if bits == 8 else 'group=32'}"
    return _WITHOUT.get(tensor.kind, "one format with a scale a group")


class CannotError(Exception):
    """What compressed-tensors has no words for.

    Attributes:
        came: what it is. nearest: what can be said instead. why: what is wrong, where ``came`` doesn't say it.
    """

    def __init__(self, came: str, nearest: str, why: str = "") -> None:
        super().__init__(f"{came}: {why or 'no such scheme'}; it takes {nearest}")
        self.came, self.nearest, self.why = came, nearest, why


@dataclass(frozen=True)
class Strategy:
    """Who shares a scale: ``tensor``, ``channel``, ``group`` of ``group_size`` columns, ``block`` of ``structure``."""

    name: str
    group_size: int | None = None
    structure: tuple[int, int] | None = None

    def args(self) -> Args:
        """The fields that say so."""
        found: Args = {"strategy": self.name}
        if self.group_size is not None:
            found["group_size"] = self.group_size
        if self.structure is not None:
            found["block_structure"] = list(self.structure)
        return found


# -------------------------------------------------------------------------------------------------------------- weights
def weight_args(tensor: QTensor) -> Args:
    """Of a matrix, which may be on the meta device.

    Raises:
        CannotError: it is none of them.
    """
    came = in_words(tensor)
    if not isinstance(tensor, BlockQTensor):
        raise CannotError(came, _without(tensor))
    rows, columns = tensor.shape
    if tensor.params.grid is not None:
        raise CannotError(came, f"{tensor.format.name} as it is", "its code book was learned")
    if tensor.params.offset is not None:
        raise CannotError(came, f"int{max(2, tensor.format.bits)} group=32 symmetric=false", "it has a real offset")
    args = _weight(tensor.format, tensor, came)
    found = strategy(tensor.granularity, rows, columns, came) if "group_size" not in args else None
    return {**args, **(found.args() if found else {}), "dynamic": False}


def _weight(fmt: NumberFormat, tensor: BlockQTensor, came: str) -> Args:
    params, columns = tensor.params, tensor.shape[1]
    if _INTEGER.fullmatch(fmt.name):
        _check_scale(tensor, came)
        zero_point = params.zero_point
        plain = isinstance(zero_point, BlockQTensor) and zero_point.params.scale is None
        if zero_point is not None and (not plain or zero_point.format.bits != fmt.bits):  # type: ignore[union-attr]
            raise CannotError(came, f"int{fmt.bits} symmetric=false", "zero points of another format")
        if zero_point is None and fmt.name.startswith("u"):
            raise CannotError(came, f"int{fmt.bits}", "it has no sign")
        return {"num_bits": fmt.bits, "type": "int", "symmetric": zero_point is None}
    if fmt.name not in _FLOATS:
        raise CannotError(came, _nearest(fmt, tensor.granularity, columns))
    found: Args = {"num_bits": _FLOATS[fmt.name], "type": "float", "symmetric": True}
    group = _group_of(tensor.granularity, tensor.shape[0], columns, came)
    if is_mx(tensor) and group == 32:
        return {**found, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    if fmt.name == E2M1 and group == 16 and is_nvfp4(tensor):
        return {**found, "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
    if fmt.name != E4M3:
        raise CannotError(came, _nearest(fmt, tensor.granularity, columns))
    _check_scale(tensor, came)
    return found


def _check_scale(tensor: BlockQTensor, came: str) -> None:
    scale = tensor.params.scale
    if scale is not None and not isinstance(scale, torch.Tensor | QTensor):
        plain = f"{tensor.format.name} channel" if tensor.granularity.factored else f"{tensor.format.name} group=32"
        raise CannotError(came, plain, "its scale is made of factors, or kept as a reciprocal")


def is_mx(tensor: BlockQTensor) -> bool:
    """Whether its scales are powers of two kept as exponents."""
    scale = tensor.params.scale
    return isinstance(scale, BlockQTensor) and scale.format.name == E8M0 and scale.params.scale is None


def is_nvfp4(tensor: BlockQTensor) -> bool:
    """Whether its scales are E4M3 over one number, or over one divisor."""
    scale = tensor.params.scale
    if not isinstance(scale, BlockQTensor) or scale.format.name != E4M3 or scale.params.zero_point is not None:
        return False
    outer = scale.params.scale
    outer = outer.divisor if isinstance(outer, Inverse) else outer
    return isinstance(outer, torch.Tensor) and outer.numel() == 1 and scale.params.offset is None


def strategy(granularity: Granularity, rows: int, columns: int, came: str) -> Strategy:
    """Who shares a scale of a matrix, in compressed-tensors' words.

    Raises:
        CannotError: it has no word for it.
    """
    word, _, size = str(granularity).split()[0].partition("=")
    if word == "tensor":
        return Strategy("tensor")
    if word in ("channel", "token"):
        return Strategy("channel")
    if word == "group":
        return Strategy("group", _dividing(int(size), columns, came))
    if word == "block":
        high, wide = (int(n) for n in size.split("x"))
        if high == 1:
            return Strategy("group", _dividing(wide, columns, came))
        _dividing(wide, columns, came)
        return Strategy("block", structure=(high, wide))
    if word == "flat":
        if int(size) >= rows * columns:
            return Strategy("tensor")
        return Strategy("group", _dividing(int(size), columns, came))
    raise CannotError(came, came.replace(str(granularity), "channel"))


def _dividing(size: int, columns: int, came: str) -> int:
    if columns % size:
        why = f"{columns} columns are no multiple of {size}"
        raise CannotError(came, f"group sizes that divide them: {fitting_sizes(columns)}", why)
    return size


def _group_of(granularity: Granularity, rows: int, columns: int, came: str) -> int | None:
    try:
        return strategy(granularity, rows, columns, came).group_size
    except CannotError:
        return None


def _nearest(fmt: NumberFormat, granularity: Granularity, columns: int) -> str:
    """A line of about as many bits, that divides the columns."""
    shared = str(granularity) if re.fullmatch(r"group=\d+|channel|tensor", str(granularity)) else "group=32"
    if fmt.name == E2M1:
        known = [line for line, group in (("nvfp4", 16), ("mxfp4", 32)) if columns % group == 0]
        return " or ".join(known) or f"int4 group={fitting_sizes(columns, most=1)}"
    if fmt.bits == 6 and fmt.exponent_bits and columns % 32 == 0:
        return "mxfp6"
    if fmt.bits == 8 and fmt.exponent_bits and not fmt.is_integer:
        return f"{E4M3} {shared}"
    return f"int{min(8, max(2, fmt.bits))} {shared}"


def in_words(tensor: QTensor) -> str:
    """What a tensor is, for people."""
    if isinstance(tensor, LowRankSum):
        return f"{in_words(tensor.base)} and factors of rank {tensor.a.shape[-1]} (an adapter merged, or lorc)"
    if not isinstance(tensor, BlockQTensor):
        word = tensor.kind.replace("_", " ")
        return f"{'an' if word[0] in 'aeiou' else 'a'} {word} tensor"
    found = f"{tensor.format.name} {tensor.granularity}"
    scale = tensor.params.scale
    if isinstance(scale, BlockQTensor):
        found += f" scale_format=({scale.format.name} {scale.granularity})"
    elif isinstance(scale, torch.Tensor):
        found += f" scale_format={str(scale.dtype).removeprefix('torch.')}"
    return found


def above(fmt: NumberFormat) -> int:
    """By how much the codes of an integer, unsigned ones, are above those of compressed-tensors, which are signed."""
    return 1 << (fmt.bits - 1) if fmt.name.startswith("u") else 0


# ---------------------------------------------------------------------------------------------------------- activations
def activation_args(quantizer: Quantizer) -> Args:
    """Of what enters or leaves a layer.

    Raises:
        CannotError: it is none of them.
    """
    came, fmt = str(quantizer), quantizer.format
    word, _, size = str(quantizer.granularity).split()[0].partition("=")
    if word not in ("tensor", "token", "group") or quantizer.center or quantizer.scale.has_offset:
        raise CannotError(came, "int8 token, float8_e4m3fn token")
    if is_one(quantizer) and not quantizer.static:
        raise CannotError(came, f"{fmt} tensor static", "runtimes measure a scale, and this has none")
    where: Args = {"strategy": word, "dynamic": not quantizer.static}
    if word == "group":
        where["group_size"] = int(size)
    inner = quantizer.scale_format if isinstance(quantizer.scale_format, Quantizer) else None
    if _INTEGER.fullmatch(fmt.name) and fmt.name != "ternary" and inner is None:
        symmetric = not quantizer.scale.needs_integer
        if symmetric and fmt.name.startswith("u"):
            raise CannotError(came, f"int{fmt.bits} {word}", "it has no sign")
        return {"num_bits": fmt.bits, "type": "int", "symmetric": symmetric, **where}
    floats: Args = {"num_bits": fmt.bits, "type": "float", "symmetric": True, **where}
    if inner is not None and inner.format.name == E8M0 and fmt.name in _FLOATS and where.get("group_size") == 32:
        return {**floats, "scale_dtype": torch.uint8}
    if fmt.name == E4M3 and inner is None:
        return floats
    if fmt.name == E2M1 and where.get("group_size") == 16:
        if quantizer.static and quantizer.scale.takes_divisor and inner is not None and inner.format.name == E4M3:
            return {**floats, "strategy": "tensor_group", "dynamic": "local", "scale_dtype": torch.float8_e4m3fn}
        why = "the scale of its scales is measured on every tensor, and runtimes want a calibrated one"
        raise CannotError(came, "nvfp4-ct static, mxfp4, float8_e4m3fn token, or inputs in float", why)
    raise CannotError(came, "int8 token, float8_e4m3fn token, mxfp4 or mxfp8")


def is_one(quantizer: Quantizer) -> bool:
    """Whether it has no scale: the format's own values."""
    return str(quantizer.scale) == "one"


def kv_args(kv: KVRecord, width: int | None) -> Args:
    """Of a KV cache: every token of every head has scales of its own, or there is one number a layer: calibrated, or 1.

    The latter is what vLLM serves: E4M3 that isn't ``dynamic``, with ``k_scale`` and ``v_scale`` beside each layer.

    Args:
        kv: what the model caches in.
        width: of a head; None where it isn't known.

    Raises:
        CannotError: it is none of them.
    """
    formats = {kv} if isinstance(kv, KVFormat) else set(kv.values())
    found = next(iter(formats))
    if all(_one_number(one) for one in formats) and len({one.static for one in formats}) == 1:
        return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    came, nearest = f"KV cache {found}", "one quantizer for keys and values of all layers, float8_e4m3fn token"
    if len(formats) > 1 or found.keys is None or found.keys != found.values:
        raise CannotError(came, nearest, "keys and values, or layers, differ")
    if not found.plain:
        nearest = nearest if tokens_a_scale(found.keys) > 1 else str(found.keys)
        raise CannotError(came, nearest, "no tokens are left in float, scaled together, rotated or sorted")
    if found.keys.static or one_scale(found.keys) is not None:
        why = "with one scale for all tokens it is E4M3"
        raise CannotError(came, f"{E4M3} tensor static, or {E4M3} tensor scale=one", why)
    args = activation_args(found.keys)
    if args["strategy"] == "token":
        if width is None:
            raise CannotError(came, nearest, "the width of a head isn't known")
        args |= {"strategy": "group", "group_size": width}  # its "token" is a whole chunk of a head
    return args


def _one_number(kv: KVFormat) -> bool:
    """Whether keys and values are E4M3 under one scale each, which may be still to be calibrated."""
    sides = (kv.keys, kv.values)
    return kv.plain and all(
        q is not None and q.format.name == E4M3 and (q.static or one_scale(q) is not None) for q in sides
    )
