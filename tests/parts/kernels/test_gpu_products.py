"""Products on GPUs: Triton's kernels as its interpreter runs them, and what the compiled ones are told."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.kernels import _few_rows
from nybble.kernels._gpu_weights import Weight, weight_of
from nybble.qtensor import QTensor
from nybble.quantizer import Quantizer

triton: Any = importlib.import_module("triton") if importlib.util.find_spec("triton") else None
HOST = Path(__file__).with_name("few_rows_host.h")
SHAPES = ((4, 1), (4, 1), (4, 1), (2, 1))


def packed(line: str, n: int, k: int) -> QTensor:
    generator = torch.Generator().manual_seed(n * k)
    return Quantizer(line).quantize(torch.randn(n, k, generator=generator) / k**0.5)


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="needs Triton")
@pytest.mark.parametrize(("name", "interpret"), [("interpreted", "1"), ("compiled", "0")])
def test_by_triton(name: str, interpret: str) -> None:
    """In a process of its own: whether kernels are interpreted is asked when they are first imported."""
    tests = Path(__file__).with_name(f"{name}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def compile_for_hopper(kernel: Any, *given: Any, num_warps: int = 4, num_stages: int = 3, **meta: Any) -> None:
    """What a launch would compile."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
    names |= {torch.float8_e4m3fn: "*fp8e4nv", torch.uint8: "*u8", torch.int64: "*i64"}
    signature, constants, values = {}, {}, dict(zip(kernel.arg_names, given, strict=False)) | meta
    for at, name in enumerate(kernel.arg_names):
        value = values[name]
        number = "fp32" if isinstance(value, float) else "i32"
        signature[name] = names.get(value.dtype, "*i8") if isinstance(value, torch.Tensor) else number
        if kernel.params[at].is_constexpr:
            signature[name], constants[(at,)] = "constexpr", value
    source = ASTSource(kernel, signature, constants)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}  # as of old
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.asm["cubin"]


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


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Callable[[_few_rows.Kind], Any]:
    """The source with stand-ins for PTX, compiled for a CPU."""
    folder = tmp_path_factory.mktemp("host")
    headers = [f"-include{name}" for name in ("algorithm", "barrier", "cstring", "memory", "thread", "vector")]
    flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", f'-DNYBBLE_HOST="{HOST}"', "-x", "c++"]

    @cache
    def made(kind: _few_rows.Kind) -> Any:
        target = folder / f"{kind}.so"
        command = ["g++", *headers, *flags, *_few_rows.defines(kind, SHAPES), str(_few_rows.SOURCE), "-o", str(target)]
        subprocess.run(command, check=True)
        return _few_rows._opened(target)

    return made


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("line", "shape", "rows", "dtype"),
    [
        ("int4 group=128", (40, 256), 9, torch.bfloat16),
        ("int4 group=256", (150, 512), 1, torch.bfloat16),  # a second round of tiles
        ("int4 group=128", (33, 256), 33, torch.bfloat16),
        ("int4 group=32 symmetric=false", (40, 288), 9, torch.float16),
        ("int4 block=4x32 symmetric=false", (40, 96), 2, torch.float16),
        ("int4 group=16 symmetric=false", (16, 96), 2, torch.bfloat16),
        ("nvfp4", (40, 288), 9, torch.bfloat16),
        ("nvfp4-ct", (16, 64), 2, torch.bfloat16),
        ("nf4-bnb-dq", (64, 512), 3, torch.bfloat16),
        ("float4_e2m1fn group=64 scale=pow2-ratio", (40, 256), 9, torch.bfloat16),  # outer scales, and no addend
        ("int3 group=32", (40, 96), 9, torch.bfloat16),
        ("int2 group=64", (40, 192), 9, torch.float16),
    ],
    ids=str,
)
def test_the_compiled_kernels_on_a_cpu(
    host: Callable[[_few_rows.Kind], Any], line: str, shape: tuple[int, int], rows: int, dtype: torch.dtype
) -> None:
    """Who reads, looks up, multiplies and adds what; the edges of both sides."""
    weight, (n, k) = packed(line, *shape), shape
    record = weight_of(weight)
    assert isinstance(record, Weight)
    kind = _few_rows.kind_of(record, dtype, rows)
    assert isinstance(kind, tuple)
    x, bias, out = torch.randn(rows, k).to(dtype), torch.randn(n).to(dtype), torch.full((rows, n), torch.nan).to(dtype)
    of = 1 << max(0, (-(-rows // 8) - 1).bit_length())
    args, blocks = _few_rows._args(x, record, bias, out, SHAPES[of.bit_length() - 1][0], 2)
    assert host(kind)(ctypes.addressof(args), of, blocks, None) == 0
    w, eps = weight.dequantize().double(), torch.finfo(dtype).eps / 2
    exact, size = x.double() @ w.T + bias.double(), x.double().abs() @ w.abs().T
    bound = 2 * eps * exact.abs() + (2.1 * eps + k * 2.0**-24) * size
    assert bool(((out.double() - exact).abs() <= bound).all())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_calls_keep_what_they_share(host: Callable[[_few_rows.Kind], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weight and a number of rows; x, the bias and a scale that multiplies the others are each call's own."""
    monkeypatch.setattr(_few_rows, "_stream", lambda device: None)
    monkeypatch.setattr(_few_rows, "_processors", lambda device: 2)
    weight = packed("nvfp4", 40, 288)
    record = weight_of(weight)
    assert isinstance(record, Weight)
    kind = _few_rows.kind_of(record, torch.bfloat16, 2)
    assert isinstance(kind, tuple)
    run, calls = host(kind), 0
    w, eps = weight.dequantize().double(), torch.finfo(torch.bfloat16).eps / 2
    for m, biased, by in ((2, True, None), (2, False, 3.0), (1, True, None), (2, True, 0.5)):
        x, bias = torch.randn(m, 288).bfloat16(), torch.randn(40).bfloat16()
        assert isinstance(record.scales.outer, torch.Tensor)
        outer = None if by is None else record.scales.outer * by
        made = (run, dict(zip(_few_rows.SHAPES, SHAPES, strict=True)))
        y = _few_rows.multiply(made, x, record, bias if biased else None, outer)
        exact = x.double() @ w.T * (by or 1) + (bias.double() if biased else 0)
        size = x.double().abs() @ w.abs().T * (by or 1)
        assert bool(((y.double() - exact).abs() <= 2 * eps * exact.abs() + (2.1 * eps + 2.0**-15) * size).all())
        calls += 1
    assert len(record.kept) == 2 < calls


@pytest.mark.skipif(triton is None, reason="needs Triton")
@pytest.mark.parametrize("line", ["float4_e2m1fn group=64 scale=pow2-ratio", "mxfp4", "nvfp4"])
def test_tables_of_scales_are_as_long_as_what_is_copied(line: str) -> None:
    """``few_rows.cu`` copies 256 values into shared memory, whatever the scales' bits."""
    weight = weight_of(packed(line, 64, 128))
    assert isinstance(weight, Weight) and weight.scales.table is not None and weight.scales.table.numel() == 256
