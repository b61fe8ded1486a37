"""Products of whole numbers by the compiled library: x's codes are the quantizer's, sums exact within a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts import compiled
from torch import Tensor

from nybble.kernels import cpu_integers, cpu_products
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.compiled import key_of
from nybble.nn.integer_products import integer_linear, reference
from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed
from nybble.qtensor import QTensor, QuantParams
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

WEIGHTS = [
    "int8 channel", "int8 tensor", "int8 channel symmetric=false", "uint8 channel symmetric=false", "int8 group=32",
    "int8_full group=128 symmetric=false", "int8 group=512 symmetric=false", "int4 channel symmetric=false",
    "int4 group=64", "int4 group=32 symmetric=false", "int4 group=48 symmetric=false", "int4 group=16",
    "int4 block=6x64", "int4-ct-asym", "uint4 group=32 scale=least-squares(offset=true)", "q4_k",
    "int2 group=16 symmetric=false", "int2 channel", "int3 group=96", "int5 channel symmetric=false",
    "int6 group=16 symmetric=false",
]  # fmt: skip
INPUTS = [
    "int8 token", "int8 tensor", "int8 token symmetric=false", "uint8 tensor symmetric=false", "uint8 token",
    "int8-ct-asym token", "int4 token", "int8 token scale=mse", "int8 token scale_format=float16",
]  # fmt: skip
ROWS = 30
BEST = 0 if (made := compiled.library()) is None else made.nybble_whole_isa()
FLAGS = cpuinfo.read_text() if (cpuinfo := Path("/proc/cpuinfo")).is_file() else ""
ISAS = [isa for isa in (0, 2, 3, 4, 5) if isa <= BEST and (isa != 3 or BEST == 3 or "avx_vnni" in FLAGS)]
TILES_IN_C = 9
pytestmark = compiled.needed


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights and slow processors too."""
    monkeypatch.setattr(cpu_products, "SMALL", 1)
    monkeypatch.setattr(cpu_integers, "_LEAST", 0)


@pytest.fixture(params=ISAS, ids={0: "portable", 2: "avx2", 3: "avxvnni", 4: "vnni", 5: "amx"}.get)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cpu_integers, "_ISA", request.param)
    number: int = request.param
    return number


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each product of whole numbers."""
    found: list[int] = []
    run: Callable[..., None] = cpu_integers._run

    def counted(*given: Any) -> None:
        found.append(1)
        run(*given)

    monkeypatch.setattr(cpu_integers, "_run", counted)
    return found


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def packed(line: str, rows: int = ROWS, columns: int = 192) -> BlockQTensor:
    torch.manual_seed(0)
    return Quantizer(line).quantize(torch.randn(rows, columns) + 0.3)


def multiplied(
    x: Tensor, weight: QTensor, inputs: str, bias: Tensor | None = None, params: dict[str, Tensor] | None = None
) -> Tensor:
    tensors, params = weight.tensors(), params or {}
    key, static = key_of(weight.spec(), list(tensors)), (list(params.values()), " ".join(params))
    return integer_linear(x, list(tensors.values()), key, list(weight.shape), bias, *static, inputs)


def test_this_machine_has_the_library() -> None:
    """What follows would else compare floats with floats."""
    assert ISAS[0] == 0 and made is not None


@pytest.mark.parametrize("line", WEIGHTS)
def test_sums(line: str, isa: int, calls: list[int]) -> None:
    """Within float32's bound of float64 on the quantized operands, and the same whatever stands beside a row."""
    columns = (
        1024
        if "512" in line
        else 256
        if line in ("q4_k", "int4-ct-asym", "int8_full group=128 symmetric=false")
        else 192
    )
    weight, torch_x = packed(line, columns=columns), torch.randn(9, columns) + 0.2
    dense = weight.dequantize().double()
    known = isa >= 4 or weight.format.bits in (2, 4, 8)
    for inputs in INPUTS:
        for rows in (1, 2, 9):
            x = torch_x[:rows]
            calls.clear()
            y = multiplied(x, weight, inputs)
            assert len(calls) == known
            rounded = Quantizer(inputs).fake_quantize(x).double()
            bound = columns * 2**-24 * (rounded.abs() @ dense.abs().T) + 1e-30
            assert ((y.double() - rounded @ dense.T).abs() <= bound).all(), (inputs, rows)
            if rows == 1:
                alone = y
            elif known and "token" in inputs:
                assert torch.equal(y[:1], alone), (inputs, rows)


