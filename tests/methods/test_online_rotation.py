"""Inputs rotated at run time: the float network stays what it is, solvers see what the weights are multiplied with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import input_ids, logits, save_text, save_tiny, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import nybble
from nybble.checkpoint.account import inspect
from nybble.core.errors import FileError, ModelError, SchemeError
from nybble.core.orthogonal import hadamard
from nybble.core.tensorfile import write_tensorfile
from nybble.learned import ACTIVATIONS, WEIGHTS
from nybble.learned.ste import StraightThrough
from nybble.nn.fake import FakeLayer
from nybble.nn.linear import QuantLinear
from nybble.nn.rotated_linear import RotatedQuantLinear
from nybble.nn.rotation import BlockRotation, mark_rotated, rotation_of
from nybble.recipe import parse_recipe
from nybble.solvers import Stats, Weight
from nybble.solvers.gptq import Gptq
from nybble.transforms.online_rotation import OnlineRotation

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "attention_bias": False}
HALF = {"weights": "float16_e5m10 channel"}
SETTINGS = nybble.Settings(samples=4, seq_len=12, batch=2, dtype=torch.float32)
ALL: dict[str, Any] = {"transform": "online-rotation", "layers": "all"}


def recipe(scheme: dict[str, str], *steps: dict[str, Any]) -> Any:
    return parse_recipe({"name": "test", "scheme": scheme, "steps": list(steps)})


def data(samples: int = 6) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 50, (samples, 12), generator=torch.Generator().manual_seed(5))}


def made(scheme: dict[str, str], *steps: dict[str, Any], family: str = "llama", **changes: Any) -> Any:
    """A tiny model in float32, quantized."""
    sizes = {} if family == "gpt2" else WIDE | changes
    model = tiny_model(family, torch.float32, **sizes)
    return nybble.quantize(model, recipe(scheme, *steps), data(), settings=SETTINGS)[0]


def far(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("options", [{}, {"signs": True}, {"block": 8, "signs": True}], ids=str)
def test_the_float_function_stays(family: str, options: dict[str, Any]) -> None:
    wanted = logits(tiny_model(family, torch.float32, **(WIDE if family != "gpt2" else {})))
    found = made(HALF, {**ALL, **options}, family=family)
    layers = [m for m in found.modules() if isinstance(m, QuantLinear)]
    assert layers and all(isinstance(layer, RotatedQuantLinear) for layer in layers)
    assert far(logits(found), wanted) < 2e-3  # of weights with 11 bits
    for layer in layers:  # it does turn: the weights alone are another function's
        layer.rotation = nn.Identity()
    assert far(logits(found), wanted) > 0.1


def test_folded_rotations_and_this_one_in_any_order() -> None:
    wanted = logits(tiny_model("llama", torch.float32, **WIDE))
    folded = [{"transform": "rotate"}, {"transform": "hadamard"}, {"transform": "smooth"}]
    online = {"transform": "online-rotation"}
    first, last = made(HALF, online, *folded), made(HALF, *folded, online)
    assert far(logits(first), wanted) < 2e-3
    assert torch.equal(logits(first), logits(last))
    names = {name for name, m in first.named_modules() if isinstance(m, RotatedQuantLinear)}
    assert names == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}  # what else is quantized is not rotated


def test_solvers_see_rotated_inputs_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = tiny_model("llama", torch.float32, **WIDE), {"input_ids": data(16)["input_ids"]}
    layer = model.model.layers[0].mlp.down_proj
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**given, use_cache=False)
    handle.remove()
    turn = torch.kron(torch.eye(3), hadamard(32))
    x = torch.cat(seen).flatten(0, -2) @ turn
    got: dict[str, tuple[Tensor, Tensor | None]] = {}
    solve = Gptq.solve

    def spy(self: Gptq, weights: Sequence[Weight], stats: Stats) -> Any:
        moment = None if stats.second_moment is None else stats.second_moment.clone()
        got.update({weight.name: (weight.matrix.clone(), moment) for weight in weights})
        return solve(self, weights, stats)

    monkeypatch.setattr(Gptq, "solve", spy)
    settings = replace(SETTINGS, samples=16)
    online, gptq = {"transform": "online-rotation", "block": 32}, {"solver": "gptq"}
    wanted = layer.weight.detach() @ turn
    nybble.quantize(model, recipe({"weights": "int4 channel"}, online, gptq), given, settings=settings)
    matrix, moment = got["model.layers.0.mlp.down_proj"]
    torch.testing.assert_close(matrix, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(moment, (x.mT @ x) / len(x), rtol=0, atol=1e-4)
    static = tiny_model("llama", torch.float32, **WIDE)
    scheme = {"weights": "int8 channel", "inputs": "int8 tensor static scale=absmax"}
    nybble.quantize(static, recipe(scheme, online), given, settings=settings)
    scale = static.model.layers[0].mlp.down_proj.inputs.scale.item()
    assert scale == pytest.approx(float(x.abs().max()) / 127, rel=1e-5)


def test_a_trainable_twin_is_the_layer_that_it_settles_to() -> None:
    layer, x = nn.Linear(48, 8), torch.randn(5, 48, requires_grad=True)
    wanted = layer(x)
    mark_rotated(layer, BlockRotation(24, torch.ones(24, dtype=torch.int8)))
    eight = nybble.Quantizer("int8 channel"), nybble.Quantizer("int8 token")
    sides = StraightThrough(eight[0], WEIGHTS, None), StraightThrough(eight[1], ACTIVATIONS, None)
    twin = FakeLayer(layer, None, *sides).eval()
    found = twin.settle()
    assert isinstance(found, RotatedQuantLinear) and torch.equal(twin(x), found(x))
    assert far(twin(x), wanted) < 0.02
    (gradient,) = torch.autograd.grad(twin.train()(x).sum(), x)
    assert far(gradient, torch.autograd.grad(wanted.sum(), x)[0]) < 0.02


def test_outliers_cost_less() -> None:
    model = tiny_model("llama", torch.float32, **WIDE)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[7] *= 60
            layer.mlp.down_proj.weight[:, 7] /= 60
    wanted, state = logits(model), model.state_dict()
    lost = []
    for steps in ((), ({"transform": "online-rotation"},)):
        fresh = tiny_model("llama", torch.float32, **WIDE)
        fresh.load_state_dict(state)
        asked = recipe({"weights": "int8 channel", "inputs": "int4 token"}, *steps)
        found, _ = nybble.quantize(fresh, asked, data(), settings=SETTINGS)
        lost.append(far(logits(found), wanted))
    assert lost[1] < 0.85 * lost[0]


@pytest.mark.parametrize(
    "steps",
    [
        ({"transform": "learned-rotation", "steps": 2, "batch": 2}, ALL),
        (ALL, {"solver": "gptq", "inputs": "both"}, {"correction": "low-rank"}, {"correction": "bias"}),
        (ALL, {"solver": "rtn"}, {"reconstruction": "mse", "weights": "sign-round", "steps": 2, "window": 2}),
        (ALL, {"solver": "rtn"}, {"reconstruction": "mse", "block": "let", "weights": "clip", "steps": 2}),
        ({"train": "restorative-lora", "steps": 1}, ALL, {"solver": "rtn"}, {"train": "distill", "steps": 1}),
    ],
    ids=["learned", "corrected", "windows", "let", "trained"],
)
def test_with_other_steps(steps: tuple[dict[str, Any], ...], tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "float", **WIDE)
    scheme = {"weights": "int8 group=16", "inputs": "int8 token"}
    wanted = logits(nybble.load(source, dtype="float32")[0])
    asked = recipe(scheme, *steps)
    nybble.quantize(str(source), asked, data(), settings=SETTINGS, out=tmp_path / "out")
    found, _ = nybble.load(tmp_path / "out", dtype="float32")
    assert sum(isinstance(m, RotatedQuantLinear) for m in found.modules()) == 14
    assert far(logits(found), wanted) < 0.15  # 8 bits on either side


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random signs, in nybble's own form: the other's readers leave rotations out."""
    room = tmp_path_factory.mktemp("online")
    source = save_tiny(room / "float", **WIDE)
    steps = [{**ALL, "signs": True, "block": 32}]
    asked = recipe({"weights": "int4 group=16", "inputs": "int8 token"}, *steps)
    nybble.quantize(str(source), asked, str(save_text(room / "text.txt")), settings=SETTINGS, out=room / "out")
    return room / "out"


