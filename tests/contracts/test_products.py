"""Products of packed weights by the compiled library: its weights bit for bit, its sums within float32's own error."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts import compiled
from torch import Tensor, nn
from torch.nn import functional

from nybble.core.errors import FormatError, NybbleError, SchemeError, TokenError, UsageError
from nybble.formats import format_names, get_format
from nybble.kernels import _library, cpu_products
from nybble.kernels._weights import Weight, weight_of
from nybble.nn.compiled import key_of
from nybble.nn.embedding import QuantEmbedding, TiedHead
from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed
from nybble.nn.products import packed_linear, reference, rows_reference
from nybble.nn.swap import hold_slow
from nybble.qtensor import QTensor, _by_rows
from nybble.quantizer import Quantizer

LINES = [
    *(f"{name} group=32" for name in format_names() if get_format(name).bits in (1, 2, 3, 4, 5, 6, 8)),
    "nvfp4", "mxfp4", "nf4-dq", "q4_k", "q8_0", "int4 group=64 symmetric=false", "int4 group=48 symmetric=false",
    "int8 tensor", "int8 channel symmetric=false", "float8_e4m3fn block=6x32", "int3 group=96 scale_format=bfloat16",
    "int4 channel", "nf4 flat=96", "int2 group=16 symmetric=false scale_format=float32",
]  # fmt: skip
ROWS, COLUMNS = 30, 192
ISAS = [isa for isa in (0, 2, 3, 4) if isa <= (0 if (made := compiled.library()) is None else made.nybble_isa())]
pytestmark = compiled.needed


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights too."""
    monkeypatch.setattr(cpu_products, "SMALL", 1)


@pytest.fixture(params=ISAS, ids={0: "portable", 2: "avx2", 3: "avx512", 4: "bfloat16"}.get)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cpu_products, "_ISA", request.param)
    number: int = request.param
    return number


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def packed(line: str, rows: int = ROWS, columns: int = COLUMNS) -> QTensor:
    torch.manual_seed(0)
    return Quantizer(line).quantize(torch.randn(rows, columns))


def multiplied(x: Tensor, weight: QTensor, bias: Tensor | None = None) -> Tensor:
    tensors = weight.tensors()
    return packed_linear(x, list(tensors.values()), key_of(weight.spec(), list(tensors)), list(weight.shape), bias)


def layer_of(line: str) -> tuple[QuantLinear, Packed]:
    layer = QuantLinear(packed(line))
    assert isinstance(layer.weight, Packed)
    return layer, layer.weight


def record(weight: QTensor) -> Weight:
    library = _library.library()
    assert library is not None
    found = weight_of(weight, library.nybble_prepare)
    assert isinstance(found, Weight), found
    return found


def test_this_machine_has_the_library() -> None:
    """What follows would else compare the readable version with itself."""
    assert ISAS[0] == 0 and _library.team() is not None


@pytest.mark.parametrize("line", LINES)
def test_values_and_sums(line: str, isa: int) -> None:
    weight = packed(line, columns=256 if line == "q4_k" else COLUMNS)
    found, columns = record(weight), weight.shape[1]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = cpu_products._values(found, torch.empty(0, dtype=dtype), 0, ROWS)
        assert torch.equal(values, weight.dequantize(dtype)), dtype
    assert torch.equal(cpu_products._values(found, torch.empty(0), 7, 12), weight.dequantize()[7:12])
    x, dense = torch.randn(17, columns), weight.dequantize().double()
    bound = columns * 2**-24 * (x.double().abs() @ dense.abs().T) + 1e-30
    alone = multiplied(x[:1], weight)
    for rows in (1, 2, 4, 5, 8, 9, 16, 17):
        y = multiplied(x[:rows], weight)
        assert y.shape == (rows, ROWS) and ((y.double() - x[:rows].double() @ dense.T).abs() <= bound[:rows]).all()
        assert rows > cpu_products.ROWS or torch.equal(y[:1], alone)  # a sum doesn't depend on its neighbours


