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
BEST = [name for name in recipe_names() if name.startswith("best-")]
NO_PAIR = "finds no pair of weights to work on.*Take a recipe without it"
NO_STREAM = "can't rotate the residual stream"
NO_CACHE = f"generates no text with a cache of keys and values; leave kv out|{NO_PAIR}"
NO_TOKENS = "distill: loss=nll is the likelihood of the next token, which {} doesn't tell; use loss: kl"
NO_TABLE = "the target 'Embedding' matches no module"
# What can't be had there, by what a recipe's steps are called, by their loss, and by targets of its scheme.
REFUSED = {
    "encoder": {
        "smooth": NO_PAIR, "rotate": NO_STREAM, "learned-rotation": NO_STREAM, "nll": NO_TOKENS.format("BertModel"),
        "ksort": NO_CACHE,
    },
    "vit": {
        "rotate": NO_STREAM, "learned-rotation": NO_STREAM, "nll": NO_TOKENS.format("ViTForImageClassification"),
        "ksort": NO_CACHE, "Embedding": NO_TABLE,
    },
    "cnn": {
        "smooth": NO_PAIR, "awq": NO_PAIR, "rotate": NO_STREAM, "learned-rotation": NO_STREAM,
        "nll": NO_TOKENS.format("ResNetForImageClassification"), "ksort": NO_CACHE, "Embedding": NO_TABLE,
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
    steps = [step for step in recipe.steps if not step.options.get("optional")]
    words = {word for step in steps for word in (step.name, step.options.get("loss"))}
    words |= {target for rule in recipe.scheme.rules for target in rule.targets}
    return next((said for word, said in REFUSED[family].items() if word in words), "")


@torch.no_grad()
@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("family", NETWORKS)
def test_one_model_in_memory_and_loaded_or_a_reason(family: str, name: str, tmp_path: Path) -> None:
    model, given = made(family)
    exact, before = main_output(model(**given)), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    settings = nybble.Settings(batch=2, dtype=torch.float32)
    recipe = changed(shortened(build_recipe(name, effort="quick")), lambda quantizer, _: narrow(quantizer))
    if family == "cnn" and not recipe.convolutions:
        said = r"activations of a convolution can't have|can't rotate|matches no module"
        if any(rule.inputs is not None and not rule.inputs.granularity.one_scale for rule in recipe.scheme.rules):
            with pytest.raises((SchemeError, ModelError), match=said):
                nybble.quantize(model, recipe, given, settings=settings)
        recipe = changed(recipe, for_convolutions)
    due = refusal(family, recipe)
    if due:
        with pytest.raises((ModelError, SchemeError), match=due):
            nybble.quantize(model, recipe, given, settings=settings)
        assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
        return
    lines = list[str]()
    found, report = nybble.quantize(model, recipe, given, settings=settings, announce=lines.append)
    _check_lines(family, recipe, lines)
    got = main_output(found(**given))
    assert torch.isfinite(got).all() and 0 < float((got - exact).norm()) < float(exact.norm())
    modules = list(quant_modules(found))
    assert len(modules) == len(report.layers) and all(row.bits is not None for row in report.layers)
    assert any(isinstance(module, QuantConv) for _, module in modules) == (family == "cnn")
    nybble.save(found, tmp_path / "out")
    ours, _ = nybble.load(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(main_output(ours(**given)), got)


def _check_lines(family: str, recipe: Recipe, lines: list[str]) -> None:
    """What gave way is said, and nothing else is."""
    optional = {step.name for step in recipe.steps if step.kind == "transform" and step.options.get("optional")}
    left = {name for name in optional if REFUSED[family].get(name)}
    assert {name for name in optional if any(f"left out: transform '{name}' finds" in line for line in lines)} == left
    said = [line for line in lines if line.startswith("inputs of convolutions")]
    assert bool(said) == (family == "cnn" and bool(recipe.convolutions))
    for line in said:
        assert ("stay in float" if recipe.convolutions == "none" else f"get {recipe.convolutions}") in line


@pytest.mark.parametrize("name", BEST)
def test_best_on_convolutions_as_they_come(name: str) -> None:
    """Its own groups, on kernels of 4 x 49 columns: a short group each, and the inputs that they can have."""
    make: Any = transformers.ResNetConfig
    model: Any = transformers.ResNetForImageClassification(make(**{**CONVOLUTIONAL, "hidden_sizes": [8, 32]}))
    given, recipe = pixels(4, 16), shortened(build_recipe(name, effort="quick"))
    found, report = nybble.quantize(model, recipe, given, settings=nybble.Settings(batch=2, dtype=torch.float32))
    modules = dict(quant_modules(found))
    wanted = {"none": None, "": None}.get(recipe.convolutions, recipe.convolutions)
    for name, module in modules.items():
        if isinstance(module, QuantConv):
            assert (None if module.inputs is None else str(module.inputs.quantizer)) == wanted, name
    assert any(isinstance(module, QuantConv) for module in modules.values())
    assert (None if (inputs := report.layers[-1].inputs) is None else inputs) == (
        None if (rule := recipe.scheme.rules[0].inputs) is None else str(rule)
    )  # the classifier keeps the scheme's own


def test_inputs_that_were_asked_for_do_not_give_way() -> None:
    model, given = made("cnn")
    recipe = build_recipe("best", target="w4a8", activations="int8 token", effort="quick")
    with pytest.raises(SchemeError, match="activations of a convolution can't have the scales of int8 token"):
        nybble.quantize(model, recipe, given)


def test_a_transform_that_is_not_optional_still_refuses() -> None:
    model, given = made("encoder")
    steps = [{"transform": "smooth"}, {"solver": "rtn"}]
    with pytest.raises(ModelError, match=NO_PAIR):
        nybble.quantize(model, {"scheme": "W8A8", "steps": steps}, given)
    with pytest.raises(SchemeError, match="convolutions is a quantizer line such as 'int8 plane', or none; got 3"):
        nybble.quantize(model, {"scheme": "W8A8", "convolutions": 3}, given)


def test_speech_tells_no_next_token() -> None:
    """Whose decoder gives logits of tokens that its main input doesn't hold: refused by name, or taught otherwise."""
    make: Any = transformers.WhisperConfig
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = make(
        vocab_size=60, d_model=16, max_source_positions=8, max_target_positions=16, num_mel_bins=4, **heads, **sizes,
        **ids,
    )  # fmt: skip
    model: Any = transformers.WhisperForConditionalGeneration(config)
    given = {"input_features": torch.randn(4, 4, 16), "decoder_input_ids": torch.randint(3, 60, (4, 8))}
    said = NO_TOKENS.format("WhisperForConditionalGeneration")
    with pytest.raises(ModelError, match=said):
        nybble.quantize(model, shortened(build_recipe("efficientqat", weights="int2 channel", effort="quick")), given)
    found, _ = nybble.quantize(model, shortened(build_recipe("ptq1.61", effort="quick")), given)
    with torch.no_grad():
        assert torch.isfinite(main_output(found.eval()(**given))).all()
