"""compressed-tensors as an oracle: scales, codes, values and bytes of INT, FP8, NVFP4, MXFP4, MXFP6."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from nybble.core.errors import FileError, SchemeError
from nybble.learned import ACTIVATIONS
from nybble.learned.lsq import Lsq
from nybble.nn.activation import ActivationQuantizer
from nybble.ops.rounding import decode
from nybble.packing import get_layout
from nybble.qtensor import Inverse, QuantParams, dense
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

REASON = "the oracle of vLLM's checkpoints: pip install compressed-tensors"
with warnings.catch_warnings():  # what it warns of at import is none of ours
    warnings.simplefilter("ignore")
    quantization = pytest.importorskip("compressed_tensors.quantization", reason=REASON)
    from compressed_tensors.compressors.mx_utils import compress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize, quantize
    from compressed_tensors.quantization.quant_scheme import NVFP4
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp


def inputs(group: int) -> Tensor:
    """float32 [48, 768]: normal rows of many sizes, quotients on ties, an outlier, a zero group, a tiny row."""
    x = torch.randn(48, 768) * torch.exp2(torch.randint(-12, 12, (48, 1)).float())
    x[0, :group] = 0
    x[1, 5] = 1e4
    x[2] *= 1e-5
    ties = torch.arange(-16, 16).repeat(768 // 32) / 2
    x[3] = ties  # symmetric INT4: a tie at every other element
    x[4] = ties + 3
    x[5] = (
        torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(96) * torch.randint(2, (768,)).sub(0.5).sign()
    )
    x[6] = x[5] * 0.37
    return x


def their_params(x: Tensor, args: object, group: int, over: Tensor | None = None) -> tuple[Tensor, Tensor]:
    cut = x.view(len(x), -1, group)
    scale, zero_point = calculate_qparams(cut.amin(-1), cut.amax(-1), args, global_scale=over)
    return scale, zero_point


def scale_of(tensor: BlockQTensor) -> Tensor:
    assert tensor.params.scale is not None
    return dense(tensor.params.scale)  # type: ignore[arg-type]


def signed(codes: Tensor, bits: int) -> Tensor:
    """Bit patterns in two's complement as integers."""
    values = codes.int()
    return torch.where(values >= 2 ** (bits - 1), values - 2**bits, values).to(torch.int8)


# ---------------------------------------------------------------------------------------------------------- integers
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 64), (8, 768), (3, 32)])
def test_integers(bits: int, group: int, symmetric: bool) -> None:
    x = inputs(group)
    strategy: dict[str, object] = {"strategy": "group", "group_size": group}
    args = quantization.QuantizationArgs(num_bits=bits, symmetric=symmetric, **strategy)
    scale, zero_point = their_params(x, args, group)
    if symmetric:
        q = Quantizer(
            f"int{bits}_full group={group} scale_format=float32", scale=f"absmax(target={2 ** (bits - 1) - 0.5})"
        )
    else:
        q = Quantizer(f"int{bits}_full group={group} symmetric=false scale_format=float32 rounding=nearest-even-code")
    ours = q.quantize(x)
    filled = (
        x.view(48, -1, group).abs().amax(-1) > 0
    )  # a zero group gets scale 1 here, epsilon there; its codes are equal
    assert torch.equal(scale_of(ours)[filled], scale[filled])
    if not symmetric:
        assert ours.params.zero_point is not None
        assert torch.equal(dense(ours.params.zero_point)[filled].to(torch.int8), zero_point[filled])
    theirs = quantize(x, scale, zero_point, args, dtype=torch.int8)
    same = filled.repeat_interleave(group, 1) if not symmetric else torch.ones_like(x, dtype=torch.bool)
    assert torch.equal(signed(ours.unpacked(), bits)[same], theirs[same])
    values = dequantize(theirs, scale, zero_point, args)
    assert torch.equal(ours.dequantize(), values) and torch.equal(q.fake_quantize(x), values)
    assert torch.equal(fake_quantize(x, scale, zero_point, args), values)


def test_the_presets_say_the_same() -> None:
    assert Quantizer("int4-ct") == Quantizer("int4_full group=128 scale=absmax(target=7.5) scale_format=float32")
    assert Quantizer("int8-ct") == Quantizer("int8_full channel scale=absmax(target=127.5)")
    assert Quantizer("int4-ct-asym") == Quantizer(
        "int4_full group=128 symmetric=false scale_format=float32 rounding=nearest-even-code"
    )
    assert Quantizer("int8-ct-asym") == Quantizer("int8_full channel symmetric=false rounding=nearest-even-code")


def test_the_order_of_rounding_matters() -> None:
    """Ties with an odd zero point: without ``nearest-even-code`` some codes differ from theirs."""
    x = torch.cat([torch.arange(-14, 17) / 2, torch.zeros(1)])[None]  # -7 .. 8: scale 1, zero point -1
    plain, theirs = (
        Quantizer(f"int4_full group=32 symmetric=false{w}").quantize(x) for w in ("", " rounding=nearest-even-code")
    )
    assert not torch.equal(plain.unpacked(), theirs.unpacked())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [32, 64, 40])
