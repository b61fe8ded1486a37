"""Every fast version against the readable one, bit for bit, and torch's own check of each op.

``torch.library.custom_op`` keeps the function it decorates as ``_init_fn``; that is the readable version of an op,
which the registered kernels hide when the op is called. The benefit of asking for it: the test needs no second list of
references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.contracts.inputs import all_float16, near_decisions, random_bits, same
from torch import Tensor

from nybble.formats import format_names, get_format
from nybble.kernels import _chunks, _rounders
from nybble.ops import blocks as block_ops
from nybble.ops import measured, straight, tables
from nybble.ops import rounding as rounding_ops
from nybble.ops.scaling import POW2_MODES
from nybble.rounding import REGISTRY as ROUNDINGS
from nybble.rounding import get_rounding

FORMATS = format_names()
DETERMINISTIC = [name for name in ROUNDINGS.names() if not get_rounding(name).stochastic]
OPS = {
    "round_to": rounding_ops.round_to,
    "encode": rounding_ops.encode,
    "decode": rounding_ops.decode,
    "scaled_round": block_ops.scaled_round,
    "dynamic_round": block_ops.dynamic_round,
    "table_round": tables.table_round,
    "table_encode": tables.table_encode,
    "table_decode": tables.table_decode,
    "around": tables.around,
    "whole_codes": rounding_ops.whole_codes,
    "narrowed": block_ops.narrowed,
    "dynamic_scale": measured.dynamic_scale,
    "nested_scale": measured.nested_scale,
    "straight_round": straight.straight_round,
    "straight_round_backward": straight.straight_round_backward,
}
SHAPES = [(0, 32), (3, 0), (1, 1), (5, 7), (3000, 33), (2, 70_000), (40_000, 1)]


def readable(name: str) -> Callable[..., Tensor]:
    reference: Callable[..., Tensor] = OPS[name]._init_fn
    return reference


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def takes(fmt: str, rounding: str) -> bool:
    return not get_rounding(rounding).native or get_format(fmt).encoder_thresholds is not None


def test_every_op_of_the_library_is_here() -> None:
    """An op that has no line in OPS is not tested."""
    found = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("nybble::")
    }
    # test_operands.py; what they calculate: test_products.py, test_integer_products.py, test_rotation.py and others
    elsewhere = {
        "cached_attention", "dequantize", "experts", "fake_quantize", "fake_quantize_backward", "float_linear",
        "integer_linear", "packed_linear", "packed_rows", "read_tokens", "rotate", "rounded_inputs", "store_tokens",
    }  # fmt: skip
    assert found - elsewhere == set(OPS)


@pytest.mark.parametrize("rounding", DETERMINISTIC)
@pytest.mark.parametrize("fmt", FORMATS)
def test_elementwise(fmt: str, rounding: str) -> None:
    if not takes(fmt, rounding):
        return
    x = torch.cat([near_decisions(get_format(fmt)), all_float16(), random_bits(8000)])
    for name in ("round_to", "encode"):
        assert same(OPS[name](x, fmt, rounding), readable(name)(x, fmt, rounding)), name
    # A sequence of one kind only: no cell or chunk may depend on its neighbours.
    for value in (torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45):
        one = torch.full((3,), value)
        for name in ("round_to", "encode"):
            assert same(OPS[name](one, fmt, rounding), readable(name)(one, fmt, rounding)), (name, value)


@pytest.mark.parametrize("fmt", FORMATS)
def test_decode(fmt: str) -> None:
    form = get_format(fmt)
    codes = torch.arange(2**form.bits, dtype=rounding_ops.code_dtype(form)).repeat(-(-70_000 // 2**form.bits))
    assert same(OPS["decode"](codes, fmt), readable("decode")(codes, fmt))
    assert same(OPS["decode"](codes.view(-1, 2).t(), fmt), readable("decode")(codes.view(-1, 2).t(), fmt))


def block_inputs(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Normal blocks among zero, huge, subnormal and NaN ones."""
    x = torch.randn(shape)
    if x.numel() and shape[0] > 8:
        x[0] = 0
        x[1] = -0.0
        x[2] *= 1e30
        x[3] = torch.randint(-9, 9, x[3].shape) * 2.0**-149
        x[4, 0] = torch.nan
        x[5, -1] = torch.inf
        x[6] = 2.0**-126
        x[7] *= 3e38 / x[7].abs().max()
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", ["float4_e2m1fn", "int4", "nf4", "float16_e8m7"])
def test_blocks(fmt: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = block_inputs(shape, dtype)
    scales = [torch.rand(shape[0], 1) + 0.01, torch.rand(shape) - 0.5]
    for scale in scales:
        scale[: shape[0] // 3] *= 1e-40
        if scale.numel():
            scale[0] = 0
        for reciprocal in (False, True):
            args = (x, scale, fmt, "nearest-even", reciprocal)
            assert same(OPS["scaled_round"](*args), readable("scaled_round")(*args))
    if shape[1] == 0:
        return
    target = get_format(fmt).absmax
    for pow2, narrow in (
        ("", "float32"),
        ("", "bfloat16"),
        ("", "float16"),
        ("floor", "float32"),
        ("rceil", "float16"),
    ):
        arguments = (x, fmt, "nearest-even", target, pow2, narrow)
        assert same(OPS["dynamic_round"](*arguments), readable("dynamic_round")(*arguments)), (pow2, narrow)


@pytest.mark.parametrize("fmt", FORMATS)
def test_blocks_of_every_format(fmt: str) -> None:
    x = block_inputs((300, 32), torch.float32)
    for rounding in DETERMINISTIC:
        if takes(fmt, rounding):
            arguments = (x, fmt, rounding, get_format(fmt).absmax, "", "float32")
            assert same(OPS["dynamic_round"](*arguments), readable("dynamic_round")(*arguments)), rounding
            scale = torch.rand(300, 1) + 0.01
            assert same(OPS["scaled_round"](x, scale, fmt, rounding), readable("scaled_round")(x, scale, fmt, rounding))


@pytest.mark.parametrize("mode", POW2_MODES)
def test_powers_of_two(mode: str, threads: int) -> None:
    x = block_inputs((6000, 32), torch.float32)
    for fmt in ("float4_e2m1fn", "float8_e5m2", "int8", "float6_e2m3fn"):
        arguments = (x, fmt, "nearest-even", 1.0, mode, "float32")
        assert same(OPS["dynamic_round"](*arguments), readable("dynamic_round")(*arguments))


def test_strides_and_modes(threads: int) -> None:
    """Views, inference mode and inputs that want gradients, large enough to be shared among threads."""
    wide = torch.randn(64, 8192)
    for x in (wide.t(), wide[:, ::2], wide[::3], wide.expand(2, 64, 8192)[1]):
        want = readable("round_to")(x, "float4_e2m1fn", "nearest-even")
        assert same(OPS["round_to"](x, "float4_e2m1fn", "nearest-even"), want)
        arguments = (x, "nf4", "half-down", 1.0, "", "float32")
        assert same(OPS["dynamic_round"](*arguments), readable("dynamic_round")(*arguments))
    arguments = (wide.view(-1, 32), "int4", "nearest-even", 7.0, "", "float32")
    want = readable("dynamic_round")(*arguments)
    with torch.inference_mode():
        assert same(OPS["dynamic_round"](wide.clone().view(-1, 32), *arguments[1:]), want)
        assert same(OPS["round_to"](wide.clone(), "nf4", "native"), readable("round_to")(wide, "nf4", "native"))
    with torch.no_grad():
        assert same(OPS["dynamic_round"](*arguments), want)
    learned = wide.clone().requires_grad_()
    out = OPS["round_to"](learned, "float4_e2m1fn", "nearest-even")
    assert same(out.detach(), readable("round_to")(wide, "float4_e2m1fn", "nearest-even"))


BACKWARD = torch.randn(2, 16, 6).transpose(1, 2).bfloat16()


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("round_to", (torch.randn(5, 7), "float4_e2m1fn", "nearest-even")),
        ("round_to", (torch.randn(5, 7).t(), "nf4", "half-down")),
        ("round_to", (torch.randn(40_000), "float16_e8m7", "nearest-even")),
        ("encode", (torch.randn(5, 7).t(), "float4_e2m1fn", "nearest-even")),
        ("encode", (torch.randn(33), "float16_e5m10", "half-away")),
        ("decode", (torch.arange(16, dtype=torch.uint8).view(4, 4).t(), "nf4")),
        ("decode", (torch.arange(300, dtype=torch.int32), "float16_e5m10")),
        ("scaled_round", (torch.randn(6, 32), torch.rand(6, 1), "int4", "nearest-even", False)),
        ("scaled_round", (torch.randn(32, 6).t().half(), torch.rand(6, 32), "nf4", "native", True)),
        ("dynamic_round", (torch.randn(6, 32).bfloat16(), "float4_e2m1fn", "nearest-even", 6.0, "", "float16")),
        ("dynamic_round", (torch.randn(32, 6).t(), "float8_e4m3fn", "half-away", 448.0, "floor", "float32")),
        ("table_round", (torch.randn(32, 6).t(), torch.tensor([-0.5, 0.1, 0.7]), torch.tensor([-1.0, 0.0, 0.5, 1.0]))),
        ("table_encode", (torch.randn(7, 5).t(), torch.tensor([-0.5, 0.7]), torch.arange(3, dtype=torch.uint8))),
        ("table_decode", (torch.arange(16, dtype=torch.uint8).view(4, 4).t(), torch.randn(16))),
        ("around", (torch.randn(6, 5).t(), torch.tensor([-1.0, 0.0, 2.0]), True)),
        ("whole_codes", (torch.randn(6, 5).t(), torch.ones(5, 1), 0.0, 15.0, "half-up")),
        ("narrowed", (torch.randn(5, 7).t(), "float16")),
        ("dynamic_scale", (torch.randn(32, 6).t().half(), "int4", 7.0, "", "float16")),
        ("nested_scale", (torch.randn(32, 16).bfloat16(), 6.0, "float8_e4m3fn", 448.0, 2.0**-6)),
        ("straight_round", (torch.randn(6, 16), torch.rand(6, 1), None, torch.randn(16, 6).t(), "nf4", "nearest-even")),
        ("straight_round", (torch.randn(6, 16), torch.rand(6, 1), None, None, "nf4", "nearest-even", torch.bfloat16)),
        (
            "straight_round_backward",
            (*BACKWARD, torch.rand(6, 1), torch.ones(6, 1), None, "uint4", "nearest-even", True, True, True),
        ),
    ],
)
def test_opcheck(name: str, args: tuple[Any, ...]) -> None:
    """Schema, fake (shape, dtype, strides) and autograd registration."""
    torch.library.opcheck(OPS[name], args)


