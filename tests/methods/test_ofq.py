"""OFQ: what its paper and code say of StatsQ, and the recipe on a small vision transformer, to the packed file.

Liu et al. 2023, "Oscillation-free Quantization for Low-bit Vision Transformers", arXiv:2302.02210. Annealing and the
count of oscillations are in tests/parts/training/test_callbacks.py, LSQ with shifts in test_elastic.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_model
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import nybble
from nybble.core.errors import DataError, ModelError
from nybble.learned import Learned, make_part
from nybble.nn.conv import QuantConv
from nybble.nn.linear import QuantLinear
from nybble.quantizer import Quantizer
from nybble.scheme import preset_scheme
from nybble.training.callbacks import Acting
from nybble.training.composing import compose_query_keys
from nybble.training.convert import convert
from nybble.training.methods import Given
from nybble.training.methods.qat import PART, QatOptions
from nybble.training.prepare import learning_groups
from nybble.training.recipe import load_training_recipe

BITS = {1: "binary channel scale=mean", **{bits: f"midrise{bits} channel scale=max-entropy" for bits in (2, 3, 4)}}
RECIPE = load_training_recipe("ofq")


def statsq(bits: int, x: Tensor) -> Learned:
    return make_part("statistics", {}).make(Quantizer(BITS[bits]), x).train()


def weight(rows: int = 8, columns: int = 512) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return x * torch.linspace(0.05, 3, rows)[:, None]


# ------------------------------------------------------------------------------------------------------------- StatsQ
@pytest.mark.parametrize("bits", BITS)
def test_statsq(bits: int) -> None:
    """Checks 1 to 3: the code's forward in float64, its levels and none of them 0; the gradient is the upstream one."""
    x, n = weight(), 2 ** (bits - 1)
    s = 2 * x.double().abs().mean(1, keepdim=True)
    want = s * (((x.double() / s).clamp(-1, 1 - 1e-6) * n).floor().clamp(-n, n - 1) + 0.5) / n
    given = x.clone().requires_grad_()
    part, upstream = statsq(bits, x), torch.randn(x.shape)
    found = part(given)
    found.backward(upstream)
    assert (found.detach().double() - want).abs().max() < 1e-6 * s.max()
    assert all(len(row.unique()) == 2**bits and 0 not in row for row in found)
    assert bool((found.abs().double() <= s * (1 - 2.0**-bits) * (1 + 1e-6)).all())
    assert given.grad is not None and torch.equal(given.grad, upstream)
    assert bool((x.abs() > 1.01 * s).any())  # clipped ones among them
    assert torch.equal(part.eval()(x), found)


@pytest.mark.parametrize("bits", BITS)
def test_rows_columns_and_factors(bits: int) -> None:
    x = weight()
    part = statsq(bits, x)
    order = torch.randperm(x.shape[1])
    assert torch.equal(part(4 * x), 4 * part(x)) and torch.equal(part(x[:, order]), part(x)[:, order])
    other = torch.cat([x[:1], 100 * x[1:]])
    assert torch.equal(part(other)[0], part(x)[0])
    empty = torch.cat([torch.zeros(1, x.shape[1]), x[1:]]).requires_grad_()
    found = part(empty)
    found.sum().backward()
    assert found[0].count_nonzero() == 0 and empty.grad is not None and bool(empty.grad.isfinite().all())


# ------------------------------------------------------------------------------------------------------- the recipe
def vit(**more: Any) -> Any:
    make: Any = ViTConfig
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
        "patch_size": 4, "num_labels": 5, "initializer_range": 0.3,
    }  # fmt: skip
    return ViTForImageClassification(make(**sizes | more))


def batch(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(4, 3, 16, 16, generator=draw),
        "labels": torch.randint(5, (4,), generator=draw),
    }


def attached(model: Any, scheme: str = "OFQ_W2A2", **changes: Any) -> tuple[Any, dict[str, Acting]]:
    options = QatOptions(**{**RECIPE.options, "losses": {"task": 1.0}, **changes})
    PART.check(options, preset_scheme(scheme))
    given = Given(options=options, scheme=preset_scheme(scheme), run=lambda network: network(**batch()))
    made = PART.attach(model, given).train()
    return made, PART.callbacks(made, options)