def test_a_folder_by_every_loader(written: Path) -> None:
    found = logits(nybble.load(written, dtype="float32")[0])
    auto: Any = AutoModelForCausalLM
    theirs = auto.from_pretrained(written, dtype=torch.float32)
    assert torch.equal(logits(theirs), found)
    assert "transform_config" in (written / "README.md").read_text()
    compiled: Any = torch.compile(theirs, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), found, rtol=0, atol=1e-5 * float(found.abs().max()))
    tokens = theirs.generate(input_ids(), max_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 16)
    whole = logits(nybble.load(written, dtype="float32", dense=True)[0])
    torch.testing.assert_close(whole, found, rtol=0, atol=0.02 * float(found.abs().max()))  # no products of integers


def test_every_byte_is_named(written: Path) -> None:
    found = inspect(written)
    assert found["bytes"]["tables"] == 14 * 32  # signs, int8
    assert {row["format"] for row in found["formats"]} == {
        "int4 group=16 scale_format=float16, behind random hadamard=32"
    }


# PEFT asks transformers in words that its newest release calls old.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_merged_behind_it(written: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs PEFT, which nybble's extra 'test' brings")
    model, _ = nybble.load(written, dtype="float32")
    for module in model.modules():
        if isinstance(module, RotatedQuantLinear):
            module.inputs = None  # a merged adapter sees rounded inputs, the one beside it doesn't
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    beside = logits(tuned)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(logits(merged), beside, rtol=0, atol=1e-4 * float(beside.abs().max()))


