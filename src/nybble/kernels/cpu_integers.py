"""Products of whole numbers on a CPU, by the compiled library; what it can't read is multiplied as floats."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from nybble.kernels import cpu_products
from nybble.kernels._library import library, team
from nybble.kernels._weights import DTYPES, Weight
from nybble.nn.compiled import quantizer_of, static_params
from nybble.nn.integer_products import integer_linear, rounded
from nybble.qtensor import QTensor, QuantParams, dense
from nybble.quantizer import Quantizer
from nybble.rounding import get_rounding
from nybble.scales.absmax import AbsMax
from nybble.scales.minmax import MinMax

_ISA = 5
_LEAST = 2
"""The set of instructions below which products of floats are faster."""
_SETS = {0: "any processor", 2: "AVX2", 3: "AVX-VNNI", 4: "AVX-512 VNNI", 5: "AVX-512 VNNI, AMX from 16 rows on"}
_GIVEN, _ABSMAX, _MINMAX = range(3)


class _Inputs(ctypes.Structure):
    _fields_ = (
        ("scale", ctypes.c_void_p), ("zero", ctypes.c_void_p), ("rule", ctypes.c_int64), ("many", ctypes.c_int64),
        ("inside", ctypes.c_int64), ("target", ctypes.c_float), ("low", ctypes.c_float), ("high", ctypes.c_float),
        ("shift", ctypes.c_int32),
    )  # fmt: skip


def linear(
    x: Tensor,
    tensors: Sequence[Tensor],
    key: str,
    shape: Sequence[int],
    bias: Tensor | None,
    parts: Sequence[Tensor],
    names: str,
    line: str,
) -> Tensor:
    """See :func:`nybble.nn.integer_products.reference`."""
    weight = _weight(tensors, key, shape) if x.numel() and x.dtype in DTYPES else None
    if weight is None:
        return cpu_products.linear(rounded(x, parts, names, line), tensors, key, shape, bias)
    n, k = shape
    given = None if _fused(line) else _given(x, parts, names, line)
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], n))
    wide = None if bias is None else bias.float().contiguous()
    _run(weight, x, x.numel() // k, wide, out, _rule(line), given)
    return out


def how(
    tensors: Sequence[Tensor], key: str, shape: Sequence[int], parts: Sequence[Tensor], names: str, line: str
) -> tuple[bool, str]:
    """See ``integer_linear.how``."""
    found = library()
    if found is None or _weight(tensors, key, shape) is None:
        return False, "no product of whole numbers"
    return True, f"compiled product of whole numbers, {_SETS[min(_ISA, found.nybble_whole_isa())]}"


def _weight(tensors: Sequence[Tensor], key: str, shape: Sequence[int]) -> Weight | None:
    """The record of a weight with which whole numbers are multiplied."""
    if shape[0] * shape[1] < cpu_products.SMALL:
        return None
    weight, found = cpu_products._weight(tensors, key), library()
    if weight is None or weight.signed is None or found is None:
        return None
    fit = min(_ISA, found.nybble_whole_isa()) >= _LEAST and found.nybble_whole_knows(weight.address, _ISA)
    return weight if fit else None


def _run(
    weight: Weight,
    x: Tensor,
    rows: int,
    bias: Tensor | None,
    out: Tensor,
    inputs: _Inputs,
    given: tuple[Tensor, Tensor | None] | None,
) -> None:
    found = library()
    assert found is not None
    if given is not None:
        scale, zero = given
        inputs = _Inputs.from_buffer_copy(inputs)  # another thread may be using the rule
        inputs.scale, inputs.many = scale.data_ptr(), scale.numel() > 1
        inputs.zero = None if zero is None else zero.data_ptr()
    failed = found.nybble_whole(
        weight.address,
        bool(weight.signed),
        ctypes.addressof(inputs),
        x.data_ptr(),
        DTYPES[x.dtype],
        rows,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        DTYPES[out.dtype],
        torch.get_num_threads(),
        _ISA,
        team(),
    )
    if failed:
        raise MemoryError(f"no memory for a product of whole numbers with a weight [{weight.n}, {weight.k}].")


@lru_cache(maxsize=4096)
def _fused(line: str) -> bool:
    """Whether scales are measured where x is rounded."""
    quantizer = quantizer_of(line)
    plain = str(quantizer.granularity) == "token" and quantizer.scale_format == "float32"
    return plain and isinstance(quantizer.scale, AbsMax | MinMax) and not quantizer.static


def measured(line: str) -> _Inputs | None:
    """The library's record of a quantizer whose scales it measures itself; None of others."""
    return _rule(line) if _fused(line) else None


@lru_cache(maxsize=4096)
def _rule(line: str) -> _Inputs:
    quantizer = quantizer_of(line)
    fmt, scale = quantizer.format, quantizer.scale
    rule = _GIVEN if not _fused(line) else _ABSMAX if isinstance(scale, AbsMax) else _MINMAX
    target = (scale.target if isinstance(scale, AbsMax) else 0) or fmt.absmax
    return _Inputs(
        rule=rule,
        inside=get_rounding(quantizer.rounding).zero_inside,
        target=target,
        low=fmt.min,
        high=fmt.max,
        shift=128 if fmt.max > 127 else 0,
    )


def _given(x: Tensor, parts: Sequence[Tensor], names: str, line: str) -> tuple[Tensor, Tensor | None]:
    """Scales of x and its zero points, float32, one a row or one for all."""
    quantizer: Quantizer = quantizer_of(line)
    params = static_params(quantizer, dict(zip(names.split(), parts, strict=True)))
    params = quantizer.fit(x) if params is None else params
    return _flat(params, "scale"), None if params.zero_point is None else _flat(params, "zero_point")


def _flat(params: QuantParams, part: str) -> Tensor:
    value = getattr(params, part)
    if value is None:
        return torch.ones(1)
    assert isinstance(value, Tensor | QTensor)
    return dense(value).float().reshape(-1).contiguous()


integer_linear.register_kernel("cpu", how)(linear)