def learn(made: Any, acting: dict[str, Acting], steps: int = 6) -> list[float]:
    optimizer, losses = torch.optim.AdamW(learning_groups(made, {}), lr=5e-3, weight_decay=0.05), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = made(**batch()).loss
        loss.backward()
        for each in acting.values():
            each.before_update(step / (steps - 1))
        optimizer.step()
        for each in acting.values():
            each.after_update(step / (steps - 1))
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("bits", "dtype"), [(2, torch.float32), (3, torch.float32), (4, torch.bfloat16)])
def test_what_is_trained_is_what_the_file_computes(bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    made, acting = attached(vit().to(dtype), f"OFQ_W{bits}A{bits}")
    assert made.vit.embeddings.patch_embeddings.projection.weight.dtype == dtype  # asked by its forward
    losses = learn(made, acting)
    assert losses[-1] < losses[0]
    assert acting["oscillation"].newest()["flips"] >= 0 and acting["annealing"].newest()["frozen"] > 0.8
    with torch.no_grad():
        before = made.eval()(**batch(1)).logits
        packed: Any = convert(made)
        assert torch.equal(packed(**batch(1)).logits, before)
        nybble.save(packed, tmp_path / "out")
        loaded, _ = nybble.load(tmp_path / "out", dtype=dtype)
        assert torch.equal(loaded(**batch(1)).logits, before)
    layers = {name: m for name, m in loaded.named_modules() if isinstance(m, QuantLinear | QuantConv)}
    ends = {"vit.embeddings.patch_embeddings.projection", "classifier"}
    assert len(layers) == 2 * 5 + 2 and ends <= layers.keys()
    for name, layer in layers.items():
        line = str(layer.inputs.quantizer)  # type: ignore[union-attr]
        assert layer.weight.qtensor().format.bits == (8 if name in ends else bits)  # type: ignore[union-attr]
        assert line.startswith("int8" if name in ends else f"uint{bits}" if name.endswith("fc2") else f"int{bits}")
    matmuls: Any = loaded.get_submodule("vit.layers.0.attention.matmuls")
    assert matmuls.probabilities.quantizer.format.name == f"uint{bits}"
    assert matmuls.query.quantizer.format.name == f"int{bits}_full"


# ------------------------------------------------------------------------------------------------------------ QKR
def loud(model: Any) -> Any:
    """With biases of queries and keys that matter."""
    for layer in model.vit.layers:
        for linear in (layer.attention.q_proj, layer.attention.k_proj):
            torch.nn.init.normal_(linear.bias)
    return model.eval()


@torch.no_grad()
def test_one_weight_for_queries_and_keys_computes_the_same() -> None:
    """Check 5: to 1e-6 with the term of b_q, and visibly not without it; gradients reach W."""
    model = loud(vit()).double()
    want = model(**batch_of(torch.float64)).logits
    compose_query_keys(model)
    torch.testing.assert_close(model(**batch_of(torch.float64)).logits, want, rtol=0, atol=1e-6)
    attention = model.vit.layers[0].attention
    assert attention.query_key.weight.shape == (4 * 32, 32) and not [*attention.k_proj.parameters()]
    for layer in model.vit.layers:
        layer.attention.query_key.bias.zero_()
    assert (model(**batch_of(torch.float64)).logits - want).abs().max() > 1e-3


def batch_of(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"pixel_values": batch()["pixel_values"].to(dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_query_key_trains_and_packs(dtype: torch.dtype, tmp_path: Path) -> None:
    """W is rounded alone, its frozen elements stay; the file computes what was trained, for transformers too."""
    made, acting = attached(loud(vit()).to(dtype))
    latent = made.vit.layers[1].attention.query_key.weight.latent
    learn(made, acting, 5)
    assert latent.grad is not None and latent.grad.count_nonzero() < 0.2 * latent.numel()  # annealed at the end
    with torch.no_grad():
        before = made.eval()(**batch(1)).logits
        packed: Any = convert(made)
        assert torch.equal(packed(**batch(1)).logits, before)
        nybble.save(packed, tmp_path / "out")
        loaded, _ = nybble.load(tmp_path / "out", dtype=dtype)
        assert torch.equal(loaded(**batch(1)).logits, before)
        theirs: Any = ViTForImageClassification.from_pretrained(tmp_path / "out", dtype=dtype)
        assert torch.equal(theirs(**batch(1)).logits, before)
    layer = loaded.get_submodule("vit.layers.0.attention.query_key")
    assert isinstance(layer, QuantLinear) and layer.weight.qtensor().format.name == "midrise2"  # type: ignore[union-attr]
    assert sum(isinstance(m, QuantLinear) for m in loaded.modules()) == 2 * 5 + 1
    with pytest.raises(ModelError, match=r"one layer for queries and keys.*query_key: false"):
        nybble.export(tmp_path / "out", tmp_path / "dense", "dense")


def test_stages_go_on_with_one_weight() -> None:
    """The second one's W is the first one's, not a product of what no longer trains."""
    first, acting = attached(vit())
    learn(first, acting, 3)
    stages = ({"scheme": "OFQ_W4A4"},)
    options = QatOptions(**{**RECIPE.options, "losses": {"task": 1.0}, "stages": stages})
    scheme = preset_scheme("OFQ_W2A2")
    given = Given(options=options, scheme=scheme, stage=1, before=first, run=lambda network: network(**batch()))
    second: Any = PART.attach(vit(), given)
    one, other = (m.vit.layers[0].attention.query_key.weight.latent for m in (first, second))
    assert torch.equal(one, other)


def test_query_key_refuses_other_attentions() -> None:
    for made in (tiny_model("llama"), tiny_model("opt")):
        with pytest.raises(ModelError, match=r"query_key: queries and keys of .*ViT and DeiT"):
            compose_query_keys(made)
    model = vit()
    model.vit.layers[1].attention.q_proj = torch.nn.Linear(32, 24)
    with pytest.raises(ModelError, match=r"as many rows as columns, q_proj and k_proj"):
        compose_query_keys(model)
    model = vit()
    model.vit.layers[0].attention.head_dim = 5
    with pytest.raises(ModelError, match=r"whose heads divide them; ViTAttention has .* heads of 5"):
        compose_query_keys(model)


def test_bad_input() -> None:
    model = vit()
    with torch.no_grad():
        model.vit.layers[1].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.fc1: the weight holds 1 NaN"):
        attached(model)
