"""K-sort (Trukhanov and Soloveychik 2024, arXiv:2403.20137): what the method must show, in weights and in the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import input_ids, tiny_model
from torch import Tensor, nn

from nybble.calibration.block import BlockState
from nybble.calibration.window import Calibration, Window
from nybble.core.errors import GranularityError, ModelError, NybbleError
from nybble.kv_format import KVFormat
from nybble.models.adapter import adapter_for
from nybble.nn.kv_basis import Sorted, descending
from nybble.nn.kv_cache import QuantizedCache
from nybble.nn.kv_rows import TokenRows
from nybble.quantizer import Quantizer
from nybble.transforms import make_transform

POWERS = "scale=pow2 scale_format=(float8_e8m0fnu scale=one)"


def bfp(mantissa: int, block: int) -> Quantizer:
    return Quantizer(f"int{mantissa} group={block} {POWERS}")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------- 1, 2: formats
@pytest.mark.parametrize("mantissa", [3, 4, 6, 8])
def test_blocks_share_an_exponent(mantissa: int) -> None:
    """The formula of the source, in float64: e = floor(log2 max), step 2^(e - p + 2), codes up to 2^(p - 1) - 1."""
    quantizer = bfp(mantissa, 16)
    exact = torch.tensor([1.0, -1, 0.5, 0] * 4)[None]
    assert torch.equal(quantizer.fake_quantize(exact), exact)
    x = gaussian(64, 16) * torch.exp2(torch.arange(64.0)[:, None] - 32)
    x[3], x[4, 0] = 0, 2**-28 * 7.9999  # the second rounds up to a code that there isn't
    step = torch.exp2(x.double().abs().amax(1, keepdim=True).frexp().exponent.double() - 1 - (mantissa - 2))
    limit = 2 ** (mantissa - 1) - 1
    expected = ((x.double() / step).round().clamp(-limit, limit) * step).float()
    found = quantizer.fake_quantize(x)
    assert torch.equal(found, expected) and torch.equal(quantizer.fake_quantize(found), found)
    assert torch.equal(quantizer.fake_quantize(x * 2**9), found * 2**9)
    error = (found.double() - x).abs()
    clamped = (x.double() / step).abs().round() > limit
    assert bool((error <= step / 2 + step * clamped / 2).all()) and bool(clamped.any()) and not found[3].any()


def test_a_block_that_is_nan_harms_itself_alone() -> None:
    x = gaussian(1, 64)
    x[0, 3] = torch.nan
    found = bfp(4, 16).fake_quantize(x)
    assert found[0, :16].isnan().any() and torch.equal(found[0, 16:], bfp(4, 16).fake_quantize(x[:, 16:])[0])


# -------------------------------------------------------------------------------------- 3, 6: nothing changes in float
def sorting(model: Any, options: dict[str, Any]) -> list[Any]:
    """The rewrites of the first block."""
    path = adapter_for(model).block_names(model)[0]
    state = BlockState(model.get_submodule(path), path)
    calibration = Calibration(
        tokens=0, samples=0, batches=0, device=torch.device("cpu"), dtype=torch.float32, seed=0, config=model.config
    )
    window = Window([state], calibration, lambda path, order: [], "block-0000")
    with torch.no_grad():
        return list(make_transform("ksort", options).rewrites(window, adapter_for(model), "float"))


def biased(model: Any) -> Any:
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.ndim == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(i)) + 0.5)
    return model


SORTED = {"opt": 2, "gpt2": 2, "bloom": 2, "llama": 1, "qwen3": 1, "gpt_neox": 1, "gemma2": 1}
"""How many pairs of a block are sorted: values, and queries with keys where nothing lies between."""


@pytest.mark.parametrize("family", SORTED)
@torch.no_grad()
def test_the_model_stays_in_float64(family: str) -> None:
    """Through the whole model, with biases and shared key heads; and the inverse order gives the same bits again."""
    model = biased(tiny_model(family, torch.float32, **({"num_key_value_heads": 2} if family == "llama" else {})))
    rewrites, block = sorting(model, {}), model.get_submodule(adapter_for(model).block_names(model)[0])
    model.double()
    before = model(input_ids()).logits
    old = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    assert len(rewrites) == SORTED[family]

    def write(back: bool) -> None:
        for rewrite in rewrites:
            order = rewrite.parameters["order"]
            given = {"order": order.argsort(1) if back else order}
            weights = {name: block.get_parameter(name).clone() for name in rewrite.weights}
            for name, value in rewrite.function(weights, given).items():
                block.get_parameter(name).copy_(value)

    write(False)
    changed = {name for name, tensor in block.state_dict().items() if not torch.equal(old[name], tensor)}
    assert changed and all("weight" in name or "bias" in name for name in changed)
    after = model(input_ids()).logits
    assert float((after - before).abs().max()) < 1e-12 * float(before.abs().max())
    write(True)
    assert all(torch.equal(old[name], tensor) for name, tensor in block.state_dict().items())


@torch.no_grad()
def test_heads_are_sorted_by_themselves_and_queries_follow_their_keys() -> None:
    """OPT's rows, in the order of the norms of W_k: of queries the same rows as of keys, none out of its head."""
    model = biased(tiny_model("opt", torch.float32))
    attention = model.model.decoder.layers[0].self_attn
    old = {name: getattr(attention, f"{name}_proj").weight.clone() for name in ("q", "k", "v")}
    for rewrite in sorting(model, {}):
        rewrite.apply(BlockState(model.model.decoder.layers[0], ""))
    for name, by in (("q", "k"), ("k", "k"), ("v", "v")):
        for head in range(4):
            rows = slice(8 * head, 8 * head + 8)
            order = sorted(range(8), key=lambda i: -float(old[by][rows][i].double().norm()))
            assert torch.equal(getattr(attention, f"{name}_proj").weight[rows], old[name][rows][order])