def test_the_fast_path_is_taken() -> None:
    """A kernel that always fell back to the readable version would pass everything above."""
    for fmt in FORMATS:
        if get_format(fmt).bits <= 8:
            assert _rounders.rounder(fmt, "nearest-even") is not None, fmt
    for fmt in ("float4_e2m1fn", "float6_e3m2fn", "float8_e4m3fn", "float8_e5m2"):
        assert _rounders.adder(fmt, "nearest-even") is not None, fmt


@pytest.mark.parametrize("columns", [1, 7, 32, 4096, 1_000_000])
@pytest.mark.parametrize("count", [1, 5, 40_000, 524_288])
def test_chunks_cover_everything_once(count: int, columns: int, threads: int) -> None:
    parts = list(_chunks.parts(count, columns))
    assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])] and parts[-1][1] == count
    assert all(start < stop for start, stop in parts)
    if threads == 1:
        assert max(stop - start for start, stop in parts) <= max(1, _chunks.ALONE // columns)


def test_large_results() -> None:
    """Over OWN_MAPPING bytes, where huge pages are asked for; all threads, a tail, and half-precision results."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = torch.randn(300_007, 32)
        assert x.nbytes > _chunks.OWN_MAPPING
        x[123_456, 7], x[299_999] = torch.nan, 0
        for fmt, dtype in (("float4_e2m1fn", torch.float32), ("nf4", torch.float32), ("float8_e5m2", torch.bfloat16)):
            arguments = (x.to(dtype), fmt, "nearest-even", get_format(fmt).absmax, "", "float32")
            assert same(OPS["dynamic_round"](*arguments), readable("dynamic_round")(*arguments))
    finally:
        torch.set_num_threads(before)
