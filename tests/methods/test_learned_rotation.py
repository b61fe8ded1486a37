"""Learned rotations: orthogonal, the same float network, better than the fixed ones that they begin with."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.test_rotate import ROTATED, made, stream, uneven
from tests.tiny import logits, save_text, save_tiny, tiny_model
from torch import Tensor, nn

import nybble
from nybble.calibration.block import BlockState
from nybble.calibration.lessons import Network
from nybble.calibration.window import Calibration, Window
from nybble.core import tensorfile
from nybble.core.errors import LearningError, ModelError, SchemeError
from nybble.core.orthogonal import rotation
from nybble.core.stiefel import CayleyDescent, orthogonality_error
from nybble.models.adapter import adapter_for
from nybble.pipelines import prepared
from nybble.recipe import load_recipe, parse_recipe
from nybble.report.learning import unmoved
from nybble.transforms import Learnt, make_transform
from nybble.transforms._rounded import RoundedNetwork
from nybble.transforms.learned_rotation import STREAM, LearnedRotation

W4A4 = {"targets": ["Linear"], "ignore": ["lm_head"], "weights": "int4 channel", "inputs": "int4 token"}
LEARN: dict[str, Any] = {"transform": "learned-rotation", "steps": 12, "batch": 8, "rate": 0.1, "momentum": 0.5}
HEADS = {"opt": 4, "gpt2": 4, "gpt_neox": 4, "bloom": 4}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tokens(seed: int, samples: int = 32) -> Tensor:
    return torch.randint(3, 300, (samples, 16), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def planted(**changes: Any) -> Any:
    """A model whose residual stream has three loud channels, and whose values have one a head."""
    model = tiny_model("mistral", torch.float32, **changes)
    loud = [5, 17, 30]
    model.model.embed_tokens.weight[:, loud] *= 15
    model.lm_head.weight[:, loud] /= 15
    for layer in model.model.layers:
        for writer in (layer.mlp.down_proj, layer.self_attn.o_proj):
            writer.weight[loud] *= 15
        for reader in (layer.mlp.gate_proj, layer.mlp.up_proj, *list(layer.self_attn.children())[:3]):
            reader.weight[:, loud] /= 15
        layer.self_attn.v_proj.weight[[2, 11]] *= 8
        layer.self_attn.o_proj.weight[:, [2, 10, 19, 27]] /= 8
    return model


def quantized(
    *steps: dict[str, Any], model: Any = None, scheme: dict[str, Any] | None = None, **more: Any
) -> tuple[Any, Any]:
    recipe = parse_recipe({"name": "x", "scheme": scheme or W4A4, "steps": list(steps)})
    settings = nybble.Settings(samples=32, seq_len=16, batch=16, dtype=torch.float32, **more)
    return nybble.quantize(planted() if model is None else model, recipe, tokens(0), settings=settings)


@torch.no_grad()
def divergence(model: nn.Module, exact: nn.Module) -> float:
    """Of the next token from the float model's, on tokens that calibration has not seen."""
    right, found = (m(tokens(1), use_cache=False).logits.log_softmax(-1) for m in (exact, model))
    return float((right.exp() * (right - found)).sum(-1).mean())


@cache
def learned(**options: Any) -> dict[str, Tensor]:
    """What is learned of the planted model."""
    found: dict[str, Tensor] = {}
    plain = LearnedRotation.learn

    def watch(self: LearnedRotation, network: Network) -> Learnt:
        learnt = plain(self, network)
        found.update(learnt.parameters)
        return learnt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LearnedRotation, "learn", watch)
        quantized({**LEARN, **options}, {"solver": "rtn"})
    return found


# ------------------------------------------------------------------------------------------------ in float
def orthogonal(count: int, size: int, seed: int) -> Tensor:
    return torch.stack([rotation(size, "orthogonal", 0, True, seed + i) for i in range(count)])


@torch.no_grad()
def rotated(model: Any, **options: Any) -> tuple[Any, Tensor | None]:
    """The transform alone, taught any orthogonal matrices, on a model in memory; and that of the stream."""
    adapter, config = adapter_for(model), model.config
    transform: Any = make_transform("learned-rotation", options)
    transform.check("learned-rotation", adapter, model)
    transform.prepare(adapter, model)
    begun: dict[str, Tensor] = {}
    for name in ("", *adapter.block_names(model)):
        network = Network(
            model=model, adapter=adapter, targets={}, products=torch.float32, speaks=True, samples=0,
            batch=lambda _: ({}, None), wanted=None, seed=0,
        )  # fmt: skip
        transform._learning(BlockState(model.get_submodule(name), name), network, begun)
    taught = {
        name: orthogonal(len(leaf), leaf.shape[-1], 10 * number) for number, (name, leaf) in enumerate(begun.items())
    }
    transform = transform.taught(taught)
    for rewrite in transform.outside(adapter, model, 0):
        rewrite.apply(BlockState(model, ""))
    calibration = Calibration(
        tokens=0, samples=0, batches=0, device=torch.device("cpu"), dtype=torch.float32, seed=0, config=config
    )
    for name in adapter.block_names(model):
        transform.run(Window([BlockState(model.get_submodule(name), name)], calibration, None, name), adapter, "float")
    whole = taught.get(STREAM)
    return model, None if whole is None else torch.block_diag(*whole)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("options", [{}, {"block": 8, "head_block": 4}, {"heads": False}], ids=str)
