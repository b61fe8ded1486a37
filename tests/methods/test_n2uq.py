"""N2UQ: what its paper and code say of weights, and the recipe on a small ResNet, to the packed file.

Liu et al. 2022, "Nonuniform-to-Uniform Quantization", arXiv:2111.14826. Thresholds and their gradients are in
tests/parts/learned/test_thresholds.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.test_ofq import batch, learn, weight
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification

import nybble
from nybble.checkpoint.account import inspect
from nybble.core.errors import DataError, ModelError
from nybble.learned import Learned, make_part
from nybble.learned.thresholds import LearnedThresholds
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.conv import QuantConv
from nybble.nn.fake import FakeLayer
from nybble.quantizer import Quantizer
from nybble.scheme import Scheme
from nybble.training.convert import convert
from nybble.training.methods import Given
from nybble.training.methods.qat import PART, QatOptions
from nybble.training.recipe import load_training_recipe

BITS = {1: "binary channel scale=mean", **{bits: f"midrise{bits} channel scale=max-entropy" for bits in (2, 3, 4)}}
RECIPE = load_training_recipe("n2uq")


def entropy_preserving(bits: int, x: Tensor, normalised: bool = True) -> Learned:
    return make_part("statistics", {"normalised": normalised}).make(Quantizer(BITS[bits]), x).train()


@pytest.mark.parametrize("bits", BITS)
def test_weights(bits: int) -> None:
    """Check 4, 5: the text's forward times c, in float64; the gradient is upstream / c, of clipped weights too."""
    x, top = weight(), 2**bits - 1
    wide = x.double()
    c = top / 2 ** (bits - 1) * wide.abs().mean(1, keepdim=True)
    q = ((((wide / c).clamp(-1, 1) + 1) * top / 2).round() * 2 / top - 1) * c
    given, upstream = x.clone().requires_grad_(), torch.randn(x.shape)
    part = entropy_preserving(bits, x)
    found = part(given)
    found.backward(upstream)
    assert ((found.detach().double() - q).abs() > 1e-6 * c).double().mean() < 1e-4
    assert given.grad is not None and bool((wide.abs() > 1.05 * c).any())
    torch.testing.assert_close(given.grad.double(), upstream.double() / c, rtol=1e-6, atol=0)
    plain = x.clone().requires_grad_()
    entropy_preserving(bits, x, normalised=False)(plain).backward(upstream)
    assert torch.equal(plain.grad, upstream)  # type: ignore[arg-type]
    uniform = torch.rand(1, 200_000, generator=torch.Generator().manual_seed(0)) - 0.5
    counts = entropy_preserving(bits, uniform)(uniform).unique(return_counts=True)[1]
    assert bool(((counts / 200_000 - 2.0**-bits).abs() < 0.005).all()) and len(counts) == 2**bits


def test_a_filter_of_zeros() -> None:
    x = torch.cat([torch.zeros(1, 9), torch.ones(1, 9)]).requires_grad_()
    found = entropy_preserving(2, x.detach())(x)
    found.sum().backward()
    assert found[0].count_nonzero() == 0 and x.grad is not None and bool(x.grad.isfinite().all())


# --------------------------------------------------------------------------------------------------------- the recipe
def resnet() -> Any:
    make: Any = ResNetConfig
    made: Any = ResNetForImageClassification
    return made(make(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5))


def attached(model: Any, bits: int = 2) -> Any:
    scheme = RECIPE.scheme.override(weights=Quantizer(BITS[bits]), inputs=Quantizer(f"uint{bits} tensor static"))
    options = QatOptions(**{**RECIPE.options, "losses": {"task": 1.0}})
    PART.check(options, scheme)
    assert isinstance(scheme, Scheme)
    given = Given(options=options, scheme=scheme, run=lambda network: network(**batch()))
    made = PART.attach(model, given).train()
    assert len(PART.groups(made, options, 1.0) or []) == 3
    return made


@pytest.mark.parametrize("bits", [2, 4])
def test_what_is_trained_is_what_the_file_computes(bits: int, tmp_path: Path) -> None:
    """Check 6: folded thresholds, integer codes; the first layer, the classifier and BatchNorms are floats."""
    made = attached(resnet(), bits)
    losses = learn(made, {}, 8)
    assert losses[-1] < losses[0]
    twins = {name: m for name, m in made.named_modules() if isinstance(m, FakeLayer)}
    assert len(twins) == 5 and all(isinstance(m.inputs, LearnedThresholds) for m in twins.values())
    assert any(not torch.equal(m.inputs.widths, torch.ones_like(m.inputs.widths)) for m in twins.values())  # type: ignore[union-attr,arg-type]
    with torch.no_grad():
        before = made.eval()(**batch(1)).logits
        packed: Any = convert(made)
        assert torch.equal(packed(**batch(1)).logits, before)
        nybble.save(packed, tmp_path / "out")
        loaded, _ = nybble.load(tmp_path / "out", dtype=torch.float32)
        assert torch.equal(loaded(**batch(1)).logits, before)
    layer: Any = next(m for m in loaded.modules() if isinstance(m, QuantConv))
    inputs = layer.inputs
    assert isinstance(inputs, ActivationQuantizer) and inputs.get_buffer("thresholds").shape == (2**bits - 1,)
    codes = inputs(torch.randn(2, 8, 4, 4)) / inputs.get_buffer("scale")
    assert set(codes.round().unique().tolist()) <= set(range(2**bits)) and bool(
        ((codes - codes.round()).abs() < 1e-5).all()
    )
    found = inspect(tmp_path / "out")
    assert found["bytes"]["tables"] == 5 * 4 * (2**bits - 1)


def test_exports_refuse_thresholds_that_they_have_no_words_for(tmp_path: Path) -> None:
    packed: Any = convert(attached(resnet()))
    nybble.save(packed, tmp_path / "out")
    with pytest.raises(ModelError, match=r"learned thresholds of activations.*lsq"):
        nybble.export(tmp_path / "out", tmp_path / "onnx", "onnx")


def test_bad_input() -> None:
    model = resnet()
    with torch.no_grad():
        model.resnet.encoder.stages[0].layers[0].layer[0].convolution.weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(DataError, match=r"stages\.0\.layers\.0\.layer\.0\.convolution: the weight holds 1 NaN or Inf"):
        attached(model)
