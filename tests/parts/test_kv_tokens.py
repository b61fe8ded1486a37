"""What a cache does to tokens beside rounding: scales along them, first ones in float, channels rotated or sorted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.parts.test_kv_cache import generated, model_of, same, states
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from nybble.core.errors import ModelError, SchemeError, UsageError
from nybble.core.orthogonal import hadamard
from nybble.kv_format import KVFormat
from nybble.learned import ACTIVATIONS, make_part
from nybble.nn.fake_attention import FakeCache
from nybble.nn.kv_basis import Rotated, Sorted, descending, order_of, partners
from nybble.nn.kv_cache import QuantizedCache, QuantizedLayer
from nybble.nn.kv_model import use_quantized_cache
from nybble.nn.kv_rows import TokenRows
from nybble.quantizer import Quantizer

KIVI = "int2 block=4x1 symmetric=false"
BLOCKS = (KIVI, "int8 block=4x1", "nf4 block=4x16 scale_format=(float8_e4m3fn token)", "int3 block=4x2")


def rows(line: str, x: Tensor, cuts: list[int], **options: Any) -> TokenRows:
    made = TokenRows(Quantizer(line), options.pop("residual", 0), x[:, :, :0], **options)
    for part in torch.split(x, cuts, 2):
        made.append(part)
    return made


@pytest.mark.parametrize("line", BLOCKS)
def test_blocks_of_tokens_are_rounded_once_when_they_are_full(line: str) -> None:
    """However the text is cut: the same bytes, those of the quantizer on whole blocks behind the first tokens."""
    x = states(17)
    whole = rows(line, x, [17], residual=3, sink=2)
    assert whole.rounded == 12 and whole.first.shape[2] == 2 and whole.newest.shape[2] == 3
    expected = Quantizer(line).quantize(x[:, :, 2:14])
    stored = whole.qtensor()
    assert stored is not None and all(torch.equal(stored.tensors()[n], t) for n, t in expected.tensors().items())
    assert torch.equal(whole.read(), torch.cat([x[:, :, :2], expected.dequantize(x.dtype), x[:, :, 14:]], 2))
    for cuts in ([1] * 17, [1, 9, 7], [5, 1, 11]):
        parts = rows(line, x, cuts, residual=3, sink=2)
        assert all(torch.equal(t, parts.tensors()[n]) for n, t in whole.tensors().items())
    waiting = rows(line, x[:, :, :16], [16], residual=3, sink=2)
    assert waiting.rounded == 8 and waiting.newest.shape[2] == 6  # a block that isn't full waits


def test_scales_of_channels_are_those_of_torch() -> None:
    """torch's per-channel fake quantization, a channel of a head and block each."""
    x = states(8, dtype=torch.float32)
    found = rows("int8 block=8x1 scale_format=float32", x, [8]).read()
    flat = x.transpose(2, 3).reshape(-1, 8)
    scale = (flat.abs().amax(1) / 127).clamp(min=1e-30)
    expected = torch.fake_quantize_per_channel_affine(
        flat, scale, torch.zeros(len(flat), dtype=torch.int32), 0, -127, 127
    )
    expected = expected.view(2, 3, 128, 8).transpose(2, 3)
    big = scale.view(2, 3, 1, 128) > 1e-20  # torch divides subnormals otherwise
    assert torch.equal(found.where(big, 0), expected.where(big, 0))


