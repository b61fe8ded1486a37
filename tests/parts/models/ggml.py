"""ggml's own encoders and decoders as an oracle: the shared library of the package libggml-python, by ctypes."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class Traits(ctypes.Structure):
    """``ggml_type_traits`` of ggml.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("nbytes", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", _TO_FLOAT),
        ("from_float", ctypes.c_void_p),
    )


def found() -> bool:
    """Whether the package is installed."""
    return find_spec("libggml") is not None


@cache
def _library() -> ctypes.CDLL:
    spec = find_spec("libggml")
    assert spec is not None and spec.origin is not None
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("lib*/libggml-base.so"))))
    library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    )  # fmt: skip
    return library


def traits(number: int) -> Traits:
    """Of a type, by ggml's number."""
    made: Traits = _library().ggml_get_type_traits(number).contents
    return made


def to_float(number: int, data: Array) -> Array:
    """Bytes -> float32, flat."""
    kind, data = traits(number), np.ascontiguousarray(data)
    out = np.empty(data.size // kind.nbytes * kind.block, np.float32)
    kind.to_float(data.ctypes.data, out.ctypes.data, out.size)
    return out


def quantize_chunk(number: int, x: Array, importance: Array | None = None) -> Array:
    """float32 [rows, columns] -> bytes; ``importance`` [columns], as an imatrix has it."""
    kind, x = traits(number), np.ascontiguousarray(x, np.float32)
    out = np.zeros(x.size // kind.block * kind.nbytes, np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    place = None if weights is None else weights.ctypes.data
    _library().ggml_quantize_chunk(number, x.ctypes.data, out.ctypes.data, 0, x.shape[0], x.shape[1], place)
    return out
