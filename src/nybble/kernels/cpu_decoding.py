"""One token of each sequence through a packed decoder's layers in one call of the compiled library."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from nybble.kernels import cpu_inputs, cpu_integers, cpu_products
from nybble.kernels._library import library, team
from nybble.kernels._weights import DTYPES
from nybble.nn.decoding import Layer, Plan, make_steps
from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


class _Projection(ctypes.Structure):
    _fields_ = (
        ("w", _POINTER), ("bias", _POINTER), ("how", _POINTER), ("whole", _POINTER), ("is_signed", _NUMBER),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Projection) for name in _LINEARS),
        *((name, _POINTER) for name in ("before", "between", "of_q", "of_k", "keys", "values")),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("layers", "last", "cosine", "sine")),
        *((name, _NUMBER) for name in ("count", "width", "inner", "heads", "key_heads", "head", "capacity", "dtype")),
        ("eps", ctypes.c_float), ("scale", ctypes.c_float),
    )  # fmt: skip


class CpuSteps:
    """See :class:`nybble.nn.decoding.Steps`; holds whatever the library's records point to."""

    def __init__(self, plan: Plan, sequences: int, tokens: int) -> None:
        self._kept: list[Any] = []
        shape = (len(plan.layers), 2, sequences, plan.key_heads, tokens, plan.head)
        self._cache, self._dtype = torch.zeros(shape), plan.dtype
        records = [self._layer(layer, *self._cache[number]) for number, layer in enumerate(plan.layers)]
        self._layers = (_Layer * len(records))(*records)
        cosine, sine = plan.rotary(plan.last[None], torch.arange(tokens)[None])
        first = plan.layers[0].linears
        self._decoder = _Decoder(
            layers=ctypes.addressof(self._layers),
            last=self._floats(plan.last),
            cosine=self._floats(cosine),
            sine=self._floats(sine),
            count=len(records),
            width=first[0].in_features,
            inner=first[4].out_features,
            heads=plan.heads,
            key_heads=plan.key_heads,
            head=plan.head,
            capacity=tokens,
            dtype=DTYPES[plan.dtype],
            eps=plan.eps,
            scale=plan.scale,
        )

    def fill(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """See :class:`nybble.nn.decoding.Steps`."""
        self._cache[layer, 0, :, :, : keys.shape[2]] = keys
        self._cache[layer, 1, :, :, : values.shape[2]] = values

    def __call__(self, x: Tensor, position: int) -> Tensor:
        """See :class:`nybble.nn.decoding.Steps`."""
        found, sequences, tokens = library(), *self._cache.shape[2:5:2]
        assert found is not None
        if position >= tokens or x.shape != (sequences, self._decoder.width):
            raise RuntimeError(f"x {list(x.shape)} at {position}, where {sequences} x {tokens} tokens have room.")
        hidden = x.float().contiguous()
        hidden = hidden.clone() if hidden is x else hidden
        failed = found.nybble_decode(
            ctypes.addressof(self._decoder), hidden.data_ptr(), sequences, position, torch.get_num_threads(),
            cpu_products._ISA, cpu_integers._ISA, team(),
        )  # fmt: skip
        if failed == 1:
            raise MemoryError("no memory for a step of a decoder.")
        if failed:  # NaN or Inf under a scale of the whole tensor: nothing is a number from there on, as with modules
            self._cache[..., position, :] = torch.nan
            hidden.fill_(torch.nan)
        return hidden.to(self._dtype)

    def _layer(self, layer: Layer, keys: Tensor, values: Tensor) -> _Layer:
        made = _Layer(before=self._floats(layer.norms[0]), between=self._floats(layer.norms[1]))
        if layer.of_heads is not None:
            made.of_q, made.of_k = (self._floats(weight) for weight in layer.of_heads)
        made.keys, made.values = keys.data_ptr(), values.data_ptr()
        for name, linear in zip(_LINEARS, layer.linears, strict=True):
            setattr(made, name, self._projection(linear))
        return made

    def _floats(self, values: Tensor) -> int:
        self._kept.append(values.float().contiguous())
        return int(self._kept[-1].data_ptr())

    def _projection(self, linear: QuantLinear) -> _Projection:
        packed, inputs = linear.weight, linear.inputs
        assert isinstance(packed, Packed)
        tensors, key, _ = packed.arguments()
        weight = cpu_products._weight(tensors, key)
        if weight is None:
            raise _UnfitError
        self._kept.append(weight)
        made = _Projection(w=weight.address, is_signed=bool(weight.signed))
        if linear.bias is not None:
            made.bias = self._floats(linear.bias.detach())
        if inputs is None:
            return made
        parts, _, line = inputs.arguments()
        whole = inputs.whole and packed.whole and cpu_integers._weight(tensors, key, packed.shape) is not None
        record: ctypes.Structure | None = None
        if not parts and not inputs.watched:
            record = cpu_integers.measured(line) if whole else cpu_inputs._rounding(line, linear.in_features)
        if record is None:
            raise _UnfitError
        self._kept.append(record)
        setattr(made, "whole" if whole else "how", ctypes.addressof(record))
        return made


class _UnfitError(Exception):
    """The library has no version of something."""


def steps(plan: Plan, sequences: int, tokens: int) -> CpuSteps | None:
    """See :data:`nybble.nn.decoding.Kernel`."""
    aligned = plan.head % 32 == 0 and plan.layers[0].linears[0].in_features % 16 == 0
    if library() is None or plan.dtype not in DTYPES or not aligned:
        return None
    try:
        return CpuSteps(plan, sequences, tokens)
    except _UnfitError:
        return None


make_steps.register_kernel("cpu")(steps)
