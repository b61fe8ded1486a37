"""Children of torch's layers that compute something else stay in float and are named; nothing stands for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import SIZES, input_ids, logits, save_tiny, tiny_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig, PhimoeConfig
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderCTCHead
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

from nybble.core.errors import SchemeError
from nybble.nn.kinds import kind_of, look_alikes
from nybble.nn.linear import QuantLinear
from nybble.pipelines.quantize import quantize
from nybble.pipelines.request import build_recipe
from nybble.recipe import Recipe
from nybble.training.prepare import prepare
from nybble.walk.settings import Settings


class Cosine(nn.Linear):
    """Measures angles, as heads of face and speaker models do."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.normalize(input, dim=-1), nn.functional.normalize(self.weight))


class Named(nn.Embedding):
    """Looks up something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flip(-1))


class Flipped(nn.Conv2d):
    """Another kernel than its weight."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.conv2d(input, -weight, bias)


def patched() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = torch.relu  # type: ignore[method-assign]
    return layer


def older_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return made(nn.utils.weight_norm, nn.Linear(4, 4))


def made(cls: Any, *args: Any, **kwargs: Any) -> nn.Module:
    module: nn.Module = cls(*args, **kwargs)
    return module


LOOK_ALIKES: dict[str, Callable[[], nn.Module]] = {
    "Cosine": lambda: Cosine(4, 4),
    "Flipped": lambda: Flipped(2, 2, 1),
    "Linear": patched,
    "ParametrizedLinear": lambda: made(parametrizations.weight_norm, nn.Linear(4, 4)),
    "Conv3d": lambda: nn.Conv3d(2, 2, 1),
    "PhimoeTopKRouter": lambda: made(PhimoeTopKRouter, made(PhimoeConfig, hidden_size=4)),
    "IdeficsDecoupledLinear": lambda: made(IdeficsDecoupledLinear, 4, 4, 2, bias=False),
    "WeightStandardizedConv2d": lambda: made(WeightStandardizedConv2d, 2, 2, 1),
    "ParakeetEncoderCTCHead": lambda: made(ParakeetEncoderCTCHead, 4, 4, kernel_size=1),
    "MarianSinusoidalPositionalEmbedding": lambda: made(MarianSinusoidalPositionalEmbedding, 4, 4, 0),
}


@pytest.mark.parametrize("name", sorted(LOOK_ALIKES))
def test_no_kind_claims_what_computes_something_else(name: str) -> None:
    module = LOOK_ALIKES[name]()
    assert type(module).__name__ == name and kind_of(module) is None
    found = look_alikes(nn.ModuleDict({"it": module}))
    assert found["it"][0] == name and found["it"][-1] in ("Linear", "Conv", "Embedding")


def test_the_older_weight_norm() -> None:
    assert kind_of(older_norm()) is None


def recipe(**lines: Any) -> Recipe:
    return build_recipe("rtn", **{"weights": "int8 channel", **lines})


def test_a_cosine_layer_is_left_and_named(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.float32)
    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = Cosine
    before, said = logits(model), list[str]()
    _, report = quantize(model, recipe(), announce=said.append)
    names = {f"model.layers.{i}.mlp.up_proj": "Cosine" for i in range(2)}
    assert report.manifest["left_in_float"] == names and not names.keys() & {row.name for row in report.layers}
    assert "left in float, since" in said[2] and "model.layers.0.mlp.up_proj (Cosine), model.layers.1" in said[2]
    assert isinstance(model.model.layers[0].mlp.gate_proj, QuantLinear)
    assert 0 < float((logits(model) - before).norm() / before.norm()) < 0.05  # as plain layers: 0.76


def test_a_target_that_takes_nothing_else() -> None:
    model = tiny_model("mistral")
    model.model.embed_tokens.__class__ = Named
    with pytest.raises(SchemeError, match=r"'Embedding' takes model.embed_tokens and nothing .* Named"):
        quantize(model, recipe(embeddings="int8 channel"))


def test_training_leaves_them_too() -> None:
    model = tiny_model(dtype=torch.float32)
    model.model.layers[1].mlp.up_proj.__class__ = Cosine
    with pytest.warns(UserWarning, match=r"left in float, .*: model.layers.1.mlp.up_proj \(Cosine\)"):
        prepare(model, "W8A16")
    assert type(model.model.layers[1].mlp.up_proj) is Cosine


def test_routers_and_experts_of_llama4(tmp_path: Path) -> None:
    """The router returns a tuple; the experts multiply all their matrices at once."""
    make: Any = Llama4TextConfig
    cls: Any = Llama4ForCausalLM
    config = make(
        **{**SIZES, "intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 8, "interleave_moe_layer_step": 1}
    )
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    before = logits(model)
    save_tiny(tmp_path / "float")
    model.save_pretrained(tmp_path / "float")
    _, report = quantize(
        str(tmp_path / "float"), recipe(), out=tmp_path / "out", settings=Settings(dtype=torch.float32), form="native"
    )
    classes = {"experts": "Llama4TextExperts", "router": "Llama4Router"}
    named = {f"model.layers.{i}.feed_forward.{leaf}": cls for i in range(2) for leaf, cls in classes.items()}
    assert report.manifest["left_in_float"] == named and len(report.layers) == 14
    auto: Any = AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "out").eval()
    assert loaded(input_ids=input_ids()).logits.shape == before.shape
    assert float((logits(loaded) - before).norm() / before.norm()) < 0.05
