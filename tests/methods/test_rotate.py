"""Rotations of the residual stream: the float network computes the same, in another basis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import input_ids, logits, save_text, tiny_model, tiny_tokenizer
from torch import Tensor

import nybble
from nybble.calibration.block import BlockState
from nybble.calibration.window import Calibration, Window
from nybble.core.errors import DataError, ModelError, SchemeError
from nybble.core.orthogonal import hadamard_signs, rotation
from nybble.data import load_text, token_samples
from nybble.models.adapter import REGISTRY, adapter_for
from nybble.recipe import parse_recipe
from nybble.transforms import make_transform

SETTINGS = nybble.Settings(samples=4, seq_len=12, batch=2, dtype=torch.float32)
HALF = "float16_e5m10 channel"


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 36, 44, 60, 64, 76, 100 * 2, 576, 768, 896, 1536])
def test_hadamard_matrices(order: int) -> None:
    found = hadamard_signs(order)
    assert found is not None and found.shape == (order, order) and set(found.flatten().tolist()) <= {1, -1}
    wide = found.astype(np.float32)  # whose sums of so few ones are exact
    assert np.array_equal(wide @ wide.T, order * np.eye(order, dtype=np.float32))


def test_orders_without_one() -> None:
    assert [order for order in range(1, 61) if hadamard_signs(order) is not None] == [
        *(1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 60)
    ]  # of 52 there is one, by Paley over the field of 25
    with pytest.raises(SchemeError, match=r"order 52 is known.*matrix: orthogonal"):
        rotation(52, "hadamard", 0, True, 0)
    with pytest.raises(SchemeError, match=r"block=32 does not divide the 48 .*nearest that do: 24, 48\."):
        rotation(48, "hadamard", 32, True, 0)


@pytest.mark.parametrize("matrix", ["hadamard", "orthogonal"])
def test_rotations_are_orthogonal_and_by_seed(matrix: Any) -> None:
    found, again = rotation(48, matrix, 0, True, 1), rotation(48, matrix, 0, True, 2)
    torch.testing.assert_close(found @ found.mT, torch.eye(48), rtol=0, atol=1e-6)
    assert not torch.equal(found, again)
    blocks = rotation(48, matrix, 12, False, 1)
    assert torch.equal(blocks, torch.kron(torch.eye(4), blocks[:12, :12])) and bool((blocks[:12, :12] != 0).all())


def uneven(model: Any) -> Any:
    """Norm weights and biases of fresh models are alike, which hides what was forgotten."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


@torch.no_grad()
def rotate(model: Any, seed: int = 0, **options: Any) -> Any:
    """The transform alone, on a model in memory."""
    transform, adapter = make_transform("rotate", options), adapter_for(model)
    transform.check("rotate", adapter, model)
    transform.prepare(adapter, model)
    for rewrite in transform.outside(adapter, model, seed):
        rewrite.apply(BlockState(model, ""))
    calibration = Calibration(
        tokens=0, samples=0, batches=0, device=torch.device("cpu"), dtype=torch.float32, seed=seed, config=model.config
    )
    for name in adapter.block_names(model):
        window = Window([BlockState(model.get_submodule(name), name)], calibration, None, name)
        transform.run(window, adapter, "float")
    return model


@torch.no_grad()
def stream(model: Any) -> list[Tensor]:
    """The hidden states in front of every block."""
    found: list[Tensor] = []
    adapter = adapter_for(model)
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for block in adapter.blocks_of(model)
    ]
    model(input_ids=input_ids(), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


ROTATED: dict[str, dict[str, Any]] = {
    "llama": {},  # tied, with biases, two queries a key head
    "llama-untied": {"tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {},
    "mistral": {},
    "gemma": {"head_dim": 8},
    "mixtral": {},
    "qwen3_moe": {},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
}


@pytest.mark.parametrize("options", [{}, {"block": 8, "signs": False}, {"matrix": "orthogonal"}], ids=str)
@pytest.mark.parametrize("family", ROTATED)
def test_the_float_model_stays_the_same(family: str, options: dict[str, Any]) -> None:
    model = uneven(made(family))
    before, was = logits(model), stream(model)
    rotate(model, **options)
    found = rotation(
        32, *(options.get(key, default) for key, default in (("matrix", "hadamard"), ("block", 0), ("signs", True))), 0
    )
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5 * float(before.std()))
    for now, then in zip(stream(model), was, strict=True):
        torch.testing.assert_close(now, then @ found, rtol=0, atol=2e-5 * float(then.std()))
        assert float((now - then).abs().max()) > 0.1 * float(then.std())
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def made(family: str) -> Any:
    from tests.tiny import FAMILIES, SIZES

    name = family.removesuffix("-untied")
    FAMILIES.setdefault(name, SIZES)
    return tiny_model(name, torch.float32, **ROTATED[family])


def test_every_family_that_lists_writers_is_tested() -> None:
    known = {kind for part in REGISTRY.all().values() if part.writers for kind in part.model_types}
    assert known == {name.removesuffix("-untied") for name in ROTATED}


def test_outliers_of_the_stream_fall() -> None:
    model = tiny_model("mistral", torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] *= 60
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[5] *= 60

    def peaks() -> list[float]:
        return [float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean()) for x in stream(model)]

    before = peaks()
    assert all(b > 4 for b in before)  # of sqrt(32) = 5.7, where one channel is all there is
    rotate(model)
    assert all(a < 0.5 * b for a, b in zip(peaks(), before, strict=True))


