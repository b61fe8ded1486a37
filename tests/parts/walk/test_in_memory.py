"""A model in memory: as it was where a run failed or was interrupted; its modes and statistics stay its own."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from tests.tiny import input_ids, tiny_model
from torch import nn

import nybble
from nybble.core.errors import DataError
from nybble.core.progress import Silent
from nybble.nn.fake import FakeLayer
from nybble.pipelines.evaluate import run_eval
from nybble.pipelines.request import build_recipe
from nybble.recipe import parse_recipe
from nybble.training.prepare import prepare

SMOOTH = parse_recipe(
    {
        "scheme": {
            "rules": [
                {"targets": ["Linear"], "weights": "int4 group=16", "inputs": "int8 token"},
                {"targets": ["Attention"], "matmuls": "int8 tensor"},
            ],
            "kv": "int8 token",
        },
        "steps": [{"transform": "smooth"}, {"solver": "gptq"}, {"correction": "bias"}],
    }
)


class Interrupt(Silent):
    """Ctrl-C once a block is done."""

    def advance(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt


class Given:
    """A caller's own samples."""

    source, available, tokens = "mine", 4, 32

    def __init__(self, **inputs: torch.Tensor) -> None:
        self.inputs = inputs

    def manifest(self) -> dict[str, Any]:
        return {}


def looks(model: nn.Module) -> Any:
    """All that a caller can see of a model."""
    modules = [(name, type(module), module.training, sorted(vars(module))) for name, module in model.named_modules()]
    tensors = [(n, id(t), t.data_ptr(), t.requires_grad, t._version) for n, t in model.named_parameters()]
    config: Any = getattr(model, "config", None)
    return modules, tensors, list(model.state_dict()), None if config is None else {**vars(config)}


@pytest.mark.parametrize("how", ["interrupted", "failed"])
def test_nothing_is_left_of_a_run_that_ends_early(how: str) -> None:
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=False).train()
    model.model.layers[1].eval()  # as somebody left it
    if how == "failed":
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    before, values = looks(model), copy.deepcopy(model.state_dict())
    progress = Interrupt() if how == "interrupted" else None
    with pytest.raises(KeyboardInterrupt if how == "interrupted" else DataError):
        nybble.quantize(model, SMOOTH, Given(input_ids=input_ids()), progress=progress)
    assert looks(model) == before
    assert all(torch.equal(t, values[n]) or t.isnan().any() for n, t in model.state_dict().items())


def test_what_would_be_done_does_nothing() -> None:
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=False).train()
    before = looks(model)
    assert nybble.preflight(model, SMOOTH, Given(input_ids=input_ids()))
    assert looks(model) == before


@pytest.mark.parametrize("training", [False, True])
def test_a_single_layer_keeps_its_mode(training: bool) -> None:
    made, _ = nybble.quantize(nn.Linear(16, 8).train(training), build_recipe("rtn", weights="int8"))
    assert made.training == training


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout()
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))
        return y


def resnet() -> Any:
    make: Any = transformers.ResNetConfig
    config = make(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
    return transformers.ResNetForImageClassification(config)


@pytest.mark.parametrize("make", [Stage, resnet])
def test_train_mode_moves_nothing(make: Any) -> None:
    """BatchNorm's statistics and dropout: the result is that of a model in eval mode, and the modes come back."""
    torch.manual_seed(0)
    model = make()
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        model(x)  # statistics that are no zeros and ones
    twin = copy.deepcopy(model).eval()
    modes = {name: module.training for name, module in model.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    recipe = build_recipe("minmax-int", weights="int8 channel", activations="int8 tensor static")
    recipe = replace(recipe, steps=tuple(step for step in recipe.steps if step.kind == "solver"))  # norms stay
    for each in (model, twin):
        nybble.quantize(each, recipe, Given(pixel_values=x))
    for name, buffer in model.named_buffers():
        if name in buffers:
            assert torch.equal(buffer, buffers[name]), name
    assert all(modes.get(name, True) == module.training for name, module in model.named_modules())
    assert not any(module.training for module in twin.modules())
    with torch.no_grad():
        ours, theirs = model.eval()(x), twin(x)
    assert torch.equal(*(y if make is Stage else y.logits for y in (ours, theirs)))


def test_a_net_that_is_judged_keeps_its_mode() -> None:
    net = Stage().train()
    run_eval({"net": net}, Given(pixel_values=torch.randn(2, 3, 16, 16)), reference=net)
    assert all(module.training for module in net.modules())


def test_preparing_for_training_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny_model(tie_word_embeddings=False), FakeLayer.__init__

    def third(self: Any, *args: Any) -> None:
        made(self, *args)
        if args[0] is model.model.layers[0].self_attn.v_proj:
            raise MemoryError

    before = looks(model)
    monkeypatch.setattr(FakeLayer, "__init__", third)
    with pytest.raises(MemoryError):
        prepare(model, {"weights": "int4 group=16"})
    assert looks(model) == before