def test_pack_quantized_bytes(bits: int, columns: int) -> None:
    """int32 words of offset-binary codes: our dense stream of ``code + 2**(bits - 1)``, row by row, padded to words."""
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, columns), dtype=torch.int8)
    packed = pack_to_int32(codes, bits)
    offset = (codes.int() + 2 ** (bits - 1)).to(torch.uint8)
    words = math.ceil(columns * bits / 32)
    for row in range(5):
        ours = get_layout("dense").pack(offset[row], bits)
        ours = torch.nn.functional.pad(ours, (0, 4 * words - ours.numel()))
        assert torch.equal(ours.view(torch.int32), packed[row])
        again = get_layout("dense").unpack(
            packed[row].view(torch.uint8)[: get_layout("dense").size(columns, bits)], bits, columns
        )
        assert torch.equal(again, offset[row])
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)


# ------------------------------------------------------------------------------------------------------------ floats
@pytest.mark.parametrize(
    "line", ["float8_e4m3fn channel", "float8_e4m3fn token", "float8_e4m3fn group=64 scale_format=float32"]
)
def test_fp8(line: str) -> None:
    x = inputs(64)
    group = 64 if "group" in line else 768
    args = quantization.QuantizationArgs(num_bits=8, type="float", strategy="group", group_size=group)
    scale, zero_point = their_params(x, args, group)
    q = Quantizer(line)
    ours = q.quantize(x)
    filled = x.view(48, -1, group).abs().amax(-1) > 0
    assert torch.equal(scale_of(ours).view(48, -1)[filled], scale[filled])
    theirs = quantize(x, scale, zero_point, args, dtype=torch.float8_e4m3fn)
    assert torch.equal(decode(ours.unpacked(), "float8_e4m3fn"), theirs.float())
    assert torch.equal(ours.dequantize(), dequantize(theirs, scale, zero_point, args))


def nvfp4_args() -> object:
    return quantization.QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )


def test_nvfp4() -> None:
    """The global divisor, the E4M3 scales, the packed bytes and the values."""
    x, args = inputs(16), nvfp4_args()
    over = generate_gparam(x.amin(), x.amax())
    scale, _ = their_params(x, args, 16, over)
    ours = Quantizer("nvfp4-ct").quantize(x)
    nested = ours.params.scale
    assert isinstance(nested, BlockQTensor) and isinstance(nested.params.scale, Inverse)
    assert torch.equal(nested.params.scale.divisor, over)
    assert torch.equal(nested.unpacked().view(torch.float8_e4m3fn).float(), scale.float())
    theirs = quantize(x, scale, None, args, global_scale=over)
    packed = pack_fp4_to_uint8(theirs)
    zero = (x == 0) & x.signbit()  # torch.sign drops it
    assert not zero.any()
    assert torch.equal(ours.codes.view(48, -1), packed)
    assert torch.equal(unpack_fp4_from_uint8(ours.codes.view(48, -1), 48, 768, torch.float32), theirs)
    values = dequantize(theirs, scale, None, args, global_scale=over)
    assert torch.equal(ours.dequantize(), values)
    assert torch.equal(Quantizer("nvfp4-ct").fake_quantize(x), values)


@pytest.mark.parametrize("inner", [448, 256])
def test_searched_nvfp4_is_plain_nvfp4(inner: int) -> None:
    """Their decoder reads adaptive scales as any others, to the same values; no block is worse than by theirs."""
    x, args = inputs(16), nvfp4_args()
    ours = Quantizer("nvfp4-ct", scale=f"stored(inner={inner})").quantize(x)
    nested = ours.params.scale
    assert isinstance(nested, BlockQTensor) and isinstance(nested.params.scale, Inverse)
    over = nested.params.scale.divisor
    assert over.item() == pytest.approx(generate_gparam(x.amin(), x.amax()).item() * inner / 448, rel=1e-7)
    scale = nested.unpacked().view(torch.float8_e4m3fn).float()
    values = unpack_fp4_from_uint8(ours.codes.view(48, -1), 48, 768, torch.float32)
    assert torch.equal(dequantize(values, scale, None, args, global_scale=over), ours.dequantize())
    error, theirs = (
        (q - x).double().square().view(-1, 16).sum(1)
        for q in (ours.dequantize(), Quantizer("nvfp4-ct").fake_quantize(x))
    )
    assert error.sum() < 0.8 * theirs.sum() and (inner == 256 or bool((error <= theirs * (1 + 1e-5)).all()))


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 32), torch.full((2, 32), 1e-37), torch.full((2, 32), 1e-30)], ids=["0", "1e-37", "1e-30"]
)
def test_nvfp4_at_the_edge(x: Tensor) -> None:
    over = generate_gparam(x.amin(), x.amax())
    scale, _ = their_params(x, nvfp4_args(), 16, over)
    ours = Quantizer("nvfp4-ct").quantize(x)
    nested = ours.params.scale
    assert isinstance(nested, BlockQTensor) and isinstance(nested.params.scale, Inverse)
    assert torch.equal(nested.params.scale.divisor, over)
    assert torch.equal(dense(nested), scale / over)
    assert torch.equal(
        ours.codes.view(2, -1), pack_fp4_to_uint8(quantize(x, scale, None, nvfp4_args(), global_scale=over))
    )


