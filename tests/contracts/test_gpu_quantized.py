"""Products of two quantized operands by Triton: codes are the quantizers', sums exact or within float32's bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contracts import interpreted
from tests.waiting import NeverWaits
from torch import Tensor

from nybble.nn.compiled import key_of
from nybble.nn.float_products import float_linear
from nybble.nn.integer_products import integer_linear, reference
from nybble.ops.rounding import decode
from nybble.qtensor import QuantParams, dense
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

pytestmark = [
    interpreted.needed,
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),  # numpy's
]
TOKENS = (
    "int8 token", "int4 token", "int8 token symmetric=false", "uint8 token symmetric=false", "int8-ct-asym token",
    "float8_e4m3fn token", "float4_e2m1fn token", "int8 token scale=mse",
)  # fmt: skip
BLOCKS = ("mxfp4", "mxfp4-ocp", "mxfp4-ct", "mxfp4-modelopt", "mxfp8", "mxint8", "nvfp4", "nvfp4-ct")
PAIRS = (
    # weights, activations, the tensor cores for few rows and for many
    ("int8 channel", "int8 token", "INT8", "INT8"),
    ("int4 channel", "int8 token symmetric=false", "INT8", "INT8"),
    ("uint8 channel symmetric=false", "uint8 token symmetric=false", "INT8", "INT8"),
    ("uint4 group=64 symmetric=false", "int8 token symmetric=false", "INT8", "INT8"),
    ("int4 group=128 symmetric=false", "int8 tensor", "INT8", "INT8"),
    ("int4 group=32", "int8 token", "bfloat16", "bfloat16"),
    ("float4_e2m1fn channel", "float4_e2m1fn token", "FP8", "FP8"),
    ("float4_e2m1fn group=128", "int8 token", "INT8", "INT8"),
    ("float4_e2m1fn channel", "float8_e4m3fn token", "FP8", "FP8"),
    ("float8_e4m3fn channel", "float8_e4m3fn token", "FP8", "FP8"),
    ("int4 channel", "float8_e4m3fn token", "FP8", "FP8"),
    ("fp4-m2", "float8_e4m3fn token", "FP8", "FP8"),
    ("mxfp4", "float8_e4m3fn token", "FP8", "FP8"),
    ("mxfp4", "mxfp4", "bfloat16", "bfloat16"),
    ("nvfp4", "nvfp4-ct", "bfloat16", "bfloat16"),
    ("mxfp8", "int8 token", "bfloat16", "bfloat16"),
)
N = 37


def kernels() -> Any:
    from nybble.kernels import gpu_quantized

    return gpu_quantized


def rounded(x: Tensor, line: str) -> Any:
    rule = kernels().rounder_of(line)
    return kernels().rows_of(x, [], "", line, rule.cores, False, 0)


def hard(dtype: torch.dtype) -> Tensor:
    """Zeros, small and huge numbers, ties; 96 columns."""
    torch.manual_seed(0)
    x = torch.randn(9, 96)
    x[1], x[2], x[3] = 0, x[2] * 1e-30, x[3] * 1e30
    x[4] = torch.randint(-12, 13, (96,)) / 4
    x[4, 0], x[5] = 6, -x[5].abs()
    x[6, :32] = 0
    return x.to(interpreted.DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("line", TOKENS)
def test_codes_by_rows(line: str, dtype: torch.dtype) -> None:
    x = hard(dtype)
    rows, want = rounded(x, line), Quantizer(line).quantize(x)
    codes = rows.codes.float() if rows.zero is None else rows.codes.float() - rows.zero[:, None]
    assert torch.equal(codes * rows.scale[:, None], want.dequantize())
    x[3, 5], x[4, 7] = torch.nan, torch.inf  # as fake quantization: all of a row that was measured on it
    assert rounded(x, line).scale.isnan().tolist() == Quantizer(line).fake_quantize(x).isnan().all(1).tolist()


@pytest.mark.parametrize("line", BLOCKS)
def test_values_by_blocks(line: str) -> None:
    """Codes times block scales, exactly; the scale of scales stands apart."""
    x = hard(torch.float32)[[0, 1, 4, 5, 6, 7, 8]]
    rows, want = rounded(x, line), Quantizer(line).quantize(x)
    scale = want.params.scale
    assert isinstance(scale, BlockQTensor)
    inner = decode(scale.unpacked(), scale.format.name)
    values = decode(want.unpacked(), want.format.name).view(*inner.shape, -1) * inner[..., None]
    assert torch.equal(rows.codes.float(), values.view(x.shape))
    assert torch.allclose(rows.codes.float() * rows.scale, want.dequantize(), rtol=3e-7, atol=0)
    x[2, 3] = torch.nan
    assert bool((rounded(x, line).codes.float() * rounded(x, line).scale)[2, 3].isnan())


def test_calibrated_scales() -> None:
    x = hard(torch.float32)
    params = {"scale": torch.tensor([0.02]), "zero_point": torch.tensor([11.0])}
    for names in ("scale", "scale zero_point"):
        line = f"int8 tensor{' symmetric=false' if ' ' in names else ''} static"
        parts = [params[name].to(x.device) for name in names.split()]
        rows = kernels().rows_of(x, parts, names, line, 0, False, 0)
        codes = rows.codes.float() if rows.zero is None else rows.codes.float() - rows.zero[:, None]
        want = Quantizer(line).fake_quantize(x, QuantParams(parts[0], parts[1] if " " in names else None))
        assert torch.equal(codes * 0.02, want)


def made(weights: str, columns: int) -> tuple[BlockQTensor, list[Tensor], str]:
    torch.manual_seed(1)
    weight = Quantizer(weights).quantize(torch.randn(N, columns, device=interpreted.DEVICE) + 0.1)
    tensors = weight.tensors()
    return weight, list(tensors.values()), key_of(weight.spec(), list(tensors))


@pytest.mark.parametrize(("weights", "inputs", "few", "many"), PAIRS)
def test_products(weights: str, inputs: str, few: str, many: str) -> None:
    """Every way through the kernels: packed and expanded weights, groups, zero points, both sides' scales, a bias."""
    weight, tensors, key = made(weights, 256)
    bias = torch.randn(N, device=interpreted.DEVICE)
    for m, cores in ((3, few), (70, many)):
        x = torch.randn(m, 256, device=interpreted.DEVICE) + 0.2
        way = kernels().route(kernels().weight_of(tensors, key), inputs, m)
        assert kernels()._NAMES[way.dot] == cores
        y = kernels().linear(x, tensors, key, [N, 256], bias, [], "", inputs)
        wide, exact = Quantizer(inputs).fake_quantize(x).double(), weight.dequantize().double()
        bound = (256 + 4) * 2.0**-24 * (wide.abs() @ exact.abs().T + bias.abs())
        if interpreted.DEVICE == "cuda" and cores == "FP8":
            bound *= 2.0**10  # its accumulators keep 13 bits
        assert ((y.double() - (wide @ exact.T + bias)).abs() <= bound).all()


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("line", ["mxfp4", "nvfp4", "nvfp4-ct"])
def test_blocks_for_products(line: str, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even and odd columns apart, one scale times another; the tensor's largest found once, or by every program."""
    from nybble.kernels import gpu_quantizers

    monkeypatch.setattr(gpu_quantizers, "_ALONE", 1 << 15 if alone else 0)
    x = hard(torch.bfloat16)[[0, 1, 4, 5, 6, 7, 8]].repeat(16, 1)
    x[-1, -1] = 60
    rule, want = kernels().rounder_of(line), rounded(x, line)
    assert torch.equal((want.codes.float() * want.scale).bfloat16(), Quantizer(line).fake_quantize(x))
    times = torch.tensor([0.37], device=x.device)
    found = kernels()._rows_of_blocks(x, rule, line, None, times=times, planes=True)
    assert torch.equal(found.codes, want.codes.view(len(x), -1, 2).permute(2, 0, 1))
    assert torch.equal(found.scale, want.scale * times)


@pytest.mark.parametrize(
    ("weights", "inputs", "taken"),
    [
        ("mxfp4", "mxfp4", True),
        ("nvfp4", "nvfp4", True),
        ("mxfp4-ocp", "nvfp4", True),
        ("nvfp4", "nvfp4-ct", True),
        ("int4 group=64", "mxfp4", True),
        ("int4 group=64", "nvfp4", False),
        ("nvfp4", "float8_e4m3fn token", False),
    ],
)
def test_few_rows_of_blocks_are_exact_in_bfloat16(
    weights: str, inputs: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are multiplied as any others; the tensor's scale goes to that of the weight's scales."""
    weight, tensors, key = made(weights, 256)
    bias = torch.randn(N, device=interpreted.DEVICE).bfloat16()
    rule, bits = kernels().rounder_of(inputs), torch.finfo(torch.bfloat16).eps  # the interpreter cuts off
    for m in (1, 3):
        assert (kernels().decoded(tensors, key, rule, m) is not None) == taken
        x = (torch.randn(m, 256, device=interpreted.DEVICE) * 3 + 0.2).bfloat16()
        y = kernels().linear(x, tensors, key, [N, 256], bias, [], "", inputs)
        wide, exact = Quantizer(inputs).fake_quantize(x.float()).double(), weight.dequantize().double()
        want, size = wide @ exact.T + bias, wide.abs() @ exact.abs().T + bias.abs()
        bound = bits * want.abs() + (256 + 8) * 2.0**-24 * size
        if interpreted.DEVICE == "cuda":
            bound += 2.1 * bits * size  # Triton rounds W
        assert y.dtype == torch.bfloat16 and ((y.double() - want).abs() <= bound).all()
    assert kernels().decoded(tensors, key, rule, 17) is None
    monkeypatch.delattr(kernels().cuda_products, "product")  # which would read float32 as bfloat16
    apart = kernels().linear(x, tensors, key, [N, 256], bias.float(), [], "", inputs)
    assert ((apart.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("weights", ["int4 channel", "int8 channel symmetric=false", "float4_e2m1fn channel"])
def test_sums_of_whole_numbers(weights: str) -> None:
    """They are exact: what comes out is the sum in float32, times the two scales."""
    weight, tensors, key = made(weights, 192)
    inputs = "float4_e2m1fn token" if "e2m1" in weights else "int8 token"
    for m in (2, 66):
        x = torch.randn(m, 192, device=interpreted.DEVICE)
        y = kernels().linear(x, tensors, key, [N, 192], None, [], "", inputs)
        codes = decode(weight.unpacked(), weight.format.name)
        if weight.params.zero_point is not None:
            assert isinstance(weight.params.zero_point, BlockQTensor)
            codes = codes - dense(weight.params.zero_point)
        stored = Quantizer(inputs).quantize(x)
        whole = decode(stored.unpacked(), stored.format.name).double() @ codes.double().T
        assert isinstance(stored.params.scale, Tensor) and isinstance(weight.params.scale, Tensor)
        assert torch.equal(y, whole.float() * stored.params.scale * weight.params.scale.T)


def test_products_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to torch's own FP8 product on a GPU: expanded a part at a time, both sides' scales, a bias."""
    from nybble.kernels import _gpu_tiles

    monkeypatch.setattr(_gpu_tiles, "WHOLE", 32 * 64)
    bias = torch.randn(48, device=interpreted.DEVICE)
    for weights in ("float4_e2m1fn channel", "fp4-m2", "float8_e4m3fn channel", "int4 channel"):
        weight = Quantizer(weights).quantize(torch.randn(48, 64, device=interpreted.DEVICE))
        tensors = weight.tensors()
        plan = kernels().weight_of(list(tensors.values()), key_of(weight.spec(), list(tensors)))
        x = torch.randn(70, 64, device=interpreted.DEVICE).bfloat16()
        rows = kernels().rows_of(x, [], "", "float8_e4m3fn token", 1, False, 0)
        scale, by, factor = plan.on(1)
        y = _gpu_tiles._by_torch(rows, plan, scale, by, factor, bias, x.new_empty(70, 48))
        wide = Quantizer("float8_e4m3fn token").fake_quantize(x.float()).double()
        exact = wide @ weight.dequantize().double().T + bias.bfloat16().double()
        assert y.dtype == torch.bfloat16 and (y.double() - exact).norm() <= 3e-3 * exact.norm(), weights


def test_shapes() -> None:
    """No rows, one dimension, strides, rows that fill no tile, 16 bits; what doesn't fit goes the readable way."""
    _, tensors, key = made("int4 channel", 34)
    x = torch.randn(3, 5, 68, device=interpreted.DEVICE)[..., ::2]
    y = kernels().linear(x, tensors, key, [N, 34], None, [], "", "int8 token")
    want = reference(x, tensors, key, [N, 34], None, [], "", "int8 token")
    assert y.shape == (3, 5, N) and torch.allclose(y, want, atol=1e-4)
    assert torch.equal(kernels().linear(x[0, 1], tensors, key, [N, 34], None, [], "", "int8 token"), y[0, 1])
    assert kernels().linear(x[:0], tensors, key, [N, 34], None, [], "", "int8 token").shape == (0, 5, N)
    half = kernels().linear(x.bfloat16(), tensors, key, [N, 34], None, [], "", "int8 token")
    wide = reference(x.bfloat16().float(), tensors, key, [N, 34], None, [], "", "int8 token")
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), wide, rtol=0.01, atol=1e-4)
    for weights, inputs, why in (
        ("int4 group=17", "int8 token", "groups of 17"),
        ("nf4 group=34", "float8_e4m3fn token", "codes in nf4"),
        ("int8 channel symmetric=false", "mxfp4", "34 columns"),
        ("int4 channel", "int4 group=2", "activations by"),
    ):
        _, tensors, key = made(weights, 34)
        found = kernels().how(tensors, key, [N, 34], [], "", inputs)
        assert not found[0] and why in found[1]
    y = kernels().linear(x, *made("int4 group=17", 34)[1:], [N, 34], None, [], "", "int8 token")
    want = reference(x, *made("int4 group=17", 34)[1:], [N, 34], None, [], "", "int8 token")
    assert torch.allclose(y, want, atol=1e-4)


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [("int4 group=128", ""), ("nvfp4", "nvfp4"), ("nvfp4", "nvfp4-ct"), ("fp4-m2", "float8_e4m3fn token"),
     ("int4 channel", "int8 token symmetric=false")],
)  # fmt: skip
def test_a_second_call_waits_for_no_device(weights: str, inputs: str) -> None:
    """And brings no numbers to it: a CUDA graph can be made of it."""
    from nybble.kernels import cuda_products

    _, tensors, key = made(weights, 256)
    for m in (1, 20):
        x = torch.randn(m, 256, device=interpreted.DEVICE).bfloat16()
        given = (x, tensors, key, [N, 256], None)

        def call(given: Any = given) -> Tensor:
            found: Tensor = kernels().linear(*given, [], "", inputs) if inputs else cuda_products.linear(*given)
            return found

        call()
        with NeverWaits():
            call()


