"""Triton's kernels where they can run: on a GPU, else in its interpreter, which has to be chosen before they load."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # 0: tests of what Triton compiles, in a process of their own
needed = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton isn't installed")
