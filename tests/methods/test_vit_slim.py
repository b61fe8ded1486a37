"""ViT-Slim: masks, thresholds, slices, counts: against plain transformers, torch's own counter, exact arithmetic."""

from __future__ import annotations

import copy
import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

import nybble
from nybble.core.errors import DataError, ModelError, SchemeError, UsageError
from nybble.models.own.slim_vit import SlimViTForImageClassification
from nybble.search.architectures.vit_slim import _magnitude
from nybble.search.slimming.choose import Kept, cheapest, choose, kept_at, nested
from nybble.search.slimming.count import flops, parameters
from nybble.search.slimming.masks import KINDS, Masks
from nybble.search.slimming.slices import full_kept, sliced


def vit(seed: int = 0, **more: Any) -> Any:
    """Three layers of two heads with biases that aren't zero, 16 patches; eager attention takes masks of floats."""
    sizes = {
        "image_size": 16, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_labels": 3, "attn_implementation": "eager",
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config: Any = ViTConfig
        made: Any = ViTForImageClassification(config(**{**sizes, **more})).eval()  # type: ignore[no-untyped-call]
        for p in made.parameters():
            p.data.normal_(std=0.3)
    return made


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def drawn(model: Any, seed: int = 0, share: float = 0.5) -> Kept:
    """Random units; the first head of the second layer is empty, and token sets are nested."""
    generator = torch.Generator().manual_seed(seed)
    kept = {
        kind: [torch.rand(each.shape, generator=generator) < share for each in layers]
        for kind, layers in full_kept(model).items()
    }
    kept["attention"][1][0] = False
    for kind in ("attention", "mlp"):
        for each in kept[kind]:
            each.view(-1)[-1] = True
    return {**kept, "tokens": nested(kept["tokens"])}


@torch.no_grad()
def masked(model: Any, kept: Kept, pixels: Tensor, excluded: bool = True) -> Tensor:
    """Logits of the plain network with weights set to zero, and keys of removed tokens out of each softmax."""
    made = copy.deepcopy(model)
    for layer, rows, units, tokens in zip(made.vit.layers, *(kept[kind] for kind in KINDS), strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.attention, name).weight.mul_(rows.flatten()[:, None])
            getattr(layer.attention, name).bias.mul_(rows.flatten())
        layer.mlp.fc2.weight.mul_(units)
        there = torch.cat([torch.ones(1, dtype=torch.bool), tokens])
        if excluded:
            mask = torch.zeros(there.shape).masked_fill(~there, float("-inf"))[None, None, None]
            layer.register_forward_pre_hook(lambda module, args, mask=mask: (args[0], mask))
        else:
            for norm in (layer.layernorm_before, layer.layernorm_after):
                norm.register_forward_hook(lambda module, args, y, there=there: y * there[:, None])
    found: Tensor = made(pixel_values=pixels).logits
    return found


@pytest.mark.parametrize(("heads", "shape"), [("feature", (2, 2)), ("head", (2, 1)), ("layer", (1, 2))])
def test_nothing_that_is_chosen_costs_less_than_the_cheapest(heads: str, shape: tuple[int, int]) -> None:
    """And of 200 random scores some cost as little."""
    config = vit(hidden_size=4, intermediate_size=3, num_hidden_layers=2).config
    sizes: dict[str, tuple[int, ...]] = {"attention": (2, 2), "mlp": (3,), "tokens": (4,)}
    full: Kept = {kind: [torch.ones(each, dtype=torch.bool)] * 2 for kind, each in sizes.items()}
    sizes["attention"] = shape
    generator = torch.Generator().manual_seed(0)
    for least, tokens in itertools.product((1, 2, 3), (None, Fraction(1, 4), Fraction(3, 8), Fraction(1))):
        end, found = cheapest(full, KINDS, heads, least, tokens), list[Kept]()
        for _ in range(200):
            scores = {kind: [torch.rand(each, generator=generator) for _ in range(2)] for kind, each in sizes.items()}
            found.append(choose(scores, full, Fraction(1, 10_000), tokens=tokens, least=least))
        for cost in (parameters, flops):
            assert cost(config, end) == min(cost(config, each) for each in found)


@pytest.mark.parametrize(
    "name", ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"]
)
def test_every_weight_of_a_unit_is_in_its_magnitude(name: str) -> None:
    layer = vit().vit.layers[0]
    weight = layer.get_submodule(name).weight.data
    (weight.T if name in ("attention.o_proj", "mlp.fc2") else weight)[5] *= 100
    kind, like = ("mlp", torch.ones(24)) if "mlp" in name else ("attention", torch.ones(2, 8))
    assert int(_magnitude(layer, kind, like).flatten().argmax()) == 5


def test_masks_at_their_beginning_change_nothing() -> None:
    """Bit for bit; those of patches only by tanh 3 on the normed inputs, of all tokens but the first."""
    model, pixels = vit(), images()
    made = copy.deepcopy(model)
    Masks(made, ("attention", "mlp"))
    assert torch.equal(made(pixel_values=pixels).logits, model(pixel_values=pixels).logits)
    made = copy.deepcopy(model)
    Masks(made, ("tokens",))
    x = torch.randn(2, 17, 16)
    factor = (made.vit.layers[0].layernorm_after(x) / model.vit.layers[0].layernorm_after(x)).detach()
    assert torch.equal(factor[:, 0], torch.ones_like(factor[:, 0]))
    torch.testing.assert_close(factor[:, 1:], torch.full_like(factor[:, 1:], 0.9950548), rtol=1e-6, atol=1e-6)


def test_one_mask_is_of_queries_keys_and_values() -> None:
    """q k carries its square: against products written out; a mask takes the bias too."""
    model = vit()
    layer = copy.deepcopy(model).vit.layers[0]
    made = copy.deepcopy(model)
    masks = Masks(made, ("attention",))
    z = torch.linspace(-0.5, 1.5, 16).view(2, 8)
    masks.by_kind["attention"][0].z.data.copy_(z)
    x = torch.randn(2, 17, 16)
    found = made.vit.layers[0].attention(x)[0]
    q, k, v = (
        getattr(layer.attention, f"{name}_proj")(x).view(2, 17, 2, 8).transpose(1, 2) * z[:, None] for name in "qkv"
    )
    wanted = functional.scaled_dot_product_attention(q, k, v, scale=8**-0.5).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, layer.attention.o_proj(wanted), rtol=1e-5, atol=1e-6)


