"""What operators refuse, whatever would multiply: kernels, the readable versions, a compiler's fakes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import nn

from nybble.core.errors import DataError, FileError, GranularityError, UsageError
from nybble.kv_format import KVFormat
from nybble.nn import compiled, experts
from nybble.nn.cached_attention import Stored, cached_attention
from nybble.nn.embedding import QuantEmbedding
from nybble.nn.float_products import float_linear
from nybble.nn.input_rounding import rounded_inputs
from nybble.nn.integer_products import integer_linear
from nybble.nn.kv_cache import QuantizedLayer
from nybble.nn.linear import QuantLinear
from nybble.nn.products import packed_linear, packed_rows
from nybble.quantizer import Quantizer

N, K = 192, 256  # more elements than those below which the library isn't called


def weight(line: str = "int4 group=32 symmetric=false", n: int = N, k: int = K) -> list[Any]:
    """Tensors, key and shape."""
    found = Quantizer(line).quantize(torch.randn(n, k))
    tensors = found.tensors()
    return [list(tensors.values()), compiled.key_of(found.spec(), list(tensors)), [n, k]]


def product(**changes: Any) -> list[Any]:
    tensors, key, shape = weight()
    given = {"x": torch.randn(3, K), "tensors": tensors, "key": key, "shape": shape, "bias": torch.randn(N)}
    return list((given | changes).values())


PRODUCTS: dict[str, tuple[dict[str, Any], str]] = {
    "integers": ({"x": torch.ones(3, K, dtype=torch.int64)}, "x in torch.int64; it takes"),
    "bits": ({"x": torch.ones(3, K, dtype=torch.bool)}, "x in torch.bool"),
    "complex": ({"x": torch.ones(3, K, dtype=torch.complex64)}, "x in torch.complex64"),
    "eight bits": ({"x": torch.ones(3, K).to(torch.float8_e4m3fn)}, "x in torch.float8_e4m3fn"),
    "a number": ({"x": torch.tensor(1.0)}, "a single number"),
    "columns": ({"x": torch.ones(3, K + 32)}, r"x \[3, 288\] and a weight \[192, 256\]"),
    "columns that divide": ({"x": torch.ones(2, K // 2)}, r"x \[2, 128\]"),
    "no rows": ({"x": torch.ones(0, K + 32)}, r"x \[0, 288\]"),
    "device": ({"x": torch.ones(3, K, device="meta")}, "on meta and a weight on cpu"),
    "a short bias": ({"bias": torch.ones(7)}, r"a bias \[7\]"),
    "one bias": ({"bias": torch.ones(1)}, r"a bias \[1\]"),
    "a long bias": ({"bias": torch.ones(N + 1)}, r"a bias \[193\]"),
    "a flat bias": ({"bias": torch.ones(1, N)}, r"a bias \[1, 192\]"),
    "the bias's dtype": ({"bias": torch.ones(N).bfloat16()}, r"has to be \[192\] in torch.float32"),
    "the bias's device": ({"bias": torch.ones(N, device="meta")}, "on meta; it has to be"),
    "shape": ({"shape": [N * 2, K // 2]}, r"a weight \[192, 256\] that is said to be \[384, 128\]"),
    "negative": ({"shape": [-N, K]}, "said to be"),
    "dimensions": ({"shape": [N, K, 1]}, "said to be"),
    "tensors": ({"tensors": []}, "0 tensors of a weight that has codes, scale, zero_point.codes"),
    "scale's device": ({"tensors": [torch.ones(4), torch.ones(4, device="meta"), torch.ones(4)]}, "a weight on meta"),
    "key": ({"key": "{}"}, "describes no packed weight"),
    "words": ({"key": "int4"}, "describes no packed weight"),
}


@pytest.mark.parametrize("what", PRODUCTS)
def test_products(what: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports Triton, before others have said how it is to run

    changes, said = PRODUCTS[what]
    given, codes = product(**changes), "int8 token"
    for op, more in ((packed_linear, []), (integer_linear, [[], "", codes]), (float_linear, [[], "", codes])):
        with pytest.raises(UsageError, match=said):
            op(*given, *more)
        with pytest.raises(UsageError, match=said), FakeTensorMode(allow_non_fake_inputs=True):
            op(*given, *more)


@pytest.mark.parametrize("small", [False, True])
def test_tensors_of_another_weight(small: bool) -> None:
    """Of another size or dtype than the key says; below some size nothing is kept between calls."""
    size = (16, 64) if small else (N, K)
    tensors, key, shape = weight("int4 group=32 symmetric=false", *size)
    x = torch.randn(2, size[1])
    for index, other in ((0, tensors[0][:9]), (0, tensors[0].int()), (1, tensors[1].double()), (1, tensors[1][:3])):
        given = [other if i == index else tensor for i, tensor in enumerate(tensors)]
        with pytest.raises(FileError, match=r"codes of|scale should be"):
            packed_linear(x, given, key, shape, None)


def test_rows_of_a_table() -> None:
    ids, table = torch.tensor([0, 3]), weight()
    for given, said in (
        ((ids.short(), *table, torch.float32), "ids in torch.int16"),
        ((ids.float(), *table, torch.float32), "ids in torch.float32"),
        ((ids, *table, torch.int32), "rows in torch.int32"),
        ((ids, *table[:2], [N, 2 * K], torch.float32), "said to be"),
        ((ids.to("meta"), *table, torch.float32), "on meta and a weight on cpu"),
    ):
        with pytest.raises(UsageError, match=said):
            packed_rows(*given)
    for line in ("int4 group=32", "int7 group=32"):  # by the library; the readable way
        layer = QuantEmbedding(Quantizer(line).quantize(torch.randn(N, K)), torch.float32)
        assert torch.equal(layer(ids.int()), layer(ids))
        for wrong in (-1, N):
            with pytest.raises(DataError, match="for a table of 192 rows; another model's tokenizer"):
                layer(torch.tensor([0, wrong]))
            with pytest.raises(IndexError):  # as torch's embedding has it
                layer(torch.tensor([wrong]).int())


def test_activations() -> None:
    given, one = product(), torch.ones(1)
    for parts, names, line, said in (
        ([torch.ones(2)], "scale", "int8 tensor static", "one value each"),
        ([one.to("meta")], "scale", "int8 tensor static", "on cpu"),
        ([], "", "int8 tensor static", "0 static parameters"),
        ([one], "scale zero_point", "int8 tensor static", "1 static parameters"),
        ([one], "scale", "int8 token", "a static quantizer, and only that"),
        ([], "", "nvfp4", "takes what rounds to integers"),
        ([], "", "no such line", "unknown word"),
    ):
        with pytest.raises(UsageError, match=said):
            integer_linear(*given, parts, names, line)
    with pytest.raises(UsageError, match="numbers that tensor cores read"):
        float_linear(*given, [], "", "nf4 token")
    x = torch.randn(2, 100)
    for args, error in (
        ((x.int(), "int8 token"), UsageError),
        ((torch.tensor(1.0), "int8 token"), UsageError),
        ((x, "int8 tensor static"), UsageError),
        ((x, "mxfp4"), GranularityError),
    ):
        with pytest.raises(error):
            rounded_inputs(*args)
    with pytest.raises(UsageError, match=r"fake_quantize: x in torch\.int32"):
        compiled.fake_quantize(x.int(), [], "", "int8 token")
    with pytest.raises(UsageError, match=r"values in torch\.int32"):
        compiled.dequantize(*weight(), torch.int32)
    with pytest.raises(UsageError, match="are not what the key describes"):
        compiled.dequantize(*weight()[:2], [K, N], torch.float32)


def stored(keys: str = "int8 token", values: str = "int8 token", residual: int = 0) -> list[Any]:
    """Arguments of the operator of attention: two key heads, 6 tokens, 32 wide."""
    sides = [Quantizer(line) if line else None for line in (keys, values)]
    layer = QuantizedLayer(KVFormat(keys=sides[0], values=sides[1], residual=residual))
    layer.update(torch.randn(2, 2, 6, 32), torch.randn(2, 2, 6, 16))
    k, v = (Stored(side).rows for side in layer._sides)
    return [torch.randn(2, 4, 1, 32), *k[:3], *v[:3], k[3], v[3], None, 0.2]


@pytest.mark.parametrize(
    ("place", "other", "said"),
    [
        (0, torch.randn(2, 4, 1, 16), "batch, width or tokens differ"),
        (0, torch.randn(2, 3, 1, 32), "key heads don't divide heads"),
        (0, torch.randn(3, 4, 1, 32), "batch, width or tokens differ"),
        (0, torch.randn(4, 1, 32), "are .batch, heads, tokens, width. of one dtype"),
        (0, torch.randn(2, 4, 1, 32).half(), "of one dtype"),
        (0, torch.ones(2, 4, 1, 32, dtype=torch.int64), "x in torch.int64"),
        (4, [torch.ones(2, 2, 3, 16, dtype=torch.uint8)], "6 and 3 tokens in all"),
        (7, torch.randn(2, 2, 1, 32), "6 tokens in all"),
        (8, torch.randn(2, 1, 0, 16), "batch, width or tokens differ"),
        (9, torch.ones(2, 1, 1, 5), r"broadcasts to \[2, 4, 1, 6\]"),
        (9, torch.ones(1, 2, 1, 1, 6), "a mask"),
        (9, torch.ones(6), r"a mask \[6\]"),
        (9, torch.ones(2, 1, 1, 6, dtype=torch.int64), "it is bool or float"),
        (9, torch.ones(2, 1, 1, 6, device="meta"), "beside a tensor on meta"),
    ],
)
def test_attention(place: int, other: Any, said: str) -> None:
    given = stored()
    given[place] = other
    with pytest.raises(UsageError, match=said):
        cached_attention(*given)


@pytest.mark.parametrize("sides", [("int8 token", "int8 token", 2), ("int4 group=16", "", 0), ("", "nvfp4", 3)])
def test_attention_over_one_side_in_float(sides: tuple[str, str, int]) -> None:
    given = stored(*sides)
    assert cached_attention(*given).shape == (2, 4, 1, 16)


class Experts(nn.Module):
    """Of a class whose forward transformers has wrapped."""

    @wraps(lambda self, x, index, gates: x * gates.sum(-1, keepdim=True))
    def forward(self, *given: Any) -> Any:  # type: ignore[override]
        """The wrapper."""
        raise AssertionError("was called")


OWNER = experts.Owner(EXPERTS := Experts())
OPERATORS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "packed_linear": lambda: tuple(product()),
    "packed_rows": lambda: (torch.tensor([[0, 3], [9, 1]]).t(), *weight(), torch.bfloat16),
    "integer_linear": lambda: (*product(), [], "", "int8 token"),
    "float_linear": lambda: (*product(), [], "", "float8_e4m3fn token"),
    "rounded_inputs": lambda: (torch.randn(64, 2).t(), "nvfp4"),
    "dequantize": lambda: (*weight("nvfp4"), torch.float16),
    "fake_quantize": lambda: (torch.randn(64, 2).t(), [torch.ones(1)], "scale", "int8 tensor static"),
    "fake_quantize_backward": lambda: (torch.randn(2, 64), torch.randn(64, 2).t(), [], "", "mxfp4"),
    "cached_attention": lambda: tuple(stored(residual=2)),
    "store_tokens": lambda: (torch.randn(2, 3, 32, 4).mT, "int3 token symmetric=false"),
    "read_tokens": lambda: (*stored(residual=2)[1:4], stored(residual=2)[7]),
    "experts": lambda: (torch.randn(3, 8), torch.zeros(3, 2).long(), torch.ones(3, 2), OWNER.key),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    """Torch's own look at schema, fake and autograd's registration."""
    torch.library.opcheck(getattr(torch.ops.nybble, name).default, OPERATORS[name]())


def test_a_bias_that_autocast_left_in_float32() -> None:
    layer = QuantLinear(Quantizer("int4 group=32").quantize(torch.randn(N, K)), torch.randn(N))
    x = torch.randn(2, K).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), layer(x.float()), rtol=0.02, atol=0.3)


ELEMENTWISE: dict[str, tuple[str, list[Any], str]] = {
    "integers": ("encode", [torch.ones(4, 32, dtype=torch.int32), "int4", "nearest-even"], "encode: x in torch.int32"),
    "bits": ("encode", [torch.ones(4, 32, dtype=torch.bool), "int4", "nearest-even"], "encode: x in torch.bool"),
    "complex": ("round_to", [torch.ones(3, dtype=torch.complex64), "int4", "nearest-even"], "x in torch.complex64"),
    "a table elsewhere": ("table_round", [torch.ones(3), torch.ones(1), torch.ones(2, device="meta")], "on meta"),
    "thresholds elsewhere": ("table_encode", [torch.ones(3), torch.ones(1, device="meta"), torch.ones(2)], "on meta"),
    "a short table": ("table_round", [torch.ones(3), torch.ones(2), torch.ones(2)], "longer by one"),
    "values elsewhere": ("around", [torch.ones(3), torch.ones(2, device="meta"), True], "on meta"),
    "a scale elsewhere": ("scaled_round", [torch.ones(4, 32), torch.ones(4, 1, device="meta"), "int4"], "on meta"),
    "more scales": ("scaled_round", [torch.ones(4, 32), torch.ones(8, 1), "int4"], r"a scale \[8, 1\] in"),
    "a scale of integers": ("scaled_round", [torch.ones(4, 32), torch.ones(4, 1).int(), "int4"], "in torch.int32"),
    "a row": ("scaled_round", [torch.ones(32), torch.ones(1, 1), "int4"], r"\[32\] is not \[blocks, elements\]"),
    "a cube": ("dynamic_round", [torch.ones(2, 2, 8), "int4", "nearest-even", 7.0, "", "float32"], "is not"),
    "no target": ("dynamic_round", [torch.ones(4, 8), "int4", "nearest-even", 0.0, "", "float32"], "target=0.0"),
    "no dtype": ("dynamic_round", [torch.ones(4, 8), "int4", "nearest-even", 7.0, "", "float31"], "a scale in float31"),
}


@pytest.mark.parametrize("what", ELEMENTWISE)
def test_elementwise(what: str) -> None:
    name, given, said = ELEMENTWISE[what]
    given = [*given, "nearest-even"] if name == "scaled_round" else given
    with pytest.raises(UsageError, match=said):
        getattr(torch.ops.nybble, name)(*given)


def test_elementwise_without_elements_and_in_float64() -> None:
    ops, x = torch.ops.nybble, torch.randn(4, 32)
    assert torch.equal(ops.encode(x.double(), "int4", "nearest-even"), ops.encode(x, "int4", "nearest-even"))
    for shape in ((0, 8), (4, 0)):
        empty = torch.ones(shape)
        assert ops.dynamic_round(empty, "int4", "nearest-even", 7.0, "", "float32").shape == shape
        assert ops.scaled_round(empty, torch.ones(shape[0], 1), "int4", "nearest-even").shape == shape