def test_files_that_say_otherwise(written: Path, tmp_path: Path) -> None:
    import json
    import shutil

    from safetensors.torch import load_file

    config = json.loads((written / "config.json").read_text())
    tensors = load_file(written / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    folder = shutil.copytree(written, tmp_path / "changed")
    entry = config["quantization_config"]["modules"][name]
    for rotation, said in (
        ({"block": 48}, "64 channels, which blocks of 48 do not divide"),
        ({"block": 36, "signs": True}, name),
        ({"signs": True}, "has a block"),
        (7, "has a block"),
    ):
        entry["rotation"] = rotation
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(FileError, match=said):
            nybble.load(folder)
    shutil.copy(written / "config.json", folder)
    tensors[f"{name}.rotation.signs"] = torch.zeros(32, dtype=torch.int8)
    write_tensorfile(folder / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(FileError, match=f"{name}.rotation: the signs"):
        nybble.load(folder)


def test_bad_requests() -> None:
    with pytest.raises(SchemeError, match=r"block=5 .*|order 5"):
        made(HALF, {**ALL, "block": 5})
    with pytest.raises(SchemeError, match=r"block=16 does not divide the 40 .*nearest that do: 8, 20"):
        made(HALF, {**ALL, "block": 16}, intermediate_size=40)
    with pytest.raises(ModelError, match="no linear layer of its blocks is called 'nobody'"):
        made(HALF, {**ALL, "layers": "nobody"})
    with pytest.raises(SchemeError, match=r"--target gguf can't hold what online-rotation makes.*Leave the step out"):
        nybble.quantize(tiny_model("llama", **WIDE), recipe({"weights": "int4 group=32"}, ALL), data(), target="gguf")


def test_a_later_run_is_not_rotated() -> None:
    model = tiny_model("llama", torch.float32, **WIDE)
    scheme = {"rules": [{"targets": ["re:.*q_proj"], "weights": "int8 channel"}]}
    asked = parse_recipe({"name": "test", "scheme": scheme, "steps": [ALL]})
    nybble.quantize(model, asked, data(), settings=SETTINGS)
    assert rotation_of(model.model.layers[0].mlp.up_proj) is not None  # left in float, and what it was
    nybble.quantize(model, recipe({"weights": "int8 channel"}), data(), settings=SETTINGS)
    assert type(model.model.layers[0].mlp.up_proj) is QuantLinear
    assert type(model.model.layers[0].self_attn.q_proj) is RotatedQuantLinear


def test_signs_are_of_both_kinds_and_each_time_the_same() -> None:
    first, again = (OnlineRotation(signs=True)._signs(64) for _ in range(2))
    assert first is not None and again is not None and torch.equal(first, again)
    assert 16 < int((first == 1).sum()) < 48 and set(first.tolist()) == {1, -1}