# ------------------------------------------------------------------------------------------- 4, 5: what it is for
def lost(x: Tensor, queries: Tensor, block: int, order: Tensor | None) -> float:
    """Mean-square error of scores; keys [tokens, width] of 4 bits, queries of 8."""
    found = []
    for bits, states in ((4, x), (8, queries)):
        basis = Sorted.of(torch.arange(x.shape[1])[None] if order is None else order, x.device)
        ordered = basis.into(states[None, None])
        found.append(bfp(bits, block).fake_quantize(ordered)[0, 0].double())
    exact = queries.double() @ x.double().T
    return float((found[1] @ found[0].T - exact).square().mean())


@pytest.mark.parametrize(
    ("many", "factor", "ratios"),
    [(8, 10, (1.3, 1.6, 1.7)), (16, 4, (1.3, 1.6, 1.8)), (16, 10, (1.5, 1.9, 2.0)), (32, 4, (1.4, 1.9, 1.7))],
)
def test_scattered_outlier_channels(many: int, factor: int, ratios: tuple[float, ...]) -> None:
    """Gaussian inputs, heads 128 wide: errors unsorted over sorted; whole heads see no order."""
    generator = torch.Generator().manual_seed(7)
    gain = torch.ones(128)
    gain[torch.randperm(128, generator=generator)[:many]] = factor
    weight = torch.randn(128, 256, generator=generator) * gain[:, None]
    inputs = torch.randn(512, 256, generator=generator) / 16
    keys, queries = inputs @ weight.T, torch.randn(512, 128, generator=generator)
    order = descending(weight.norm(dim=1)[None])
    assert lost(keys, queries, 128, order) == pytest.approx(lost(keys, queries, 128, None), rel=1e-6)
    for block, expected in zip((64, 32, 16), ratios, strict=True):
        found = lost(keys, queries, block, None) / lost(keys, queries, block, order)
        assert found > 1.1 and found == pytest.approx(expected, rel=0.15), block


def test_channels_that_are_alike_gain_nothing() -> None:
    keys, queries = gaussian(512, 128), gaussian(512, 128, seed=1)
    order = descending(gaussian(1, 128, seed=2).abs())
    for block in (64, 32, 16):
        assert lost(keys, queries, block, order) == pytest.approx(lost(keys, queries, block, None), rel=0.03)


# ---------------------------------------------------------------------------------------------------- 7: what it costs
def test_a_sorted_cache_is_as_small_as_an_unsorted_one() -> None:
    """p + 8 / b bits an element of keys and values: 1.94 times less than BFP16 at b = 32, 3.76 than 16-bit floats."""
    model = tiny_model("llama", hidden_size=256)  # heads of 64
    heads, width, tokens = 2, 64, 24
    x = gaussian(1, heads, tokens, width).to(torch.bfloat16)
    sizes = {}
    for line in ("bfp12 sort", "bfp12 group=16 sort", "bfp16 sort", "none"):
        kv = KVFormat.parse(line)
        orders = {i: dict.fromkeys(kv.sort, torch.arange(width).expand(heads, -1)) for i in range(2)}
        cache = QuantizedCache.of(model.config, kv, orders)
        for layer in range(2):
            cache.update(x, x, layer)
        sizes[line] = 8 * cache.nbytes() / (2 * 2 * heads * tokens * width)
    assert sizes == {"bfp12 sort": 4.25, "bfp12 group=16 sort": 4.5, "bfp16 sort": 8.25, "none": 16}


# ---------------------------------------------------------------------------------------------------- 8: bad input
def test_refusals() -> None:
    for family in ("llama", "gpt_neox", "qwen3"):
        model = tiny_model(family)
        with pytest.raises(ModelError, match=r"keys can't be sorted in the weights.*rotary.*Write 'sort=keys'"):
            make_transform("ksort", {"keys": "fold"}).check("ksort", adapter_for(model), model)
    with pytest.raises(ModelError, match="'ksort' finds no pair"):
        make_transform("ksort", {}).check("ksort", adapter_for(tiny_model("falcon")), tiny_model("falcon"))
    make_transform("ksort", {"keys": "fold"}).check("ksort", adapter_for(tiny_model("opt")), tiny_model("opt"))
    with pytest.raises(GranularityError, match=r"one head wide, 40 values.*does not divide it"):
        TokenRows(bfp(4, 16), 0, gaussian(1, 1, 1, 40))
    for line in (f"int4 group=0 {POWERS}", f"int4 group=-1 {POWERS}", f"int0 group=16 {POWERS}", "int99 group=16"):
        with pytest.raises(NybbleError):
            KVFormat.parse(line)


@torch.no_grad()
def test_sorting_changes_only_what_it_says() -> None:
    model = tiny_model("opt", torch.float32)
    assert [len(sorting(model, o)) for o in ({"keys": "leave"}, {"values": False}, {"keys": "fold"})] == [1, 1, 2]
    names = {name for rewrite in sorting(model, {"keys": "leave"}) for name in rewrite.weights}
    assert not any(part in name for name in names for part in ("q_proj", "k_proj"))
    assert isinstance(model.model.decoder.layers[0].self_attn.q_proj, nn.Linear)