@pytest.mark.parametrize("family", ROTATED)
def test_the_float_model_stays_the_same(family: str, options: dict[str, Any]) -> None:
    """Whatever was learned: any orthogonal matrices, in every family that ``rotate`` takes."""
    model = uneven(made(family))
    before, was, values = logits(model), stream(model), copy.deepcopy(model.model.layers[0].self_attn.v_proj.weight)
    _, whole = rotated(model, **options)
    assert whole is not None
    torch.testing.assert_close(logits(model), before, rtol=0, atol=3e-5 * float(before.std()))
    for now, then in zip(stream(model), was, strict=True):
        torch.testing.assert_close(now, then @ whole, rtol=0, atol=3e-5 * float(then.std()))
    assert not torch.equal(model.model.layers[0].self_attn.v_proj.weight, values)


@pytest.mark.parametrize("family", HEADS)
def test_layer_norms_leave_the_heads(family: str) -> None:
    """No rotation passes the mean that a LayerNorm takes: what is refused names what can be done, and that works."""
    model = uneven(tiny_model(family, torch.float32))
    with pytest.raises(ModelError, match=r"can't rotate the residual stream.*LayerNorm.*stream: false"):
        rotated(model)
    before, states = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    _, whole = rotated(model, stream=False)
    assert whole is None
    torch.testing.assert_close(logits(model), before, rtol=0, atol=3e-5 * float(before.std()))
    assert sum(not torch.equal(t, states[name]) for name, t in model.state_dict().items()) >= 4


# ------------------------------------------------------------------------------------------------ learning
def test_it_begins_as_the_fixed_rotations(tmp_path: Path) -> None:
    """Without a step the bytes are those of ``rotate`` and ``hadamard``."""
    fixed, _ = quantized({"transform": "rotate"}, {"transform": "hadamard"}, {"solver": "rtn"})
    begun, _ = quantized({**LEARN, "steps": 0}, {"solver": "rtn"})
    assert all(torch.equal(t, begun.state_dict()[name]) for name, t in fixed.state_dict().items())


@pytest.mark.parametrize("scheme", [
    W4A4, {**W4A4, "ignore": [], "inputs": "int8 tensor"}, {**W4A4, "weights": "nvfp4", "inputs": "mxfp4 group=16"},
    {**W4A4, "ignore": [], "inputs": "int8 tensor static"},
], ids=["int4", "head", "fp4", "head and static"])  # fmt: skip
def test_what_is_learned_on_is_what_is_stored(scheme: dict[str, Any]) -> None:
    """The network with its quantizers gives what the quantized model gives, at the same rotations."""
    found: list[Tensor] = []
    plain = RoundedNetwork.__call__

    def watch(self: RoundedNetwork, inputs: Any) -> Tensor:
        with torch.no_grad():
            found.append(plain(self, {"input_ids": tokens(1)}))
        return plain(self, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoundedNetwork, "__call__", watch)
        quantized({**LEARN, "steps": 1}, {"solver": "rtn"}, scheme=scheme)
    model, _ = quantized({**LEARN, "steps": 0}, {"solver": "rtn"}, scheme=scheme)
    with torch.no_grad():
        wanted = model(tokens(1), use_cache=False).logits
    away = float((found[0] - wanted).square().mean() / wanted.square().mean())
    assert away < (0.05 if "static" in scheme["inputs"] else 1e-9)  # another batch has another range


def test_learned_matrices_are_orthogonal() -> None:
    for options in ({}, {"block": 8, "head_block": 4}):
        found = learned(**options)
        assert found.keys() == {STREAM, *(f"model.layers.{i}.self_attn.v_proj" for i in range(2))}
        assert found[STREAM].shape == ((4, 8, 8) if options else (1, 32, 32))
        assert found["model.layers.0.self_attn.v_proj"].shape == ((4, 4, 4) if options else (2, 8, 8))
        for name, matrices in found.items():
            assert orthogonality_error(matrices) < 1e-5, name
    start = rotation(32, "hadamard", 0, True, 0)
    assert float((learned()[STREAM][0] - start).square().sum().sqrt()) > 0.3


