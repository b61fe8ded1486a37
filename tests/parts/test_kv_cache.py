"""The quantized KV cache: stored bytes, what is read back, and every operation that transformers asks of a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from tests.tiny import SIZES, given, input_ids, tiny_model
from torch import Tensor
from transformers import AutoConfig, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from nybble.core.errors import GranularityError, ModelError, SchemeError, UsageError
from nybble.kv_format import KVFormat
from nybble.nn.kv_cache import QuantizedCache, QuantizedLayer, QuantizedSlidingLayer, make_cache
from nybble.nn.kv_rows import TokenRows
from nybble.presets import PRESETS
from nybble.quantizer import Quantizer

WIDTH = 128
LINES = (
    "float8_e4m3fn token",
    "float8_e4m3fn scale=one",
    "int4 token",
    "int4 group=32",
    "int8 group=16 scale_format=bfloat16",
    "int4 group=32 symmetric=false",
    "int3 group=16 symmetric=false",
    "int5 token",
    "int4 group=16 scale=mse",
    "int4 token scale=percentile(p=99)",
    "nf4 group=64",
    "nf4 group=16 scale_format=(dynamic8 token)",
    "e2m1 group=16 scale=minmax(offset=true) offset_format=float16",
    "ternary token packing=base3",
    "nvfp4 scale=mse",
    "e5m10 scale=one",
)


def states(tokens: int, width: int = WIDTH, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[2, 3, tokens, width] of several sizes, with a row of zeros, an outlier and subnormals."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, tokens, width, generator=generator) * torch.exp(
        torch.randn(2, 3, tokens, 1, generator=generator)
    )
    x[0, 0, 0] = 0
    x[1, 2, -1, 3] = 300
    x[0, 1, tokens // 2] *= 1e-38
    return x.to(dtype)


def filled(quantizer: Quantizer | None, x: Tensor, cuts: Sequence[int], residual: int = 0) -> TokenRows:
    rows = TokenRows(quantizer, residual, x[:, :, :0])
    for part in torch.split(x, list(cuts), 2):
        rows.append(part)
    return rows


def accepted() -> list[str]:
    """Every preset that a cache of heads of 128 can have, and LINES."""
    found = list(LINES)
    for name in PRESETS:
        try:
            filled(KVFormat.parse(name).keys, states(1), [1])
        except (SchemeError, GranularityError):
            continue
        found.append(name)
    return found


def test_presets_that_a_cache_can_have() -> None:
    named = {"mxfp8", "mxfp4", "mxint8", "nvfp4", "bfp16", "bfp12", "msfp12", "fp8-token"}
    assert named <= set(accepted())
    assert not {"nf4-bnb", "nvfp4-ct", "fp8-channel", "state4-unsigned", "int8-ct", "b1.58"} & set(accepted())


@pytest.mark.parametrize("line", accepted())
def test_the_same_bytes_however_the_text_is_cut(line: str) -> None:
    """At once, in chunks, token by token: codes and scales are those of the quantizer on all tokens."""
    quantizer, x = KVFormat.parse(line).keys, states(9)
    assert quantizer is not None
    whole = filled(quantizer, x, [9])
    for cuts in ([1] * 9, [4, 1, 1, 3], [1, 8]):
        parts = filled(quantizer, x, cuts)
        assert parts.tensors().keys() == whole.tensors().keys()
        for name, tensor in whole.tensors().items():
            assert torch.equal(tensor.view(torch.uint8), parts.tensors()[name].view(torch.uint8)), name
        assert torch.equal(parts.read(), whole.read())
    expected = quantizer.quantize(x)
    assert torch.equal(whole.read(), quantizer.fake_quantize(x))
    stored = whole.qtensor()
    assert stored is not None and stored.spec() == expected.spec()
    for name, tensor in expected.tensors().items():
        assert torch.equal(stored.tensors()[name], tensor), name


@pytest.mark.parametrize("line", accepted())
def test_bytes_are_all_that_is_held(line: str) -> None:
    """nbytes() is the sum of the tensors', they hold no more memory than that, and it is the QTensor's size."""
    quantizer, x = KVFormat.parse(line).keys, states(7)
    assert quantizer is not None
    rows = filled(quantizer, x, [3, 4])
    rows.drop_oldest(2)
    rows.drop_newest(1)
    held = sum(t.untyped_storage().nbytes() for t in rows.tensors().values())
    assert rows.nbytes() == held == sum(t.nbytes for t in rows.tensors().values())
    packed = quantizer.quantize(x[:, :, 2:6]).nbytes()
    # zero points of a row, or five digits to a byte, may end inside a byte
    wasted = 2 * 3 * 4 if any(word in line for word in ("symmetric=false", "asym", "base3")) else 0
    assert packed <= rows.nbytes() <= packed + wasted


@pytest.mark.parametrize(("name", "bits", "block"), [("bfp12", 4, 32), ("bfp16", 8, 32), ("msfp12", 4, 16)])
def test_a_token_costs_what_the_format_says(name: str, bits: int, block: int) -> None:
    """p + 8 / b bits an element (Trukhanov and Soloveychik 2024, arXiv:2403.20137)."""
    quantizer = KVFormat.parse(name).keys
    before, after = (filled(quantizer, states(n), [n]).nbytes() for n in (8, 9))
    assert 8 * (after - before) == 2 * 3 * (WIDTH * bits + 8 * WIDTH // block)
    assert 8 * before == 2 * 3 * 8 * WIDTH * (bits + 8 / block)


NARROW = {
    "int3 token": 6,
    "int4 token": 5,
    "int5 group=3": 9,
    "e5m6 token": 7,
    "int3 group=2 symmetric=false": 6,
    "ternary token packing=base3": 12,
}


@pytest.mark.parametrize(("line", "width"), NARROW.items())
def test_rows_that_end_inside_a_byte(line: str, width: int) -> None:
    quantizer, x = Quantizer(line), states(6, width)
    rows = filled(quantizer, x, [2, 1, 3])
    assert torch.equal(rows.read(), quantizer.fake_quantize(x))
    stored = rows.qtensor()
    assert stored is not None
    assert all(torch.equal(stored.tensors()[n], t) for n, t in quantizer.quantize(x).tensors().items())
    rows.select(torch.tensor([1, 0, 1]))
    rows.drop_oldest(1)
    assert torch.equal(rows.read(), quantizer.fake_quantize(x)[[1, 0, 1]][:, :, 1:])


def test_newest_tokens_stay_in_float_until_they_are_old() -> None:
    """Each is rounded once, when it leaves the newest; what is cut off them doesn't come back."""
    quantizer, x = Quantizer("int4 token"), states(12)
    fake = quantizer.fake_quantize(x)
    for cuts in ([12], [1] * 12, [5, 7]):
        rows = filled(quantizer, x, cuts, residual=5)
        assert rows.rounded == 7 and torch.equal(rows.read(), torch.cat([fake[:, :, :7], x[:, :, 7:]], 2))
        assert rows.newest.untyped_storage().nbytes() == rows.newest.nbytes == x[:, :, 7:].nbytes
    rows.drop_newest(7)
    assert rows.rounded == 5 and torch.equal(rows.read(), fake[:, :, :5])
    rows.append(x[:, :, 5:9])
    assert rows.rounded == 5 and torch.equal(rows.read(), torch.cat([fake[:, :, :5], x[:, :, 5:9]], 2))
    rows.append(x[:, :, 9:])
    assert rows.rounded == 7 and torch.equal(rows.read(), torch.cat([fake[:, :, :7], x[:, :, 7:]], 2))
    rows.drop_oldest(8)
    assert rows.rounded == 0 and torch.equal(rows.read(), x[:, :, 8:])


