"""Several recipes in one walk give, bit for bit, what each gives alone, from fewer runs of the float blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_text, save_tiny, tiny_tokenizer

import nybble
from nybble.calibration.trace import BlockCall
from nybble.core.errors import UsageError
from nybble.pipelines.request import build_recipe
from nybble.recipe import parse_recipe
from nybble.walk.settings import Settings

RECIPES: dict[str, dict[str, Any]] = {
    "nothing seen": {"recipe": "rtn", "weights": "e2m1 group=16", "activations": "none"},
    "min-max": {"recipe": "minmax-fp"},
    "integers": {"recipe": "minmax-int"},
    "searched": {"recipe": "fp-baseline", "effort": "quick", "embeddings": "e2m1 channel"},
    "shifted": {"recipe": "llm-fp4", "effort": "quick"},
    "wider inputs": {"recipe": "llm-fp4", "effort": "quick", "activations": "e4m3 shifted static"},
    "weights alone": {"recipe": "fp-baseline", "effort": "quick", "weights": "e2m1 channel", "activations": "none"},
}
FIT = {"weights": "e2m1 group=16 scale_format=float16"}
SETTINGS = Settings(samples=4, seq_len=16, batch=2)


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.device.type != "meta"}


@pytest.mark.parametrize("order", [1, -1])
def test_together_is_each_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: int) -> None:
    folder, text = save_tiny(tmp_path / "m"), str(save_text(tmp_path / "text.txt"))
    recipes = {name: build_recipe(**RECIPES[name]) for name in list(RECIPES)[::order]}
    runs = {"now": 0}
    run = BlockCall.run

    def counted(self: BlockCall, *args: Any) -> Any:
        runs["now"] += 1
        return run(self, *args)

    monkeypatch.setattr(BlockCall, "run", counted)
    together = nybble.quantize_many(folder, recipes, text, settings=SETTINGS)
    shared, runs["now"] = runs["now"], 0
    assert set(together) == set(recipes)
    for name, recipe in recipes.items():
        alone, report = nybble.quantize(folder, recipe, text, settings=SETTINGS)
        found, found_report = together[name]
        wanted = tensors(alone)
        assert wanted.keys() == tensors(found).keys()
        assert all(torch.equal(wanted[key], tensor) for key, tensor in tensors(found).items()), name
        assert [row.to_dict() for row in report.layers] == [row.to_dict() for row in found_report.layers]
        assert report.manifest == found_report.manifest
    assert shared < 0.6 * runs["now"]


def test_they_can_be_saved(tmp_path: Path) -> None:
    folder, text = save_tiny(tmp_path / "m"), str(save_text(tmp_path / "text.txt"))
    found = nybble.quantize_many(folder, {"a": build_recipe("minmax-fp")}, text, settings=SETTINGS)
    out = nybble.save(found["a"][0], tmp_path / "out", tiny_tokenizer())
    x = torch.arange(12).view(1, 12)
    assert torch.equal(nybble.load(out)[0](x).logits, found["a"][0](x).logits)


def test_what_cannot_share_goes_by_itself(tmp_path: Path) -> None:
    """A quantized path, a transform, learned windows: each alone, in the same call, with the same result."""
    folder, text = save_tiny(tmp_path / "m"), str(save_text(tmp_path / "text.txt"))
    scheme = {"weights": "int4 group=16"}
    step = {"reconstruction": "mse", "weights": "adaround", "window": 2, "steps": 2}
    recipes = {
        "a": build_recipe("minmax-fp"),
        "b": build_recipe("gptq", **FIT),
        "c": build_recipe("smoothquant"),
        "d": parse_recipe({"name": "learned", "scheme": scheme, "steps": [step]}),
        "e": build_recipe("minmax-int"),
    }
    together = nybble.quantize_many(folder, recipes, text, settings=SETTINGS)
    assert list(together) == list(recipes)
    for name, recipe in recipes.items():
        wanted, found = tensors(nybble.quantize(folder, recipe, text, settings=SETTINGS)[0]), tensors(together[name][0])
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[key], tensor) for key, tensor in found.items()), name
    with pytest.raises(UsageError, match="no recipe"):
        nybble.quantize_many(folder, {})


def test_gradients_reach_a_recipe_beside_another(tmp_path: Path) -> None:
    """The last recipe moves the streams on; the first has Fisher weights of its own all the same."""
    folder, text = save_tiny(tmp_path / "m"), str(save_text(tmp_path / "text.txt"))
    step = {"solver": "llm-fp4", "grid": 6, "rounds": 1}
    recipes = {
        loss: parse_recipe({"name": loss, "scheme": {"weights": "e2m1 channel"}, "steps": [{**step, "loss": loss}]})
        for loss in ("fisher", "output")
    }
    together = nybble.quantize_many(folder, recipes, text, settings=SETTINGS)
    wanted = nybble.quantize(folder, recipes["fisher"], text, settings=SETTINGS)[1]
    rows = {name: [row.to_dict() for row in report.layers] for name, (_, report) in together.items()}
    assert rows["fisher"] == [row.to_dict() for row in wanted.layers] != rows["output"]