def test_plain_nvfp4_differs_in_last_bits_alone() -> None:
    x = torch.randn(256, 768)
    x[0, 0] = 5.3  # a maximum whose 2688-th part and its reciprocal do not multiply to 1
    plain, theirs = Quantizer("nvfp4").quantize(x), Quantizer("nvfp4-ct").quantize(x)
    ratio = scale_of(plain) / scale_of(theirs)
    codes = (plain.unpacked() != theirs.unpacked()).float().mean()
    # E4M3 neighbours are up to 1/8 apart: where the quotient is next to a tie, the scale moves by one code.
    assert 0 < (ratio - 1).abs().max() < 0.13
    assert ((ratio - 1).abs() > 1e-6).float().mean() < 1e-3
    assert codes < 1e-3


@pytest.mark.parametrize(("preset", "bits"), [("mxfp4-ct", 4), ("mxfp6-ct", 6)])
def test_mx(preset: str, bits: int) -> None:
    """The exponent bytes by the rule that we call ``even``, the elements, the values; zero groups too."""
    x = inputs(32)
    args = quantization.QuantizationArgs(
        num_bits=bits, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8
    )
    scale, _ = their_params(x, args, 32)
    q = Quantizer(preset)
    ours = q.quantize(x)
    nested = ours.params.scale
    assert isinstance(nested, BlockQTensor)
    assert torch.equal(nested.unpacked(), compress_mx_scale(scale, torch.uint8))
    theirs = quantize(x, scale, None, args)
    assert torch.equal(decode(ours.unpacked(), q.format.name), theirs)
    if bits == 4:
        assert torch.equal(ours.codes.view(48, -1), pack_fp4_to_uint8(theirs))
    assert torch.equal(ours.dequantize(), dequantize(theirs, scale, None, args))


def test_mxfp4_scales_at_every_mantissa() -> None:
    """Block maxima just below, at and above 1.75, where the exponent carries; the other modes differ."""
    points = np.array([1, 1.25, 1.5, 1.7499999, 1.75, 1.7500001, 1.9999999], np.float32)
    top = torch.from_numpy(np.ldexp(points[:, None], np.arange(-40, 40)).astype(np.float32)).flatten()
    x = torch.zeros(len(top), 32)
    x[:, 3] = top
    args = quantization.QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8
    )
    scale, _ = their_params(x, args, 32)
    assert torch.equal(scale_of(Quantizer("mxfp4-ct").quantize(x)), scale)
    for mode in ("floor", "ceil", "rceil"):
        other = Quantizer(f"float4_e2m1fn group=32 scale=pow2(mode={mode})").quantize(x)
        assert not torch.equal(scale_of(other), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_of_nvfp4_under_a_calibrated_divisor(dtype: torch.dtype) -> None:
    """Divisor, scales of 16 inputs and values as the library finds them, beyond what was calibrated too."""
    args, quantizer = NVFP4["input_activations"], Quantizer("nvfp4-ct static")
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        seen = torch.randn(100, 64, generator=generator) * 3
        x = torch.randn(5, 7, 64, generator=generator) * torch.exp(3 * torch.randn(5, 7, 64, generator=generator))
        x[0, 0, :16] = 0
        x[0, 1] *= 1e-6
        x = x.to(dtype)
        params = quantizer.fit(seen.flatten())
        theirs = generate_gparam(seen.min(), seen.max())
        assert isinstance(params.scale, Inverse) and torch.equal(params.scale.divisor, theirs)
        layer = ActivationQuantizer(quantizer, params)
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), global_scale=theirs)
        wanted = fake_quantize(x, scale, zero, args, global_scale=theirs)
        if dtype == torch.float32:
            assert torch.equal(layer(x), wanted)
        else:  # they measure in bfloat16: a scale may come to lie on the other side of a tie
            assert (layer(x) != wanted).float().mean() < 0.01
        again = ActivationQuantizer.from_dict(layer.to_dict())
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again(x), layer(x))
        assert torch.equal(layer(x.clone().requires_grad_()), layer(x))  # what training computes
        largest = layer(torch.full((1, 16), 1e9)).max()  # saturates: 448 * 6 over the divisor
        assert largest == (torch.tensor(448.0) / theirs * 6)


def test_what_has_no_divisor_to_calibrate() -> None:
    with pytest.raises(SchemeError, match="nvfp4-ct static"):
        ActivationQuantizer(Quantizer("nvfp4 static"), QuantParams(torch.ones(1)))
    with pytest.raises(SchemeError, match=r"lsq learns one scale for all activations.*under a divisor"):
        Lsq().check(Quantizer("nvfp4-ct static"), ACTIVATIONS)
    with pytest.raises(FileError, match=r"static parameters of .* can't be \['scale'\]"):
        ActivationQuantizer.from_dict({"quantizer": "nvfp4-ct static", "static": ["scale"]})
