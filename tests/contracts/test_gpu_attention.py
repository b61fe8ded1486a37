"""Attention over stored keys and values by Triton, and what a quantized cache hands to a model in their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contracts import interpreted
from tests.tiny import input_ids, tiny_model
from torch import Tensor

from nybble.kv_format import KVFormat
from nybble.nn import cached_attention as ops
from nybble.nn import kv_cache
from nybble.nn.cached_attention import Stored, cached_attention
from nybble.nn.kv_cache import QuantizedLayer
from nybble.nn.kv_model import use_quantized_cache
from nybble.quantizer import Quantizer

LINES = (
    "int8 token", "uint8 token symmetric=false", "int4 token symmetric=false", "int4 group=16", "float8_e4m3fn token",
    "mxfp4", "nvfp4", "uint4 group=32 symmetric=false",
)  # fmt: skip


def filled(line: str, residual: int = 3, tokens: int = 150) -> QuantizedLayer:
    torch.manual_seed(0)
    quantizer = Quantizer(line)
    layer = QuantizedLayer(KVFormat(keys=quantizer, values=quantizer, residual=residual))
    states = [torch.randn(2, 2, tokens, width, device=interpreted.DEVICE) for width in (64, 32)]
    layer.update(*states)
    return layer


def operands(layer: QuantizedLayer) -> tuple[Any, ...]:
    return tuple(Stored(side).rows for side in layer._sides)


def given_of(query: Tensor, keys: Any, values: Any, mask: Tensor | None) -> tuple[Any, ...]:
    """Arguments of the operator."""
    return (query, *keys[:3], *values[:3], keys[3], values[3], mask, 0.2)


@interpreted.needed
@pytest.mark.parametrize("line", LINES)
def test_one_query_over_stored_rows(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from nybble.kernels import gpu_attention

    monkeypatch.setattr(gpu_attention, "_steps", lambda tokens, heads: 2)  # tiles of tokens a program
    layer = filled(line)
    query = torch.randn(2, 6, 1, 64, device=interpreted.DEVICE)
    seen = torch.ones(2, 1, 1, 150, dtype=torch.bool, device=interpreted.DEVICE)
    seen[1, ..., :70] = False
    keys, values = operands(layer)
    y = gpu_attention.attend(*given_of(query, keys, values, seen))
    k, v = (side.read().double().repeat_interleave(3, 1) for side in layer._sides)
    exact = (query.double() @ k.transpose(2, 3) * 0.2).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    tolerance = 1e-5 if interpreted.DEVICE == "cpu" else 1e-2
    assert torch.allclose(y.double(), exact, atol=tolerance)


@interpreted.needed
@pytest.mark.parametrize(
    "shape", [(2, 6, 1, 150), (1, 6, 1, 1), (6, 1, 150), (1, 150), (2, 1, 1, 150), (1, 1, 1, 1)], ids=str
)
def test_any_mask_that_broadcasts(shape: tuple[int, ...]) -> None:
    """One a head (ALiBi's), of fewer dimensions, of one value for all."""
    from nybble.kernels import gpu_attention

    layer = filled("int8 token")
    query, mask = (torch.randn(s, device=interpreted.DEVICE) for s in ((2, 6, 1, 64), shape))
    keys, values = operands(layer)
    given = given_of(query, keys, values, mask)
    want = cached_attention._init_fn(*given)
    assert torch.allclose(gpu_attention.attend(*given), want, atol=1e-5 if interpreted.DEVICE == "cpu" else 1e-2)


@interpreted.needed
def test_what_the_kernel_cannot_read() -> None:
    from nybble.kernels import gpu_attention

    for line in ("nf4 group=16", "e2m1 group=16 scale=minmax(offset=true)"):
        assert gpu_attention._sides(*operands(filled(line))) is None
    layer = filled("nf4 group=16")
    keys, values = operands(layer)
    query = torch.randn(2, 2, 4, 64, device=interpreted.DEVICE)
    y = gpu_attention.attend(*given_of(query, keys, values, None))
    assert torch.equal(y, layer.attend(query, 0.2)) and y.shape == (2, 2, 4, 32)


def test_the_schema_holds() -> None:
    keys, values = operands(filled("int4 group=16", tokens=9))
    query = torch.randn(2, 4, 1, 64, device=interpreted.DEVICE)
    torch.library.opcheck(torch.ops.nybble.cached_attention.default, given_of(query, keys, values, None))


@pytest.mark.parametrize("words", ["", "residual=5", "rotate", "residual=5 rotate", "sort", "sort=values residual=5"])
def test_queries_are_turned_and_not_keys(words: str) -> None:
    """Attention over rows as they lie, against attention over what is read; key heads are shared, values narrower."""
    generator = torch.Generator().manual_seed(0)
    orders = {"keys": torch.stack([torch.randperm(64, generator=generator) for _ in range(2)])}
    orders["values"] = torch.stack([torch.randperm(32, generator=generator) for _ in range(2)])
    layer = QuantizedLayer(KVFormat.parse(f"bfp12 group=16 {words}"), orders)
    layer.update(torch.randn(2, 2, 40, 64, generator=generator), torch.randn(2, 2, 40, 32, generator=generator))
    query = torch.randn(2, 6, 1, 64, generator=generator)
    assert layer.keys is not None and layer.values is not None
    want = torch.nn.functional.scaled_dot_product_attention(query, layer.keys, layer.values, scale=0.2, enable_gqa=True)
    assert torch.allclose(layer.attend(query, 0.2), want, atol=1e-5)
    assert torch.equal(Stored(layer._sides[0]) + 0, layer.keys)


def test_stored_is_a_tensor_to_others() -> None:
    layer = filled("int8 token")
    side = layer._sides[0]
    stored, before = Stored(side), side.read()
    layer.update(torch.randn(2, 2, 1, 64, device=before.device), torch.randn(2, 2, 1, 32, device=before.device))
    assert stored.shape == before.shape and torch.equal(stored + 0, before)  # not what came later
    assert torch.equal(torch.cat([stored[:, :, 5:], before], 2)[:, :, :145], before[:, :, 5:])
    assert "Stored" in repr(stored)


@pytest.mark.parametrize(
    "line", ["int8 token residual=2", "int4 group=4 residual=2 sort", "int4 group=4 rotate residual=3"]
)
def test_a_model_decodes_by_the_operator(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """The text is the one without; every token after the prompt is met by the operator, in every layer."""
    model = tiny_model(dtype=torch.float32)
    kv = KVFormat.parse(line)
    prompt = {"input_ids": input_ids(), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    use_quantized_cache(model, kv)
    assert model.config._attn_implementation == ops.IMPLEMENTATION
    want = model.generate(**prompt)
    calls: list[int] = []

    def counted(*given: Any) -> Tensor:
        calls.append(given[0].shape[2])
        found: Tensor = cached_attention(*given)
        return found

    monkeypatch.setattr(kv_cache, "DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(ops, "cached_attention", counted)
    mask = torch.ones_like(input_ids())
    assert torch.equal(model.generate(**prompt, attention_mask=mask), want) and calls == [1] * 4 * 2
    use_quantized_cache(model, None)
    assert model.config._attn_implementation == "sdpa"
