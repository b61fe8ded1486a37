"""Default dtype, autocast and inference mode of the caller change no byte, and are the caller's afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import input_ids, save_text, save_tiny, tiny_model

import nybble
from nybble.pipelines.evaluate import run_eval
from nybble.pipelines.request import build_recipe
from nybble.presets import PRESETS
from nybble.qtensor.low_rank_sum import LowRankSum
from nybble.recipe import parse_recipe
from nybble.training.convert import convert
from nybble.training.prepare import prepare
from nybble.walk.settings import Settings

WAYS = ("float64", "bfloat16", "autocast", "inference")
MLP = "re:.*up_proj"
RECIPES: dict[str, Any] = {
    "gptq": build_recipe("gptq", weights="nvfp4", activations="int8 token"),
    "llm-fp4": parse_recipe(
        {
            "scheme": {"weights": "float4_e2m1fn channel", "inputs": "float4_e2m1fn shifted static", "targets": [MLP]},
            "steps": [{"solver": "llm-fp4", "grid": 4, "fine": 2, "rounds": 1, "tried": 32}],
        }
    ),
    "lorc": build_recipe("lorc", weights="int4 group=16"),
    "learned": parse_recipe(
        {
            "scheme": {"weights": "int4 group=16", "inputs": "int8 tensor static"},
            "steps": [
                {"transform": "hadamard"},
                {"solver": "rtn"},
                {"reconstruction": "mse", "weights": "adaround", "inputs": "lsq", "steps": 4},
            ],
        }
    ),
}


@contextmanager
def setting(*ways: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, before)
        for way in ways:
            if way == "autocast":
                stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
            elif way == "inference":
                stack.enter_context(torch.inference_mode())
            else:
                torch.set_default_dtype(getattr(torch, way))
        kept = torch.get_default_dtype()
        yield
        assert torch.get_default_dtype() is kept


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    save_tiny(folder / "model", tie_word_embeddings=False)
    save_text(folder / "text.txt", 300)
    return folder


def made(place: Path, recipe: str, out: Path) -> dict[str, bytes]:
    settings = Settings(samples=2, seq_len=16, batch=2)
    nybble.quantize(place / "model", RECIPES[recipe], str(place / "text.txt"), out=out, settings=settings)
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "times.json"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_bytes(recipe: str, place: Path, tmp_path: Path) -> None:
    expected = made(place, recipe, tmp_path / "plain")
    with setting("bfloat16", "autocast", "inference"):
        assert made(place, recipe, tmp_path / "other") == expected


@pytest.mark.parametrize("way", WAYS)
def test_loaded_and_judged_alike(way: str, place: Path, tmp_path: Path) -> None:
    out, _ = nybble.quantize(place / "model", RECIPES["lorc"], str(place / "text.txt"), out=tmp_path / "out",
                             settings=Settings(samples=4, seq_len=16))  # fmt: skip
    data: dict[str, Any] = {"data": str(place / "text.txt"), "seq_len": 16, "metrics": ["ppl"]}
    expected, state = run_eval({"it": str(out)}, **data)["models"], nybble.load(out)[0].state_dict()
    with setting(way):
        assert run_eval({"it": str(out)}, **data)["models"] == expected
        loaded = nybble.load(out)[0]
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name
        assert not tensor.is_inference()


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_by_itself(way: str) -> None:
    """No pipeline around it: the quantizer names its dtypes."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    lines = [*PRESETS, "int4 group=32 symmetric=false scale=mse", "float4_e2m1fn group=32 scale=percentile", "ternary"]
    for line in lines:
        q = nybble.Quantizer(line)
        expected, values = q.quantize(x), q.fake_quantize(x)
        with setting(way):
            found, again = q.quantize(x), q.fake_quantize(x)
        assert again.dtype == values.dtype and torch.equal(again, values), line
        for name, tensor in expected.tensors().items():
            assert found.tensors()[name].dtype == tensor.dtype and torch.equal(found.tensors()[name], tensor), line
        with setting(way):
            assert torch.equal(found.dequantize(), values), line


def test_low_rank_sums_are_added_in_float32() -> None:
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((8, 2), (2, 16)))
    found = LowRankSum(nybble.Quantizer("int4 group=16").quantize(torch.ones(8, 16)), a, b)
    expected = found.dequantize()
    with setting("autocast"):
        assert torch.equal(found.dequantize(), expected)


@pytest.mark.parametrize("way", ["float64", "bfloat16"])
def test_training(way: str) -> None:
    def trained() -> Any:
        model = prepare(
            tiny_model(dtype=torch.float32, tie_word_embeddings=False), {"weights": "int4 group=16"}, {"weights": "lsq"}
        )
        loss = model(input_ids=input_ids()).logits.float().square().mean()
        loss.backward()
        torch.optim.SGD(model.parameters(), 0.01).step()
        return convert(model)

    expected = trained().state_dict()
    with setting(way):
        found = trained().state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