def test_a_token_that_is_nan_harms_itself_alone() -> None:
    x = states(4)
    x[0, 0, 1, 0] = torch.nan
    read = filled(Quantizer("int4 token"), x, [4]).read()
    assert read[0, 0, 1].isnan().all() and int(read.isnan().sum()) == WIDTH


# ---------------------------------------------------------------------------------------- what transformers asks of it
def both(kv: KVFormat, window: int | None) -> tuple[Any, Any]:
    """Ours and transformers' own layer."""
    if window is None:
        return QuantizedLayer(kv), DynamicLayer()  # type: ignore[no-untyped-call]
    return QuantizedSlidingLayer(kv, window), DynamicSlidingWindowLayer(window)


STEPS: dict[str, Callable[[Any], None]] = {
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1])),
    "crop 1": lambda layer: layer.crop(-1),
    "crop 3": lambda layer: layer.crop(-3),
    "crop 0": lambda layer: layer.crop(0),
    "reset": lambda layer: layer.reset(),
}
WALKS = (
    (4, 1, "reorder", 1, "repeat", 3, "select", 2),
    (2, "crop 1", 3, "reorder", 1, 1),
    ("reset", 3, "reset", 5, 1, "crop 0", 2),
    (9, 1, 1, "repeat", "reorder", 4),
)