def test_the_penalty_is_a_sum_with_the_gradient_of_the_absolute_value() -> None:
    made = vit()
    masks = Masks(made)
    weights = {"attention": 0.5, "mlp": 0.25, "tokens": 2.0}
    generator = torch.Generator().manual_seed(2)
    for each in masks.parameters():
        each.data.copy_(torch.randn(each.shape, generator=generator))
    loss = masks.penalty(weights)
    loss.backward()  # type: ignore[no-untyped-call]
    total = loss.detach()
    wanted = 0.0
    for kind, layers in masks.by_kind.items():
        for mask in layers:
            z, w = mask.z.detach(), weights[kind]
            t = z.tanh()
            slope = w * t.sign() * (1 - t**2) if kind == "tokens" else w * z.sign()
            torch.testing.assert_close(mask.z.grad, slope)
            wanted += float(w * (t if kind == "tokens" else z).abs().sum())
    assert float(total) == pytest.approx(wanted, rel=1e-5)
    first, step = masks.by_kind["tokens"][0].z, 1e-2
    with torch.no_grad():
        first[0] += step
        more = masks.penalty(weights) - total
    assert first.grad is not None
    assert float(more) / step == pytest.approx(float(first.grad[0]), rel=0.05)


@pytest.mark.parametrize(
    ("share", "count"), [("0.8", 10), ("0.9", 20), ("0.7", 50), ("1/3", 7), ("1", 9), ("0.001", 9)]
)
def test_kept_counts_are_exact_whatever_binary_fractions_say(share: str, count: int) -> None:
    """Sets shrink with the share; of ties more stay; the sign counts."""
    part, scores = Fraction(share), torch.randperm(count, generator=torch.Generator().manual_seed(0)).double()
    layers = [scores[: count // 2], scores[count // 2 :]]
    found = torch.cat(kept_at(layers, part))
    assert int(found.sum()) == count - int((1 - part) * count // 1)
    smaller = torch.cat(kept_at(layers, part / 2))
    assert not bool((smaller & ~found).any())
    assert int(torch.cat(kept_at([torch.ones(count)], part)).sum()) == count
    assert kept_at([torch.tensor([-5.0, 1.0])], Fraction(1, 2))[0].tolist() == [False, True]


def test_token_sets_are_nested_and_the_class_token_stays() -> None:
    model, pixels = vit(), images()
    masks = Masks(copy.deepcopy(model), ("tokens",))
    generator = torch.Generator().manual_seed(4)
    for z in masks.parameters():
        z.data.copy_(torch.randn(z.shape, generator=generator))
    scores = {"tokens": masks.scores("tokens")}
    kept = choose(scores, full_kept(model), Fraction("0.3"))
    raw = kept_at(scores["tokens"], Fraction("0.3"))
    for number, each in enumerate(kept["tokens"]):
        assert torch.equal(each, torch.stack(raw[number:]).any(0))
    nobody = {**kept, "tokens": [torch.zeros(16, dtype=torch.bool)] * 3}
    made = sliced(model, nobody)
    assert made.vit.layers[2](made.vit.layers[1](made.vit.layers[0](torch.randn(2, 17, 16)))).shape == (2, 1, 16)
    with pytest.raises(ModelError, match="the one before has let go of"):
        sliced(model, {**kept, "tokens": kept["tokens"][::-1]})
    assert made(pixel_values=pixels).logits.shape == (5, 3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("seed", range(3))
def test_slices_compute_what_masks_do(seed: int, attention: str) -> None:
    """Ragged heads, an empty head, removed tokens: the plain network with zeros and a masked softmax, to 1e-6."""
    model, pixels = vit(seed), images()
    kept = drawn(model, seed)
    made: Any = sliced(model, kept)
    made.set_attn_implementation(attention)
    assert made.vit.layers[1].attention.sizes == [int(kept["attention"][1][1].sum())]
    torch.testing.assert_close(made(pixel_values=pixels).logits, masked(model, kept, pixels), rtol=1e-5, atol=2e-6)
    assert sum(p.numel() for p in made.parameters()) == parameters(model.config, kept)


def test_a_folder_gives_the_same_network(tmp_path: Path) -> None:
    """Which tokens and features go where is in no file: nybble and transformers make it of the config."""
    model, pixels = vit(), images()
    made: Any = sliced(model, drawn(model, share=0.3))
    assert any(getattr(m, "ragged", False) for m in made.modules()) and made.vit.layers[0].kept is not None
    made.save_pretrained(tmp_path / "slim")
    loaded: Any = nybble.load(tmp_path / "slim", dtype="float32")[0]
    others: Any = SlimViTForImageClassification.from_pretrained(tmp_path / "slim")
    for found in (loaded, others.eval()):
        torch.testing.assert_close(found(pixel_values=pixels).logits, made(pixel_values=pixels).logits)


def test_a_token_times_zero_is_not_removed() -> None:
    model, pixels, kept = vit(), images(), drawn(vit())
    made, full = copy.deepcopy(model), full_kept(model)
    masks = Masks(made)
    masks.fix(kept)
    torch.testing.assert_close(
        made(pixel_values=pixels).logits, masked(model, kept, pixels, excluded=False), rtol=1e-5, atol=2e-6
    )
    removed = sliced(made, kept)(pixel_values=pixels).logits
    assert float((removed - made(pixel_values=pixels).logits).detach().abs().max()) > 0.01
    masks.fix({**kept, "tokens": full["tokens"]})
    whole = sliced(made, {**kept, "tokens": full["tokens"]})
    torch.testing.assert_close(
        whole(pixel_values=pixels).logits, made(pixel_values=pixels).logits, rtol=1e-5, atol=2e-6
    )
    assert not any(z.requires_grad for z in masks.parameters())


def test_slices_train_as_masks_do() -> None:
    """One step of each from the same weights: the masked network sliced is the sliced one."""
    model, pixels, labels = vit(), images(), torch.tensor([0, 1, 2, 0, 1])
    kept = {**drawn(model), "tokens": full_kept(model)["tokens"]}
    both = copy.deepcopy(model), sliced(model, kept)
    Masks(both[0], ("attention", "mlp")).fix(kept)
    for made in both:
        optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], 0.1)
        made(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
    after = sliced(both[0], kept)
    for name, value in after.state_dict().items():
        torch.testing.assert_close(both[1].state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_operations_are_what_a_counter_counts() -> None:
    model, pixels = vit(), images(1)
    for kept in (full_kept(model), drawn(model, 1)):
        made: Any = sliced(model, kept)
        made.set_attn_implementation("eager")  # whose products the counter knows
        with FlopCounterMode(display=False) as counter:
            made(pixel_values=pixels)
        assert flops(model.config, kept) == counter.get_total_flops()


def test_one_mask_for_a_head_or_for_all_heads() -> None:
    model = vit()
    for heads, learned in (("head", 2), ("layer", 8)):
        masks = Masks(copy.deepcopy(model), ("attention",), heads)  # type: ignore[arg-type]
        assert [z.numel() for z in masks.parameters()] == [learned] * 3
        for number, z in enumerate(masks.parameters()):
            z.data.copy_(torch.arange(z.numel()).view(z.shape) + 0.1 * number)
        kept = choose({"attention": masks.scores("attention")}, full_kept(model), Fraction(1, 2))["attention"]
        assert [each.sum(1).tolist() for each in kept] == [[0, 8]] * 3 if heads == "head" else [[4, 4]] * 3


def test_bad_masks_and_shares_are_refused() -> None:
    model = vit()
    full, scores = full_kept(model), [torch.randn(24) for _ in range(3)]
    for share in (Fraction(0), Fraction(11, 10), Fraction(-1)):
        with pytest.raises(UsageError, match="above 0 and up to 1"):
            kept_at(scores, share)
    with pytest.raises(DataError, match="NaN"):
        kept_at([torch.tensor([0.0, float("nan")])], Fraction(1, 2))
    with pytest.raises(ModelError, match="nothing is left of the mlp of layer 0"):
        choose({"mlp": [torch.zeros(24), *scores[1:]]}, full, Fraction(1, 10), least=0)
    with pytest.raises(SchemeError, match="other shapes"):
        sliced(model, {**full, "mlp": [torch.ones(23, dtype=torch.bool)] * 3})
    with pytest.raises(SchemeError, match=r"a mask of .23. is given for .24. units"):
        Masks(copy.deepcopy(model), ("mlp",)).by_kind["mlp"][0].fix(torch.ones(23, dtype=torch.bool))