def test_momentum_keeps_some_of_the_direction_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step has none before it; from the second on it goes elsewhere."""
    states, step = list[list[Tensor]](), CayleyDescent.step

    def seen(self: CayleyDescent, rate: float) -> None:
        step(self, rate)
        states.append([matrix.detach().clone() for matrix in self.matrices])

    monkeypatch.setattr(CayleyDescent, "step", seen)
    for momentum in (0.0, 0.9):
        quantized({**LEARN, "steps": 2, "momentum": momentum}, {"solver": "rtn"}, model=planted(num_hidden_layers=1))
    (first, second), (same, other) = states[:2], states[2:]
    assert all(torch.equal(one, two) for one, two in zip(first, same, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(second, other, strict=True))


@torch.no_grad()
def distance(model: nn.Module, exact: nn.Module) -> float:
    """Of the logits from the float model's, on tokens that calibration has not seen."""
    one, other = (m(tokens(1), use_cache=False).logits for m in (exact, model))
    return float((one - other).square().mean() / one.square().mean())


@pytest.mark.parametrize(("loss", "judge"), [("auto", divergence), ("output", distance)])
def test_better_than_the_fixed_rotations_on_tokens_never_seen(loss: str, judge: Any) -> None:
    exact = planted()
    fixed, found = (
        judge(quantized({**LEARN, "loss": loss, **more}, {"solver": "rtn"})[0], exact) for more in ({"steps": 0}, {})
    )
    assert found < 0.9 * fixed


def test_the_report_says_what_it_came_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, after and a curve, once; where no step was better, so, and the bytes are those of the start."""

    def entry(report: Any) -> tuple[dict[str, Any], str]:
        told = [(w, row.notes[0]) for row in report.layers for w in (row.learned or {}).get("windows", ())]
        assert len(told) == 1 and told[0][1].startswith("learned-rotation: ")
        return told[0]

    _, report = quantized(LEARN, {"solver": "rtn"})
    found, note = entry(report)
    assert found["after"] < 0.9 * found["before"] and found["steps"] == 12 and len(found["curve"]) == 12
    assert "kept" not in note and unmoved([row.to_dict() for row in report.layers]) == ""
    looks = iter([1.0, *[2.0] * 9])
    monkeypatch.setattr(LearnedRotation, "_all", lambda *_: next(looks))
    model, report = quantized({**LEARN, "steps": 4}, {"solver": "rtn"})
    found, note = entry(report)
    assert (found["kept"], found["before"], found["after"]) == ("start", 1.0, 1.0)
    assert "no step was better than the start" in note
    assert unmoved([row.to_dict() for row in report.layers]) == "what was learned came to nothing: learned-rotation"
    start, _ = quantized({**LEARN, "steps": 0}, {"solver": "rtn"})
    assert all(torch.equal(t, start.state_dict()[name]) for name, t in model.state_dict().items())


def test_gradients_may_be_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps whose length goes by the gradient's walk at random where it is long (docs/log.md, SpinQuant at W4A4)."""
    plain, exact = Network.judged, planted()

    def learned(loud: float, **more: Any) -> float:
        monkeypatch.setattr(Network, "judged", lambda *given, **options: loud * plain(*given, **options))
        return divergence(quantized({**LEARN, **more}, {"solver": "rtn"})[0], exact)

    found = learned(1.0)
    assert found < 0.9 * learned(1.0, steps=0) and learned(1024.0) == pytest.approx(found, rel=1e-5)


def test_blocks_of_neighbours_for_short_blocks_of_a_format() -> None:
    """MX-like groups of 8: rotations of 8 channels, learned, before the same ones of Hadamard."""
    scheme = {**W4A4, "weights": "mxfp4 group=8", "inputs": "mxfp4 group=8"}
    exact, options = planted(), {"block": 8, "head_block": 8}
    fixed, found = (
        divergence(quantized({**LEARN, **options, **more}, {"solver": "rtn"}, scheme=scheme)[0], exact)
        for more in ({"steps": 0}, {})
    )
    assert found < 0.9 * fixed


@pytest.mark.parametrize("behind", [
    [{"solver": "gptq"}], [{"transform": "smooth"}, {"solver": "rtn"}],
    [{"solver": "rtn"}, {"reconstruction": "mse", "weights": "sign-round", "optimizer": "sign", "steps": 10,
                         "rates": {"rounding": 0.005, "clip": 0.005}, "keep": "best"}],
], ids=["gptq", "smooth", "sign-round"])  # fmt: skip
def test_before_any_solver(behind: list[dict[str, Any]]) -> None:
    exact = planted()
    fixed, found = (divergence(quantized({**LEARN, **more}, *behind)[0], exact) for more in ({"steps": 0}, {}))
    assert found < fixed