@pytest.mark.parametrize("window", [None, 6, 4])
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("line", ["none", "int8 token residual=99", "int8 token", "keys=(int4 group=32) values=(none)"])
def test_each_operation_is_that_of_transformers_layer(
    line: str, walk: tuple[int | str, ...], window: int | None
) -> None:
    """Ours on any states, against transformers' layer on the states as the quantizers round them."""
    kv = KVFormat.parse(line)
    ours, theirs = both(kv, window)
    sizes, seed = 2, 0
    for step in walk:
        if isinstance(step, str):
            if window is not None and step == "crop 0" and theirs.get_seq_length() >= window:
                continue  # transformers' layer refuses to remove nothing
            if step == "reset" and not theirs.is_initialized:
                continue
            STEPS[step](ours)
            if step == "reset":
                theirs = both(kv, window)[1]  # 5.17 fills the old tokens with zeros instead of dropping them
            else:
                STEPS[step](theirs)
            sizes = {"repeat": 2 * sizes, "select": 1, "reset": 2}.get(step, sizes)
            if step == "reorder":
                sizes = 2
        else:
            seed += 1
            keys, values = (torch.cat([states(step, seed=seed + k)] * sizes)[:sizes] for k in (0, 50))
            assert ours.get_mask_sizes(step) == theirs.get_mask_sizes(step)
            found = ours.update(keys, values)
            rounded = [
                x if q is None or kv.residual else q.fake_quantize(x) for q, x in ((kv.keys, keys), (kv.values, values))
            ]
            expected = theirs.update(*rounded)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
        if ours.is_initialized:
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    assert ours.get_max_length() == theirs.get_max_length() and ours.is_sliding == theirs.is_sliding


def test_a_window_goes_back_only_as_far_as_it_remembers() -> None:
    x, kv = states(9), KVFormat.parse("int8 token")
    layer, theirs = QuantizedSlidingLayer(kv, 4), DynamicSlidingWindowLayer(4)
    layer.update(x, x)
    assert sum(t.shape[2] for n, t in layer.tensors().items() if n == "keys.codes") == 3
    with pytest.raises(UsageError, match=r"crop\(-1\): tokens that left the window of 4 would be needed again"):
        layer.crop(-1)
    layer.activate_past_recording()
    theirs.update(*[kv.keys.fake_quantize(x) if kv.keys else x] * 2)
    theirs.activate_past_recording()  # type: ignore[no-untyped-call]
    more = states(5, seed=1)
    ours_read = layer.update(more, more)[0]
    assert kv.keys is not None
    assert torch.equal(ours_read, theirs.update(*[kv.keys.fake_quantize(more)] * 2)[0])
    for cache in (layer, theirs):
        cache.crop(-2)
    assert layer.get_mask_sizes(1) == theirs.get_mask_sizes(1) == (4, 9)
    assert layer.keys is not None and theirs.keys is not None and torch.equal(layer.keys, theirs.keys)
    x = states(1, seed=2)
    assert layer.update(x, x)[0].shape[2] == 4  # the mask's size, whatever is remembered beside it
    layer.update(x, x)
    assert layer.update(x, x)[0].shape[2] == layer.get_mask_sizes(1)[0] == 4
    with pytest.raises(UsageError, match=r"crop\(3\): give the tokens to remove as a negative number"):
        QuantizedLayer(kv).crop(3)
    with pytest.raises(UsageError, match="leave offloading out"):
        layer.offload()


def test_gradients_pass_straight_through() -> None:
    kv = KVFormat.parse("int4 token residual=2")
    plain, layer = QuantizedLayer(kv), QuantizedLayer(kv)
    for seed in (0, 1):
        x = states(3, seed=seed, dtype=torch.float32).requires_grad_()
        keys, values = layer.update(x, 2 * x)
        with torch.no_grad():
            exact = plain.update(x, 2 * x)
        assert torch.equal(keys, exact[0]) and torch.equal(values, exact[1])
        (3 * keys.sum() + values.sum()).backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 5.0))
        assert not any(tensor.requires_grad for tensor in layer.tensors().values())


# ------------------------------------------------------------------------------------------------ whole models
class Fake(DynamicCache):
    """transformers' cache of keys and values rounded on their way in: what ours must equal."""

    def __init__(self, config: Any, kv: KVFormat) -> None:
        super().__init__(config=config)
        self.kv = kv

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        pairs = ((self.kv.keys, key_states), (self.kv.values, value_states))
        keys, values = (x if q is None else q.fake_quantize(x) for q, x in pairs)
        return super().update(keys, values, layer_idx)


