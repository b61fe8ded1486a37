"""The compiled library for the tests of it; None, without a warning, where there is no compiler."""

from __future__ import annotations

import ctypes
import warnings

import pytest

from nybble.kernels import _library


def library() -> ctypes.CDLL | None:
    """As the kernels have it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _library.library()


needed = pytest.mark.skipif(library() is None, reason="the compiled CPU kernels need a C++ compiler")
