"""Every recipe on an encoder, a vision transformer and a convolutional network: one model, or the reason why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.contracts.test_recipes import narrow
from tests.tiny import shortened
from torch import Tensor
from transformers.utils import logging

import nybble
from nybble.core.errors import ModelError, SchemeError
from nybble.nn.conv import QuantConv
from nybble.nn.kinds import quant_modules
from nybble.pipelines.request import build_recipe
from nybble.quantizer import Quantizer
from nybble.recipe import Recipe, recipe_names
from nybble.training.steps import main_output

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONVOLUTIONAL = {
    "num_channels": 4, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
    "num_labels": 5,
}  # fmt: skip
NO_PAIR = "finds no pair of weights to work on.*Take a recipe without it"
NO_STREAM = "can't rotate the residual stream"
NO_TOKENS = "distill: loss=nll is the likelihood of the next token, which {} doesn't tell; use loss: kl"
# What can't be had there, by what a recipe's steps are called and by their loss.
REFUSED = {
    "encoder": {
        "smooth": NO_PAIR, "rotate": NO_STREAM, "learned-rotation": NO_STREAM, "nll": NO_TOKENS.format("BertModel"),
    },
    "vit": {
        "rotate": NO_STREAM, "learned-rotation": NO_STREAM, "nll": NO_TOKENS.format("ViTForImageClassification"),
    },
    "cnn": {
        "smooth": NO_PAIR, "awq": NO_PAIR, "rotate": NO_STREAM, "learned-rotation": NO_STREAM,
        "nll": NO_TOKENS.format("ResNetForImageClassification"),
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def pixels(channels: int, size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(1))}


def encoder() -> tuple[Any, dict[str, Tensor]]:
    make: Any = transformers.BertConfig
    ids = torch.randint(3, 60, (4, 8), generator=torch.Generator().manual_seed(1))
    return transformers.BertModel(make(vocab_size=60, **SIZES)), {"input_ids": ids}


def vit() -> tuple[Any, dict[str, Tensor]]:
    make: Any = transformers.ViTConfig
    config = make(image_size=8, patch_size=4, num_labels=5, **SIZES)
    return transformers.ViTForImageClassification(config), pixels(3, 8)


def cnn() -> tuple[Any, dict[str, Tensor]]:
    make: Any = transformers.ResNetConfig
    return transformers.ResNetForImageClassification(make(**CONVOLUTIONAL)), pixels(4, 16)


NETWORKS: dict[str, Callable[[], tuple[Any, dict[str, Tensor]]]] = {"encoder": encoder, "vit": vit, "cnn": cnn}


def made(family: str) -> tuple[Any, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, given = NETWORKS[family]()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "embedding" not in name:
                    parameter.mul_(4)  # as initialised, blocks say next to nothing
    return model.eval().requires_grad_(False), given


def for_convolutions(quantizer: Quantizer | None, inputs: bool) -> Quantizer | None:
    """Inputs with a scale for a channel of an image; weights whose last group may be short."""
    if quantizer is None:
        return None
    if inputs:
        return Quantizer(f"{quantizer.format.name} {'tensor static' if quantizer.static else 'plane'}")
    return quantizer.replace(pad=True) if "group" in str(quantizer.granularity) else quantizer


def changed(recipe: Recipe, change: Callable[[Quantizer | None, bool], Quantizer | None]) -> Recipe:
    rules = [replace(r, weights=change(r.weights, False), inputs=change(r.inputs, True)) for r in recipe.scheme.rules]
    return recipe.with_scheme(replace(recipe.scheme, rules=tuple(rules)))


def refusal(family: str, recipe: Recipe) -> str:
    """The reason that is due; empty where the recipe has to work."""
    words = {word for step in recipe.steps for word in (step.name, step.options.get("loss"))}
    return next((said for word, said in REFUSED[family].items() if word in words), "")


@torch.no_grad()
@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("family", NETWORKS)
def test_one_model_in_memory_and_loaded_or_a_reason(family: str, name: str, tmp_path: Path) -> None:
    model, given = made(family)
    exact, before = main_output(model(**given)), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    settings = nybble.Settings(batch=2, dtype=torch.float32)
    recipe = changed(shortened(build_recipe(name, effort="quick")), lambda quantizer, _: narrow(quantizer))
    if family == "cnn":
        said = r"activations of a convolution can't have|can't rotate"
        if any(rule.inputs is not None and not rule.inputs.granularity.one_scale for rule in recipe.scheme.rules):
            with pytest.raises((SchemeError, ModelError), match=said):
                nybble.quantize(model, recipe, given, settings=settings)
        recipe = changed(recipe, for_convolutions)
    due = refusal(family, recipe)
    if due:
        with pytest.raises(ModelError, match=due):
            nybble.quantize(model, recipe, given, settings=settings)
        assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
        return
    found, report = nybble.quantize(model, recipe, given, settings=settings)
    got = main_output(found(**given))
    assert torch.isfinite(got).all() and 0 < float((got - exact).norm()) < float(exact.norm())
    modules = list(quant_modules(found))
    assert len(modules) == len(report.layers) and all(row.bits is not None for row in report.layers)
    assert any(isinstance(module, QuantConv) for _, module in modules) == (family == "cnn")
    nybble.save(found, tmp_path / "out")
    ours, _ = nybble.load(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(main_output(ours(**given)), got)