@pytest.mark.parametrize("line", ["int4 group=32", "int4 group=64 symmetric=false", "nf4 group=32", "int8 channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_with_avx512(line: str, dtype: torch.dtype, isa: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """W isn't expanded where that takes longer, and sums stay those of one row."""
    monkeypatch.setattr(cpu_products, "LARGE", 1)
    library, weight = _library.library(), packed(line)
    assert library is not None
    wide = library.nybble_set(record(weight).address, isa) >= (3 if dtype == torch.float32 else 4)
    calls: list[int] = []

    def expanded(x: Tensor, *_: Any) -> Tensor:
        calls.append(len(x))
        return x

    monkeypatch.setattr(cpu_products, "_expanded", expanded)
    x = torch.randn(cpu_products.MORE + 1, COLUMNS).to(dtype)
    multiplied(x, weight)
    assert calls == [cpu_products.MORE + 1]
    y = multiplied(x[:33], weight)
    assert len(calls) == (1 if wide else 2)
    if wide:
        assert all(torch.equal(y[at : at + 1], multiplied(x[at : at + 1], weight)) for at in (0, 15, 16, 32))


@pytest.mark.parametrize(
    "line", [*LINES, "int3 group=64 symmetric=false", "int2 channel symmetric=false", "int8 group=64"]
)
def test_rows_of_bfloat16(line: str, isa: int) -> None:
    """Sums of exact products: within the bound that float32's have, and the same for every number of rows."""
    library = _library.library()
    assert library is not None
    for columns in (64, 192, 1664):  # less than a step, one and a half, more than a part of x
        try:
            weight = packed(line, columns=columns)
        except NybbleError:  # groups that don't divide so many columns
            continue
        found = weight_of(weight, library.nybble_prepare)
        if not isinstance(found, Weight):
            continue
        x, dense, bias = torch.randn(11, columns).bfloat16(), weight.dequantize().double(), torch.randn(ROWS)
        exact = bias.double() + x.double() @ dense.T
        bound = columns * 2**-24 * (x.double().abs() @ dense.abs().T) + 2**-24 * exact.abs()  # and of adding the bias
        y = torch.empty(11, ROWS)
        cpu_products._run(found, x, 11, bias, y, 0, ROWS)
        assert ((y.double() - exact).abs() <= bound).all()
        for rows in (1, 2, 3, 5, 9, 10):
            part = torch.empty(rows, ROWS)
            cpu_products._run(found, x, rows, bias, part, 0, ROWS)
            assert torch.equal(part, y[:rows]), rows


def test_which_weights_bfloat16_holds() -> None:
    """Values that sixteen bits round would be other weights: these are multiplied as floats."""
    library = _library.library()
    assert library is not None
    if library.nybble_isa() < 4:
        pytest.skip("a processor without AVX-512 BF16")
    fit = {line for line in LINES if library.nybble_set(record(packed(line, columns=768)).address, 4) == 4}
    assert {"int4 channel", "nvfp4", "mxfp4", "int4 group=64 symmetric=false", "int8 tensor", "q8_0"} <= fit
    assert not fit & {"nf4-dq", "nf4 group=32", "q4_k", "int4 group=48 symmetric=false", "int5 group=32"}


@pytest.mark.parametrize("columns", [8, 16, 24, 40, 56, 72, 88, 104])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_columns_that_no_step_divides(bits: int, columns: int, isa: int) -> None:
    """The last codes are the end of a page: whoever reads behind them crashes."""
    line = "binary channel" if bits == 1 else f"int{bits} channel"
    for rows in (1, 2, 3, 11):
        weight = packed(line, rows, columns)
        x = torch.randn(3, columns)
        want = (x.double() @ weight.dequantize().double().T).float()
        assert torch.allclose(multiplied(x, weight), want, rtol=0, atol=1e-5)
        assert torch.equal(cpu_products._values(record(weight), torch.empty(0), 0, rows), weight.dequantize())


def test_nothing_behind_the_codes_is_read() -> None:
    """Codes that end where their mapping does, in a process of its own."""
    script = """
import ctypes, mmap, torch
from nybble.kernels import cpu_integers, cpu_products
from nybble.nn.compiled import key_of
from nybble.nn.integer_products import integer_linear
from nybble.nn.products import packed_linear
from nybble.quantizer import Quantizer
cpu_products.SMALL, cpu_integers._LEAST = 1, 0
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
page = mmap.PAGESIZE
for isa in (0, 2, 3, 4):
    cpu_products._ISA, cpu_integers._ISA = isa, isa + (isa == 3)
    for line in ("binary", "int2", "int3", "int4", "int5", "int6", "int8", "float8_e4m3fn"):
        for columns in (8, 24, 64, 104):
            weight = Quantizer(f"{line} channel").quantize(torch.randn(5, columns))
            tensors = weight.tensors()
            codes = tensors["codes"]
            place = libc.mmap(None, 2 * page, 3, 0x22, -1, 0)
            assert libc.mprotect(place + page, page, 0) == 0
            start = place + page - codes.numel()
            ctypes.memmove(start, codes.data_ptr(), codes.numel())
            tensors["codes"] = torch.frombuffer((ctypes.c_uint8 * codes.numel()).from_address(start), dtype=torch.uint8)
            key = key_of(weight.spec(), list(tensors))
            for rows in (1, 4, 8, 20):
                x = torch.randn(rows, columns)
                y = packed_linear(x, list(tensors.values()), key, [5, columns], None)
                assert torch.allclose(y, x @ weight.dequantize().T, atol=1e-4)
                halves = x.bfloat16()
                y = packed_linear(halves, list(tensors.values()), key, [5, columns], None)
                far = 1e-4 if rows < 17 else 1  # W itself is rounded for many rows
                assert torch.allclose(y.float(), halves.float() @ weight.dequantize().T, rtol=2**-7, atol=far)
                if weight.format.is_integer:
                    for inputs in ("int8 token", "int8 token symmetric=false"):
                        y = integer_linear(x, list(tensors.values()), key, [5, columns], None, [], "", inputs)
                        of_x = Quantizer(inputs).fake_quantize(x)
                        assert torch.allclose(y, of_x @ weight.dequantize().T, atol=1e-4)
print("whole")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "whole\n", done.stderr[-500:]


def test_threads_bias_strides_and_nothing(two_threads: None) -> None:
    weight = packed("int4 group=32", 700, 256)
    x = torch.randn(2, 3, 512)[..., ::2]
    bias = torch.randn(700)
    shared = multiplied(x, weight, bias)
    torch.set_num_threads(1)
    assert torch.equal(shared, multiplied(x.contiguous(), weight, bias)) and shared.shape == (2, 3, 700)
    assert torch.allclose(shared, x @ weight.dequantize().T + bias, atol=1e-4)
    assert multiplied(x[:0], weight, bias).shape == (0, 3, 700)
    for dtype in (torch.bfloat16, torch.float16):
        y = multiplied(x.to(dtype), weight, bias.to(dtype))
        exact = x.to(dtype).double() @ weight.dequantize().double().T + bias.to(dtype).double()
        assert y.dtype == dtype and torch.allclose(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("line", ["int8 channel", "int4 group=32 symmetric=false", "nvfp4", "float8_e4m3fn channel"])
def test_rows_of_a_table(line: str, isa: int) -> None:
    table = QuantEmbedding(packed(line), torch.bfloat16)
    ids = torch.tensor([[29, 0, 7], [7, 7, 28]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        want = functional.embedding(ids, table.weight.qtensor().dequantize(dtype))
        assert torch.equal(table.weight.rows(ids, dtype), want) and table.to(dtype)(ids).dtype == dtype
    assert table(ids[:0]).shape == (0, 3, COLUMNS)
    for wrong in (-1, ROWS):
        with pytest.raises(TokenError, match=f"a table of {ROWS} rows"):
            table(torch.tensor([3, wrong]))


@pytest.mark.parametrize("line", LINES)
def test_rows_without_a_kernel(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the rows' bits, and where a row's codes and scales are its own nothing else is unpacked."""
    weight = packed(line, columns=256 if line == "q4_k" else COLUMNS)
    tensors, ids = weight.tensors(), torch.tensor([[29, 0, 7], [7, 7, 28]])
    want = functional.embedding(ids, weight.dequantize(torch.bfloat16))
    sizes: list[int] = []
    kind, whole = type(weight), type(weight).dequantize

    def seen(self: Any, *given: Any) -> Tensor:
        sizes.append(self.shape[0])
        return whole(self, *given)

    monkeypatch.setattr(kind, "dequantize", seen)
    key = key_of(weight.spec(), list(tensors))
    found = rows_reference(ids, list(tensors.values()), key, list(weight.shape), torch.bfloat16)
    assert torch.equal(found, want)
    shared = line in ("float8_e4m3fn block=6x32", "nf4-dq")  # scales of six rows; scales whose scales are of many rows
    assert (ROWS if shared else 6) in sizes and (shared or ROWS not in sizes), sizes


def test_a_tied_head_never_expands_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = QuantEmbedding(packed("int8 channel"), torch.float32)
    head, x = TiedHead(table, torch.randn(ROWS)), torch.randn(2, COLUMNS)
    want = functional.linear(x, table.weight.qtensor().dequantize(), head.bias)
    with monkeypatch.context() as m, torch.no_grad():
        m.setattr(type(table.weight.qtensor()), "dequantize", lambda *_: pytest.fail("was expanded"))
        assert torch.allclose(head(x), want, atol=1e-4) and table(torch.tensor([1])).shape == (1, COLUMNS)
    assert torch.allclose(head(x.requires_grad_()), want, atol=1e-4) and head.how()[0] and table.how()[0]
    hold_slow(nn.ModuleList([table, head]), torch.float32)
    assert not table.weight.held(torch.float32)


def test_parts_of_a_large_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = packed("nvfp4"), torch.randn(cpu_products.MORE + 1, COLUMNS)
    whole = multiplied(x, weight)
    tensors = weight.tensors()
    key = key_of(weight.spec(), list(tensors))
    assert torch.equal(whole, reference(x, list(tensors.values()), key, weight.shape, None))
    monkeypatch.setattr(cpu_products, "PART", 7 * COLUMNS)
    bias = torch.randn(ROWS)
    assert torch.allclose(multiplied(x, weight, bias), whole + bias, rtol=0, atol=1e-4)


def test_replaced_tensors_are_seen() -> None:
    """The record that is kept with the codes is that of the tensors that come with them."""
    weight, x = packed("int4 group=32 scale_format=float32"), torch.randn(1, COLUMNS)
    tensors = weight.tensors()
    key, shape = key_of(weight.spec(), list(tensors)), list(weight.shape)
    before = packed_linear(x, list(tensors.values()), key, shape, None)
    tensors["scale"].mul_(2)  # in place: the same tensor
    assert torch.equal(packed_linear(x, list(tensors.values()), key, shape, None), 2 * before)
    tensors["scale"] = tensors["scale"] * 2
    assert torch.equal(packed_linear(x, list(tensors.values()), key, shape, None), 4 * before)


def test_the_schema_and_the_fake_hold() -> None:
    weight = packed("int4 group=32")
    tensors = weight.tensors()
    given = (torch.randn(2, 3, COLUMNS), list(tensors.values()), key_of(weight.spec(), list(tensors)), [ROWS, COLUMNS])
    for bias in (None, torch.randn(ROWS)):
        torch.library.opcheck(torch.ops.nybble.packed_linear.default, (*given, bias))


def test_a_layer_uses_it_and_a_gradient_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*given: Any) -> Tensor:
        calls.append(1)
        return cpu_products.linear(*given)

    monkeypatch.setitem(packed_linear._kernels, "cpu", counted)
    layer, weight = layer_of("int4 group=32")
    x = torch.randn(2, COLUMNS)
    with torch.no_grad():
        y = layer(x)
    assert calls == [1]
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert calls == [1] and torch.allclose(x.grad, weight(torch.float32).sum(0).expand(2, -1), atol=1e-5)
    weight.hold(torch.float32)
    with torch.no_grad():
        assert torch.allclose(layer(x), y, atol=1e-5) and calls == [1]


@pytest.mark.parametrize("fault", ["no compiler", "a compiler that fails", "a broken file", "no home"])
def test_without_the_library_it_says_so_once(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_library, "SOURCE", tmp_path / "source")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_library, "_COMPILERS", ("false",) if fault == "a compiler that fails" else ())
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "source").mkdir()
    if fault == "a broken file":
        (tmp_path / "source" / _library.file_name()).write_bytes(b"no library")
    if fault == "no home":  # a user that the system doesn't know
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(os, "getuid", lambda: 1 << 30)
    _library.library.cache_clear()
    weight, x = packed("int4 group=32"), torch.randn(1, COLUMNS)
    with pytest.warns(RuntimeWarning, match="the compiled CPU kernels aren't there") as said:
        y = multiplied(x, weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        multiplied(x, packed("int2 group=32"))
    _library.library.cache_clear()
    assert torch.equal(y, x @ weight.dequantize().T)
    wanted = {
        "a compiler that fails": "failed",
        "a broken file": "packed-",
        "no home": "XDG_CACHE_HOME would say where",
    }
    wanted["no compiler"] = "no C++ compiler"
    assert wanted[fault] in str(said[0].message) and not list(tmp_path.rglob("tmp*"))


@pytest.mark.parametrize("line", ["int4 group=64 symmetric=false", "nvfp4", "nf4 group=64", "int8 channel"])
def test_without_the_library_w_is_never_whole(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows of W at a time, in float32, multiplied as they come."""
    monkeypatch.setattr(cpu_products, "library", lambda: None)
    monkeypatch.setattr(_by_rows, "_ROWS", 33 * 256)
    weight, bias = packed(line, 700, 256), torch.randn(700)
    dense = weight.dequantize().double()
    with monkeypatch.context() as m:
        m.setattr(cpu_products, "reference", lambda *_: pytest.fail("was expanded"))
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, 8, 256).to(dtype)
            y, exact = multiplied(x, weight, bias.to(dtype)), x.double() @ dense.T + bias.to(dtype).double()
            far = 256 * 2**-24 * (x.double().abs() @ dense.abs().T) + torch.finfo(dtype).eps * exact.abs()
            assert y.dtype == dtype and ((y.double() - exact).abs() <= far).all()
    x = torch.randn(17, 256)
    assert torch.equal(multiplied(x, weight), x @ weight.dequantize().T)


def test_what_it_cannot_read_goes_the_readable_way() -> None:
    for line in ("int7 group=32", "int4 rank1", "int4 group=8"):
        try:
            weight = packed(line)
        except (SchemeError, UsageError, FormatError):
            continue
        x = torch.randn(2, COLUMNS)
        assert torch.equal(multiplied(x, weight), x @ weight.dequantize().T), line


@pytest.mark.parametrize("line", ["int4 channel", "int8 channel", "float8_e4m3fn channel", "float8_e5m2 group=32"])
def test_each_set_of_instructions_has_its_version(line: str, isa: int) -> None:
    assert layer_of(line)[1].how() == (True, f"compiled look-up, {cpu_products._SETS[isa]}")


def test_it_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    _, weight = layer_of("int4 group=32")
    assert weight.how()[0] and weight.how()[1].startswith("compiled look-up")
    assert layer_of("int4 rank1")[1].how() == (False, "scale of the kind Factored")
    monkeypatch.setattr(cpu_products, "SMALL", 1 << 15)
    assert weight.how() == (False, "fewer than 32,768 elements")
    table = QuantEmbedding(packed("int4 group=32"), torch.float32)
    assert table.how() == (True, "compiled look-up of rows")  # of which a small table has them too
    assert TiedHead(table).how() == (False, "fewer than 32,768 elements")
    assert QuantEmbedding(packed("int4 rank1"), torch.float32).how() == (False, "scale of the kind Factored")