BART = {
    "vocab_size": 300, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "decoder_start_token_id": 1,
}  # fmt: skip
DECODERS = (
    "llama", "mistral", "gemma2", "gemma3_text", "gpt2", "opt", "qwen3", "mixtral", "bloom", "falcon", "gpt_neox",
)  # fmt: skip
LINE = "keys=(int4 group=4 symmetric=false) values=(nvfp4 group=8)"


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    if family not in ("bart", "t5"):
        return tiny_model(family, dtype)
    config = AutoConfig.for_model(family, **(BART if family == "bart" else T5))
    name = "BartForConditionalGeneration" if family == "bart" else "T5ForConditionalGeneration"
    cls: Any = getattr(transformers, name)
    model = cls._from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_((8 if family == "bart" else 2) if parameter.ndim > 1 else 1)
    return model


def caches(model: Any, kv: KVFormat) -> tuple[Any, Any]:
    """Ours and the reference."""
    config, fake = model.config, Fake(model.config, kv)
    return make_cache(config, kv), EncoderDecoderCache(fake, Fake(config, kv)) if config.is_encoder_decoder else fake


def generated(model: Any, cache: Any, **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Tokens and their logits, from two prompts, one padded on the left."""
    ids = input_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ids[0, :3] = 0
    found = model.generate(
        ids, attention_mask=mask, **given(model, cache), max_new_tokens=10, do_sample=False, pad_token_id=0,
        eos_token_id=None, return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return found.sequences, found.logits


def same(a: tuple[Tensor, tuple[Tensor, ...]], b: tuple[Tensor, tuple[Tensor, ...]]) -> bool:
    return torch.equal(a[0], b[0]) and len(a[1]) == len(b[1]) and all(map(torch.equal, a[1], b[1]))


@pytest.mark.parametrize("family", [*DECODERS, "bart", "t5"])
def test_generation_equals_rounded_keys_and_values(family: str) -> None:
    """Greedy and beam search, bit for bit; and it isn't what the float cache gives."""
    model, kv = model_of(family), KVFormat.parse(LINE)
    ours, fake = caches(model, kv)
    found = generated(model, ours)
    assert same(found, generated(model, fake))
    assert not same(found, generated(model, None))
    ours, fake = caches(model, kv)
    beams = generated(model, ours, num_beams=3)
    assert same(beams, generated(model, fake, num_beams=3))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "bart", "t5"])
@pytest.mark.parametrize("line", ["e8m7 scale=one", "none", "int2 token residual=64"])
def test_an_exact_cache_is_transformers_own(family: str, line: str) -> None:
    """bfloat16 as a format holds bfloat16 states; so does float, and so do newest tokens that never get old."""
    model = model_of(family, torch.bfloat16)
    kv = KVFormat.parse(line)
    cache: Any = make_cache(model.config, kv)
    if kv.residual and model.config.is_encoder_decoder:  # of the encoder's tokens none is newest
        cache.cross_attention_cache = DynamicCache(config=model.config)
    assert same(generated(model, cache), generated(model, None))


def test_bytes_of_a_whole_cache_and_its_windows() -> None:
    model = model_of("mistral", torch.bfloat16)
    cache: Any = QuantizedCache(model.config, keys="mxint8 group=8", values="int4 token")
    exact: Any = DynamicCache(config=model.config)
    generated(model, cache)
    generated(model, exact)
    tokens, rows = SIZES["num_key_value_heads"] * 2, 5  # heads x batch; a window of 6
    # keys: 8 bytes and a scale's; values: 4 bytes and a float32
    assert cache.nbytes() == SIZES["num_hidden_layers"] * tokens * rows * ((8 + 1) + (4 + 4))
    assert cache.nbytes() == sum(t.untyped_storage().nbytes() for t in cache.tensors().values())
    floats = sum(t.nbytes for layer in exact.layers for t in (layer.keys, layer.values) if t is not None)
    assert cache.nbytes() == floats * 17 / 32 and set(cache.qtensors()) == {"0.keys", "0.values", "1.keys", "1.values"}
    assert cache.get_seq_length() == 21
    cache.reset()
    assert cache.nbytes() == 0 and cache.get_seq_length() == 0