def hard_rows(dtype: torch.dtype) -> Tensor:
    """Near ties, zeros, subnormal and huge numbers, NaN and infinity, each in rows of its own."""
    torch.manual_seed(0)
    x = torch.randn(40, 200)
    ties = (torch.randint(-127, 127, (12, 200)) + 0.5) * torch.logspace(-3, 3, 12).view(-1, 1)
    x[:12] = ties + ties * torch.randint(-3, 4, (12, 200)) * 2.0**-24
    x[12], x[13], x[14] = 0, -0.0, x[14].abs()
    x[15] = torch.randint(-9, 9, (200,)) * 2.0**-149
    x[16] = torch.randint(-900, 900, (200,)) * 2.0**-149
    x[17] *= 2.0**-120
    x[18] *= 3e38 / x[18].abs().max()
    x[19, 7], x[20, 199], x[21, 0] = torch.nan, torch.inf, -torch.inf
    x[22], x[23] = torch.nan, -x[23].abs()
    x[24] = torch.randint(-127, 128, (200,)).float()
    x[25, :3] = torch.tensor([torch.inf, torch.nan, -torch.inf])
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes_of_x(dtype: torch.dtype, isa: int, calls: list[int]) -> None:
    """W is the identity: what comes out is x as the quantizer rounds it, bit for bit."""
    eye, x = Quantizer("int8 tensor scale=one").quantize(torch.eye(200)), hard_rows(dtype)
    finite = x[[i for i in range(40) if x[i].isfinite().all()]]
    static = {"scale": torch.tensor([0.03]), "zero_point": torch.tensor([11.0])}
    for inputs in INPUTS:
        for rows in (x, finite, x[15:16], x[19:20]):
            want = Quantizer(inputs).fake_quantize(rows)
            assert torch.equal(multiplied(rows, eye, inputs).nan_to_num(7e4), want.nan_to_num(7e4)), inputs
    for line, params in (
        ("int8 tensor static", {"scale": static["scale"]}),
        ("int8 tensor symmetric=false static", static),
    ):
        given = QuantParams(params["scale"], params.get("zero_point"))
        want = Quantizer(line).fake_quantize(x, given)
        found = multiplied(x, eye, line, params=params)
        lost = x.isnan().any(1)  # a sum with NaN is NaN
        assert torch.equal(found[~lost], want[~lost]) and bool(found[lost].isnan().all()), line
    assert len(calls) == 4 * len(INPUTS) + 2


