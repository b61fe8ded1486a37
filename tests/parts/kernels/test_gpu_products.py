"""Products on GPUs: Triton's kernels as its interpreter runs them, and what the compiled ones are told."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nybble.kernels import _few_rows
from nybble.kernels._gpu_weights import Weight, weight_of
from nybble.qtensor import QTensor
from nybble.quantizer import Quantizer


def packed(line: str, n: int, k: int) -> QTensor:
    generator = torch.Generator().manual_seed(n * k)
    return Quantizer(line).quantize(torch.randn(n, k, generator=generator) / k**0.5)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_by_the_interpreter() -> None:
    """In a process of its own: Triton asks for it when it is first imported."""
    tests = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def test_the_compiled_kernels_get_what_their_source_reads() -> None:
    struct = re.search(r"struct NybbleFewRows \{(.*?)\};", _few_rows.SOURCE.read_text(), re.DOTALL)
    assert struct is not None
    fields = re.sub(r"//.*|const|\*", "", struct.group(1)).split(";")
    names = [name.strip() for field in fields for name in re.sub(r"^\s*\w+\s", "", field).split(",") if name.strip()]
    assert names == [field[0] for field in _few_rows._Args._fields_]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("int4 group=128", (4, True, 2, False, False, False)),
        ("int4 channel", (4, True, 0, False, False, False)),
        ("int4 group=32 symmetric=false", (4, True, 2, True, True, False)),
        ("mxfp4", (4, True, 3, True, False, False)),
        ("nvfp4", (4, True, 3, True, False, True)),
        ("nf4-bnb-dq", (4, True, 4, True, False, False)),
        ("int3 group=96", "blocks of 96 columns and 1 rows"),
        ("q4_k", "codes that aren't 2 to 4 bits in rows of whole 32, or offsets"),
    ],
)
def test_kinds_of_compiled_kernels(line: str, kind: object) -> None:
    record = weight_of(packed(line, 16, 768))
    assert isinstance(record, Weight)
    assert _few_rows.kind_of(record, torch.bfloat16, 1) == kind
    if isinstance(kind, tuple):
        wide = _few_rows.kind_of(record, torch.bfloat16, 32)
        assert wide[3] is True and wide[:3] == kind[:3]


def test_work_is_shared_out() -> None:
    """Tiles by parts never exceed the warps, and parts never the steps of 128 columns."""
    record = weight_of(packed("int4 group=32", 1000, 256))
    assert isinstance(record, Weight)
    for warps, blocks in ((32, 132), (16, 264), (8, 3), (24, 1)):
        args, count = _few_rows._args(torch.zeros(1, 256), record, None, torch.zeros(1, 1000), warps, blocks)
        assert count == min(blocks, 63) and args.tiles * args.parts <= warps and args.parts <= 2
        assert args.tiles == min(warps, -(-63 // count))