def test_the_schemas_hold() -> None:
    _, tensors, key = made("float4_e2m1fn channel", 64)
    x = torch.randn(2, 64, device=interpreted.DEVICE)
    for op, line in ((float_linear, "float8_e4m3fn token"), (integer_linear, "int8 token")):
        given: tuple[Any, ...] = (x, tensors, key, [N, 64], None, [], "", line)
        torch.library.opcheck(getattr(torch.ops.nybble, op._name).default, given)


def test_an_old_triton_is_refused() -> None:
    from nybble.kernels._gpu import check_version

    check_version("3.6.0")
    with pytest.raises(ImportError, match=r"3\.2\.0 is older"):
        check_version("3.2.0")


def test_a_weight_is_told_to_each_kernel_by_itself() -> None:
    """What one kernel keeps with the codes is not what another looks for: inputs may be rounded, or not."""
    from nybble.kernels import cuda_products

    _, tensors, key = made("int4 channel", 64)
    x = torch.randn(3, 64, device=interpreted.DEVICE).half()
    wanted = kernels().linear(x, tensors, key, [N, 64], None, [], "", "int8 token")
    plain = cuda_products.linear(x, tensors, key, [N, 64], None)
    assert torch.equal(kernels().linear(x, tensors, key, [N, 64], None, [], "", "int8 token"), wanted)
    assert torch.equal(cuda_products.linear(x, tensors, key, [N, 64], None), plain) and not torch.equal(plain, wanted)