@pytest.mark.parametrize("tiles", [TILES_IN_C, *(isa for isa in ISAS if isa > 4)])
@pytest.mark.parametrize(
    "line",
    ["int8 channel", "int8 channel symmetric=false", "uint8 tensor symmetric=false", "int4 channel", "int2 channel"],
)
def test_tiles(line: str, tiles: int, two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What AMX multiplies, in its own order of bytes: the bits of any processor's sums."""
    weight, bias = packed(line, 70, 200), torch.randn(70)
    wide = packed(line, 330, 448)  # more than one thread takes at a time
    for inputs in ("int8 token", "int8 token symmetric=false", "uint8 tensor symmetric=false"):
        for x, w in (
            (torch.randn(50, 200), weight),
            (hard_rows(torch.float32)[:33], weight),
            (torch.randn(16, 448), wide),
        ):
            given = (x, w, inputs, bias if w is weight else None)
            monkeypatch.setattr(cpu_integers, "_ISA", 0)
            want = multiplied(*given)
            monkeypatch.setattr(cpu_integers, "_ISA", tiles)
            assert torch.equal(multiplied(*given).nan_to_num(7e4), want.nan_to_num(7e4)), (inputs, len(x))
            found = multiplied(x.bfloat16(), w, inputs)
            monkeypatch.setattr(cpu_integers, "_ISA", 0)
            assert torch.equal(found.nan_to_num(7e4), multiplied(x.bfloat16(), w, inputs).nan_to_num(7e4))


def test_sums_beyond_32_bits(isa: int) -> None:
    """66,000 columns of the largest codes on both sides."""
    weight = Quantizer("uint8 channel symmetric=false").quantize(torch.full((2, 66_000), 5.0))
    x = torch.full((3, 66_000), -2.0)
    for rows in (1, 3):
        for inputs in ("uint8 token symmetric=false", "int8 token"):
            y = multiplied(x[:rows], weight, inputs)
            exact = Quantizer(inputs).fake_quantize(x[:rows]).double() @ weight.dequantize().double().T
            assert torch.allclose(y.double(), exact, rtol=1e-5, atol=0)


def test_threads_bias_strides_and_nothing(two_threads: None) -> None:
    weight = packed("int4 group=32", 700, 256)
    x, bias = torch.randn(3, 7, 512)[..., ::2], torch.randn(700)
    shared = multiplied(x, weight, "int8 token", bias)
    torch.set_num_threads(1)
    assert torch.equal(shared, multiplied(x.contiguous(), weight, "int8 token", bias)) and shared.shape == (3, 7, 700)
    want = Quantizer("int8 token").fake_quantize(x).double() @ weight.dequantize().double().T
    assert torch.allclose(shared.double(), want + bias, atol=1e-4)
    assert multiplied(x[:0], weight, "int8 token", bias).shape == (0, 7, 700)
    assert multiplied(x[0, 0], weight, "int8 token").shape == (700,)
    half = multiplied(x.bfloat16(), weight, "int8 token", bias.bfloat16())
    rounded = Quantizer("int8 token").fake_quantize(x.bfloat16().float()).double()
    exact = rounded @ weight.dequantize().double().T + bias.bfloat16().double()
    assert half.dtype == torch.bfloat16 and torch.allclose(half.double(), exact, rtol=2**-8, atol=1e-4)


def test_what_does_not_fit_is_multiplied_as_floats(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 192)
    for line in ("nf4 group=32", "float8_e4m3fn channel", "int1_full channel"):
        weight = packed(line)
        want = cpu_products.linear(Quantizer("int8 token").fake_quantize(x), *_of(weight), None)
        assert torch.equal(multiplied(x, weight, "int8 token"), want) and not calls, line
    monkeypatch.setattr(cpu_products, "library", lambda: None)
    weight = packed("int8 channel")
    assert torch.equal(multiplied(x, weight, "int8 token"), reference(x, *_of(weight), None, [], "", "int8 token"))


def _of(weight: QTensor) -> tuple[list[Tensor], str, list[int]]:
    tensors = weight.tensors()
    return list(tensors.values()), key_of(weight.spec(), list(tensors)), list(weight.shape)


def test_the_schema_and_the_fake_hold() -> None:
    for static in (([], "", "int8 token"), ([torch.ones(1)], "scale", "int8 tensor static")):
        given = (torch.randn(2, 3, 192), *_of(packed("int4 group=32")), torch.randn(ROWS), *static)
        torch.library.opcheck(torch.ops.nybble.integer_linear.default, given)


def layer_of(weights: str, inputs: str) -> QuantLinear:
    return QuantLinear(packed(weights), torch.randn(ROWS), ActivationQuantizer(Quantizer(inputs)))


def test_a_layer_uses_it_unless_something_wants_floats(calls: list[int]) -> None:
    layer, x = layer_of("int4 group=32", "int8 token symmetric=false"), torch.randn(2, 192)
    assert layer.inputs is not None and isinstance(layer.weight, Packed)
    with torch.no_grad():
        y = layer(x)
        assert calls == [1]
        compiled: Any = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), y) and calls == [1, 1]
        seen: list[Tensor] = []
        handle = layer.inputs.register_forward_hook(lambda _, __, out: seen.append(out))
        assert torch.allclose(layer(x), y, atol=1e-4) and len(seen) == 1 and calls == [1, 1]
        handle.remove()
        layer.weight.hold(torch.float32)
        assert torch.allclose(layer(x), y, atol=1e-4) and calls == [1, 1]
        layer.weight.hold(None)
    assert torch.allclose(layer(x.requires_grad_()), y, atol=1e-4) and calls == [1, 1]
    with torch.no_grad():
        layer_of("int4 group=32", "int8 group=32")(x)
        layer_of("int4 group=32", "int8 token rounding=half-up")(x)
        layer_of("int4 group=32", "float8_e4m3fn token")(x)
        assert calls == [1, 1]


def test_it_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, name = layer_of("int8 channel", "int8 token").how()
    assert fast and name.startswith("compiled product of whole numbers, ")
    assert layer_of("nf4 group=32", "int8 token").how()[1].startswith("compiled look-up")
    assert layer_of("int8 channel", "int8 group=32").how()[1].startswith("compiled look-up")
    monkeypatch.setattr(cpu_integers, "_LEAST", BEST + 1)
    assert layer_of("int8 channel", "int8 token").how()[1].startswith("compiled look-up")
    monkeypatch.setattr(cpu_products, "SMALL", 1 << 15)
    assert layer_of("int8 channel", "int8 token").how() == (False, "fewer than 32,768 elements")