def test_drafts_are_taken_back() -> None:
    """Assisted generation crops the cache; greedy tokens are the same without it."""
    model = model_of("gemma2")
    ids = input_ids()[:1, [0, 1, 2, 0, 1, 2, 0, 1]]

    def run(**options: Any) -> Tensor:
        cache = QuantizedCache(model.config, keys="int4 token", values="int4 token")
        found: Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), **given(model, cache), max_new_tokens=16, do_sample=False,
            pad_token_id=0, eos_token_id=None, **options,
        )  # fmt: skip
        return found

    assert torch.equal(run(), run(prompt_lookup_num_tokens=3))


def test_formats_by_layer() -> None:
    model, kv = model_of("llama"), KVFormat.parse("int4 token")
    cache = QuantizedCache.of(model.config, {1: kv})
    generated(model, cache)
    assert set(cache.qtensors()) == {"1.keys", "1.values"}
    assert cache.layers[0].tensors()["keys.newest"].shape == (2, 2, 21, 8)


REFUSED = {
    "int4": "'tensor' has scales that tokens share.*Write 'int4 token'",
    "int8 channel": "'channel' has scales that tokens share.*Write 'int8 token'",
    "nf4 flat=64": "'flat=64' has scales that tokens share.*Write 'nf4 group=64'",
    "int4 rank1": "'rank1' has scales that tokens share",
    "e2m1 shifted": "'shifted' has scales that tokens share",
    "int4 plane": "'plane' has scales that tokens share",
    "float8_e4m3fn token static": "leave out 'static' to measure scales on each token",
    "int4 token rounding=stochastic": "use rounding=nearest-even",
    "uint4 token": "signed and uint4 is not",
    "nvfp4-ct": "write 'nvfp4'",
    "nf4 group=64 scale_format=(dynamic8 token center=mean)": "subtracts a mean over all tokens",
    "nf4 group=64 scale_format=(dynamic8 flat=256)": "'flat=256' has scales that tokens share",
    "int4 token residual=few": "residual=few",
    "int4 token sink=-1": "sink=-1: the number of first tokens",
    "keys=(int4 token) values=(none) rotate=values": "rotate=values: say keys or values, of what is stored",
    "int4 token sort=both": "sort=both: say keys or values",
    "none rotate": "rotate=keys",
    "int4 token rotate sort=keys": "rotate spreads the channels of keys that sort gathers",
    "float8_e4m3fn tensor static rotate": "other magnitudes than calibration sees",
    "int2 block=32x1 scale_format=(float8_e4m3fn flat=8)": "'flat=8' has scales that tokens share",
    "keys=(int4 token)": r"say keys=\(\.\.\.\) and values=\(\.\.\.\)",
    "keys=(int4 token) value=(int4 token)": "Did you mean 'values'",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_grow_token_by_token_is_refused(line: str) -> None:
    with pytest.raises(SchemeError, match=REFUSED[line]):
        KVFormat.parse(line)


@pytest.mark.parametrize(
    "line", [*LINES, "none", "nvfp4", LINE, "keys=(bfp12) values=(none) residual=3", "int4 token residual=8"]
)
def test_a_line_says_everything(line: str) -> None:
    kv = KVFormat.parse(line)
    assert KVFormat.parse(str(kv)) == kv


def test_the_outer_scale_of_nvfp4_becomes_one_of_the_token() -> None:
    kv = KVFormat.parse("nvfp4")
    assert kv.keys == Quantizer("nvfp4", scale_format="(float8_e4m3fn token floor=normal)")
    x = states(3)
    rows = filled(kv.keys, x, [3])
    for token in range(3):  # as nvfp4 does it with one token of one head as the tensor
        one = Quantizer("nvfp4").fake_quantize(x[1, 2, token : token + 1])
        assert torch.equal(rows.read()[1, 2, token], one[0])


def test_models_and_widths_that_do_not_fit() -> None:
    model = model_of("llama")
    with pytest.raises(
        GranularityError, match=r"one head wide, 8 values.*'group=32' does not divide it\. .*: 8\. Or 'token'"
    ):
        generated(model, QuantizedCache(model.config, keys="int4 group=32", values=None))
    config = AutoConfig.for_model("deepseek_v32", num_hidden_layers=2)
    with pytest.raises(ModelError, match="caches more than keys and values"):
        QuantizedCache(config, keys="int4 token", values=None)
    config = AutoConfig.for_model("mamba2", num_hidden_layers=2)
    with pytest.raises(ModelError, match="no layer of this model caches keys and values"):
        QuantizedCache(config, keys="int4 token", values=None)