def quantized(folder: Path, scheme: dict[str, Any], steps: list[dict[str, Any]], model: Any = None) -> Any:
    text = load_text(str(save_text(folder / "text.txt")), "calibration")
    tokens = token_samples(text, tiny_tokenizer(), samples=4, seq_len=12)
    recipe = parse_recipe({"name": "x", "scheme": scheme, "steps": steps})
    return nybble.quantize(str(folder) if model is None else model, recipe, tokens, settings=SETTINGS)[0]


def saved(folder: Path, model: Any) -> Any:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("held", [False, True], ids=["from a folder", "in memory"])
@pytest.mark.parametrize("ignore", [["lm_head"], []], ids=["float head", "quantized head"])
def test_from_the_table_to_the_head(tmp_path: Path, ignore: list[str], held: bool) -> None:
    """The walk rotates what is in no block once, also where its precise values come from the source again."""
    model = saved(tmp_path, uneven(tiny_model("llama", torch.float32)))
    exact = logits(model)
    scheme = {"targets": ["Linear"], "weights": HALF, "ignore": ignore}
    found = quantized(tmp_path, scheme, [{"transform": "rotate"}, {"solver": "gptq"}], model if held else None)
    assert float((logits(found) - exact).abs().max()) < 0.02 * float(exact.std())
    assert ("lm_head" in dict(found.named_modules())) and found.model.norm.weight.eq(1).all()


def test_it_helps_where_channels_are_loud(tmp_path: Path) -> None:
    """Four bits a token: one loud channel, which few weights listen to, takes every other one's resolution."""
    model = tiny_model("mistral", torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            for writer in (layer.mlp.down_proj, layer.self_attn.o_proj):
                writer.weight[5] *= 40
            for reader in (layer.mlp.gate_proj, layer.mlp.up_proj, *list(layer.self_attn.children())[:3]):
                reader.weight[:, 5] /= 40
        model.lm_head.weight[:, 5] /= 40
        model.model.embed_tokens.weight[:, 5] *= 40
    exact = logits(saved(tmp_path, model))
    scheme = {"targets": ["Linear"], "weights": "int8 channel", "inputs": "int4 token"}

    def lost(*names: str) -> float:
        found = quantized(tmp_path, scheme, [*({"transform": name} for name in names), {"solver": "gptq"}])
        return float((logits(found) - exact).square().mean())

    assert lost("rotate", "hadamard") < 0.5 * lost()


def test_a_model_in_memory_is_as_it_was(tmp_path: Path) -> None:
    model = uneven(tiny_model("llama", torch.float32))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = parse_recipe(
        {"name": "x", "scheme": {"weights": HALF}, "steps": [{"transform": "rotate"}, {"solver": "rtn"}]}
    )
    nybble.preflight(model, recipe)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan  # found when the block is reached
    with pytest.raises(DataError, match="NaN"):
        nybble.quantize(model, recipe, settings=SETTINGS)
    before["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    assert all(torch.equal(t.nan_to_num(7), before[name].nan_to_num(7)) for name, t in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings


def test_refusals() -> None:
    def refused(family: str, match: str, **options: Any) -> None:
        with pytest.raises((ModelError, SchemeError), match=match):
            rotate(tiny_model(family, torch.float32), **options)

    refused("gpt2", "can't rotate the residual stream.*gpt2 lists no RMS norms.*LayerNorm.*online-rotation.*hadamard")
    refused("gemma2", "norms behind attention or MLP")
    refused("llama", "block=12 does not divide the 32", block=12)
    with pytest.raises(SchemeError, match="block=-1"):
        make_transform("rotate", {"block": -1})
    model = tiny_model("llama", torch.float32)
    model.model.layers[1].mlp.extra = torch.nn.Linear(32, 32)
    with pytest.raises(ModelError, match=r"model\.layers\.1 has mlp\.extra, of which the adapter llama"):
        rotate(model)
    with pytest.raises(ModelError, match="no head"):
        rotate(tiny_model("llama", torch.float32).model)
    recipe = parse_recipe(
        {"name": "x", "scheme": {"weights": "int4 channel", "inputs": "int8 tensor static"},
         "steps": [{"transform": "rotate"}, {"solver": "llm-fp4", "loss": "fisher"}]}
    )  # fmt: skip
    with pytest.raises(SchemeError, match=r"fisher.*transform 'rotate'.*loss=output"):
        nybble.preflight(tiny_model("llama", torch.float32), recipe)