def test_bytes_of_blocks_and_of_what_stays() -> None:
    """Two bits an element, a float16 scale and a 2-bit zero point a channel and 32 tokens; 16 bits in float."""
    x = states(32 * 3 + 4 + 20)
    made = rows("int2 block=32x1 symmetric=false", x, [50, 70], residual=16, sink=4)
    assert made.rounded == 96 and made.newest.shape[2] == 20
    heads, width = 6, 128
    assert made.nbytes() == heads * width * (96 * 2 // 8 + 3 * 2 + 3 * 2 / 8 + 24 * 2)
    assert made.nbytes() == sum(t.untyped_storage().nbytes() for t in made.tensors().values())


def test_operations_on_blocks() -> None:
    """Oldest tokens are dropped from within a block, newest ones never: that would leave scales of what isn't there."""
    x = states(17)
    made = rows(KIVI, x, [17], residual=3, sink=2)
    read = made.read()
    made.select(torch.tensor([1, 0, 1]))
    read = read[[1, 0, 1]]
    made.drop_newest(3)
    assert torch.equal(made.read(), read[:, :, :14])
    with pytest.raises(UsageError, match=r"newest 2 tokens can't be taken back.*3 others.*residual=N"):
        made.drop_newest(2)
    made.drop_newest(4)
    assert torch.equal(made.read(), read[:, :, :10])
    made.drop_oldest(1)
    made.drop_oldest(2)
    assert made.tokens == 7 and made.rounded == 7 and torch.equal(made.read(), read[:, :, 3:10])
    made.drop_oldest(4)
    assert torch.equal(made.read(), read[:, :, 7:10]) and made.tensors()["codes"].shape[2] == 4
    made.append(x[[1, 0, 1]][:, :, :7])
    assert made.rounded == 7 and torch.equal(made.read()[:, :, :3], read[:, :, 7:10])
    made.drop_newest(14)
    assert made.tokens == 0


def test_first_tokens_come_back_where_they_were_taken() -> None:
    x = states(9)
    made = rows("int4 token", x, [9], sink=4)
    made.drop_newest(7)
    assert made.first.shape[2] == 2
    made.append(x[:, :, 2:])
    assert torch.equal(made.read(), rows("int4 token", x, [9], sink=4).read())
    made.drop_oldest(3)  # the window moves on: what comes is no first token
    made.append(x[:, :, :2])
    assert made.first.shape[2] == 1 and made.tokens == 8


@pytest.mark.parametrize("width", [128, 12, 40])
def test_rotated_tokens(width: int) -> None:
    """Rounded behind the matrix, undone where they are read; what stays in float is not touched."""
    x = states(9, width)
    made = rows("int8 token", x, [4, 5], residual=2, sink=1, basis=Rotated.of(width, x.device))
    size = {128: 128, 12: 12, 40: 40}[width]
    matrix = hadamard(size)
    rounded = Quantizer("int8 token").fake_quantize(x[:, :, 1:7].float() @ matrix) @ matrix.T
    read = made.read()
    assert torch.equal(read[:, :, 1:7], rounded.to(x.dtype))
    assert torch.equal(read[:, :, :1], x[:, :, :1]) and torch.equal(read[:, :, 7:], x[:, :, 7:])
    spike = torch.zeros(1, 1, 1, width)
    spike[..., 3] = 100
    assert float(Rotated.of(width, x.device).into(spike).abs().max()) < 100 / size**0.5 * 1.001


def test_sorted_tokens() -> None:
    """As the quantizer rounds them in order; blocks as wide as a head see no order."""
    x = states(5)
    order = torch.stack([torch.randperm(128, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    basis = Sorted.of(order, x.device)
    made, line = rows("bfp12", x, [2, 3], basis=basis), "bfp12 group=128"
    for head in range(3):
        expected = Quantizer("bfp12").fake_quantize(x[:, head][..., order[head]])
        assert torch.equal(made.read()[:, head][..., order[head]], expected)
    assert torch.equal(rows(line, x, [5], basis=basis).read(), rows(line, x, [5]).read())
    assert torch.equal(basis.back(basis.into(x)), x)


def test_an_order_keeps_partners_together() -> None:
    norms = torch.tensor([[1.0, 5, 2, 4, 3, 0], [2, 2, 2, 2, 2, 9]])
    assert descending(norms).tolist() == [[1, 3, 4, 2, 0, 5], [5, 0, 1, 2, 3, 4]]
    halves = torch.tensor([2, 3, 0, 1, 4, 5])  # of four channels that turn; two don't
    assert descending(norms, halves).tolist() == [[1, 3, 4, 0, 2, 5], [5, 0, 2, 1, 3, 4]]


GLM = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


def model_named(family: str) -> Any:
    if family != "glm":
        return model_of(family)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model("glm", **GLM), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model


def test_partners_are_those_of_the_family() -> None:
    """Halves in Llama, neighbours in the half that GLM turns, none in OPT."""
    found = {name: partners(attention(model_named(name))) for name in ("llama", "glm", "opt")}
    assert found["llama"] is not None and found["llama"].tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert found["glm"] is not None and found["glm"].tolist() == [1, 0, 3, 2, 4, 5, 6, 7]
    assert found["opt"] is None


def attention(model: Any, layer: int = 0) -> nn.Module:
    layers: Any = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    found: nn.Module = layers[layer].self_attn
    return found


class Reference(DynamicCache):
    """Keys and values rounded head by head in an order that is taken from the weights here."""

    def __init__(self, model: Any, line: str) -> None:
        super().__init__(config=model.config)
        self.model, self.quantizer = model, Quantizer(line)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        made = []
        for name, x in (("k_proj", key_states), ("v_proj", value_states)):
            weight = getattr(attention(self.model, layer_idx), name).weight.double()
            heads = []
            for head, rows_of in enumerate(weight.split(x.shape[3])):
                order = self._order(rows_of.norm(dim=1), name)
                heads.append(torch.empty_like(x[:, head]))
                heads[-1][..., order] = self.quantizer.fake_quantize(x[:, head][..., order])
            made.append(torch.stack(heads, 1))
        return super().update(made[0], made[1], layer_idx)

    def _order(self, norms: Tensor, name: str) -> list[int]:
        if name == "k_proj" and self.model.config.model_type == "llama":
            half = len(norms) // 2
            both = (norms[:half] ** 2 + norms[half:] ** 2).tolist()
            return [c for i in sorted(range(half), key=lambda i: -both[i]) for c in (i, i + half)]
        return sorted(range(len(norms)), key=lambda i: -float(norms[i]))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_model_sorts_by_its_own_weights(family: str) -> None:
    model = model_named(family)
    plain = generated(model, None)
    expected = generated(model, Reference(model, "bfp12 group=4"))
    use_quantized_cache(model, KVFormat.parse("bfp12 group=4 sort"))
    assert same(generated(model, None), expected) and not same(expected, plain)
    unsorted = generated(model, QuantizedCache(model.config, keys="bfp12 group=4", values="bfp12 group=4"))
    assert not same(expected, unsorted)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "glm", "opt", "bart"])
def test_an_order_alone_changes_nothing(family: str) -> None:
    """Every value of 10 mantissa bits is its own block: the order of channels is undone exactly, whatever turns."""
    line = "float16_e5m10 group=1 scale=one"
    model = model_named(family)
    use_quantized_cache(model, KVFormat.parse(line))
    expected = generated(model, None)
    use_quantized_cache(model, KVFormat.parse(f"{line} sort"))
    assert same(generated(model, None), expected)


def test_weights_of_norms_count() -> None:
    """Qwen 3 normalises a key and multiplies it by weights: these say how large its channels are."""
    found = attention(model_named("qwen3"))
    before = order_of(found, "keys")
    with torch.no_grad():
        found.get_parameter("k_norm.weight")[5] = 100
    after = order_of(found, "keys")
    assert not torch.equal(before, after) and {int(c) for c in after[:, :2].flatten()} == {5, 13}


@pytest.mark.parametrize(
    "line", [f"keys=({KIVI}) values=(int4 group=4) residual=2 sink=3 rotate=values", "int4 group=4 sink=2 rotate"]
)
def test_training_rounds_what_the_cache_rounds(line: str) -> None:
    """A layer's twin on all tokens at once, against the cache that stores them."""
    kv, x = KVFormat.parse(line), states(15, dtype=torch.float32)
    assert kv.keys is not None and kv.values is not None
    part, sides = make_part("ste", {}), {"keys": kv.keys, "values": kv.values}
    twin = FakeCache(kv, {side: part.make(q, x[:, :, :4], side=ACTIVATIONS) for side, q in sides.items()})
    layer = QuantizedLayer(kv)
    assert all(torch.equal(a, b) for a, b in zip(twin(x, 2 * x), layer.update(x, 2 * x), strict=True))
    with pytest.raises(SchemeError, match="sort goes by the weights, which training moves"):
        FakeCache(KVFormat.parse("int4 token sort"), {})


def test_generation_with_everything() -> None:
    """Batches, beams and left padding run; first tokens and whole blocks are where they belong."""
    model = model_of("llama")
    kv = KVFormat.parse(f"keys=({KIVI}) values=(int4 group=4) residual=2 sink=1 rotate")
    use_quantized_cache(model, kv)
    generated(model, None, num_beams=2)
    assert not same(generated(model, None), generated(model, DynamicCache(config=model.config)))
    found = model.generate(torch.arange(3, 30)[None], max_new_tokens=2, pad_token_id=0, return_dict_in_generate=True)
    cache = found.past_key_values
    assert cache.nbytes() == sum(t.nbytes for t in cache.tensors().values())
    assert cache.tensors()["0.keys.first"].shape[2] == 1 and cache.tensors()["0.keys.codes"].shape[2] == 24


def test_what_cannot_be_sorted() -> None:
    model = model_of("gpt_neox")
    with pytest.raises(ModelError, match=r"sort=keys: .*attention has no k_proj .*Take rotate, which needs no weights"):
        use_quantized_cache(model, KVFormat.parse("int4 group=4 sort"))
    model = model_of("llama")
    cache = QuantizedCache.of(model.config, KVFormat.parse("int4 group=4 sort=keys"))
    with pytest.raises(UsageError, match="sort=keys: the order comes from a model's weights"):
        generated(model, cache)


@pytest.mark.parametrize(
    "line",
    [
        "int4 token sink=4 rotate", "int4 group=8 residual=2 sort=keys", "keys=(int4 token) values=(none) rotate",
        "keys=(int2 block=32x1 symmetric=false) values=(int2 group=32) residual=64 sink=4 rotate=values",
    ],
)  # fmt: skip
def test_lines_say_everything(line: str) -> None:
    kv = KVFormat.parse(line)
    assert KVFormat.parse(str(kv)) == kv and str(KVFormat.parse(str(kv))) == str(kv)
    assert set(line.split()) >= {w for w in str(kv).split() if w.startswith(("residual", "sink", "rotate", "sort"))}