def test_experts_tables_and_heads_learn_with_the_rest() -> None:
    """Fused experts have no twin: their weights are rounded all the same, and gradients pass."""
    scheme = {"targets": ["Experts", "Linear", "Embedding"], "weights": "int4 channel"}
    options = {**LEARN, "steps": 4, "loss": "next-token"}
    moved = []
    for steps in (0, 4):
        model, _ = quantized({**options, "steps": steps}, {"solver": "rtn"}, model=made("mixtral"), scheme=scheme)
        moved.append(logits(model))
    assert not torch.equal(*moved)
    with pytest.raises(SchemeError, match=r"rounds=activations nothing.*rounds: all"):
        quantized({**options, "rounds": "activations"}, {"solver": "rtn"}, model=made("mixtral"), scheme=scheme)


# ------------------------------------------------------------------------------------------------ as promised
def test_same_seed_same_bytes_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, text = str(save_tiny(tmp_path / "float")), str(save_text(tmp_path / "text.txt"))
    recipe = parse_recipe(
        {"name": "x", "scheme": {"weights": "int4 channel", "inputs": "int4 token"},
         "steps": [{**LEARN, "steps": 2, "batch": 2}, {"solver": "rtn"}]}
    )  # fmt: skip
    settings = {"samples": 4, "seq_len": 12, "batch": 2}

    def run(out: str, **more: Any) -> None:
        torch.manual_seed(17)
        state = torch.get_rng_state()
        nybble.quantize(folder, recipe, text, out=tmp_path / out, settings={**settings, **more})
        assert torch.equal(torch.get_rng_state(), state)

    run("one")
    run("other", seed=1)
    calls: list[int] = []
    plain, advance = LearnedRotation.learn, tensorfile.write_tensorfile

    def count(self: LearnedRotation, network: Network) -> Learnt:
        calls.append(1)
        return plain(self, network)

    def stop(*args: Any) -> None:
        advance(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(LearnedRotation, "learn", count)
    monkeypatch.setattr(prepared, "write_tensorfile", stop)
    with pytest.raises(KeyboardInterrupt):
        run("two")
    monkeypatch.setattr(prepared, "write_tensorfile", advance)
    run("two", resume=True)
    assert calls == [1]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "other")]
    assert files[0] == files[1] != files[2]
    assert not list((tmp_path / "two").rglob("*learned*"))


def test_the_recipe() -> None:
    recipe = load_recipe("spinquant")
    assert [step.name for step in recipe.steps] == ["learned-rotation", "gptq"]
    assert recipe.solver.options == {"inputs": "both"}
    lines = nybble.preflight(planted(), recipe, tokens(0))
    assert any("learned-rotation' learns on the whole float model" in line for line in lines)


def test_behind_rotations_gptq_makes_up_for_what_inputs_lost() -> None:
    """Four-bit inputs lose so much that weights fitted to them alone are far off (docs/log.md, SpinQuant at W4A4)."""
    exact, recipe, found = planted(), load_recipe("quarot"), list[float]()
    assert [step.name for step in recipe.steps] == ["rotate", "hadamard", "gptq"]
    for options in (recipe.solver.options, {}):
        model, _ = quantized({"transform": "rotate"}, {"transform": "hadamard"}, {"solver": "gptq", **options})
        found.append(divergence(model, exact))
    assert found[0] < 0.8 * found[1]


def test_a_model_in_memory_keeps_its_float_weights_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    monkeypatch.setattr(Network, "judged", lambda *args, **kwargs: torch.tensor(torch.nan))
    with pytest.raises(LearningError, match="the loss of learned-rotation is nan at step 0"):
        quantized(LEARN, {"solver": "rtn"}, model=model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_refusals() -> None:
    def refused(match: str, family: str = "llama", scheme: dict[str, Any] | None = None, **options: Any) -> None:
        recipe = parse_recipe(
            {"name": "x", "scheme": scheme or W4A4,
             "steps": [{"transform": "learned-rotation", **options}, {"solver": "rtn"}]}
        )  # fmt: skip
        with pytest.raises((ModelError, SchemeError), match=match):
            nybble.preflight(tiny_model(family, torch.float32), recipe, tokens(0))

    refused("norms behind attention or MLP", "gemma2")
    refused("finds no values of attention.*falcon|no such pair|no adapter", "falcon", stream=False)
    refused("stream and heads are both off", stream=False, heads=False)
    refused("block=12 does not divide the 32 channels.*nearest that do: 8, 16", block=12)
    refused("head_block=3 does not divide the 8 channels of a head; the nearest that do: 2, 4", head_block=3)
    refused("rate=0", rate=0.0)
    refused("rate=1.5 is an angle a step, in radians: above 0 and up to 1", rate=1.5)
    refused("batch=0", batch=0)
    refused("learned-rotation.*stochastic", scheme={**W4A4, "inputs": "int4 token rounding=stochastic"})
