"""What runs do: the same numbers as the commands give by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny import save_text, save_tiny

import nybble
from nybble.checkpoint.account import inspect
from nybble.core.errors import UsageError
from nybble.core.seeds import generator
from nybble.lab.kinds import REGISTRY
from nybble.lab.kinds.quantize import QuantizeAndJudge
from nybble.lab.kinds.tensor import _DRAWN, DrawnTensor
from nybble.lab.kinds.train import TrainAndJudge
from nybble.pipelines.evaluate import run_eval
from nybble.quantizer import Quantizer


def test_a_quantized_model_is_judged_as_by_the_commands(tmp_path: Path) -> None:
    model, text = str(save_tiny(tmp_path / "m")), str(save_text(tmp_path / "t.txt"))
    sizes = {"judged_len": 16, "judged_samples": 8, "judged_on": text}
    made = QuantizeAndJudge(model=model, weights="int3 group=16", reference=True, **sizes)  # type: ignore[arg-type]
    found = made.run(tmp_path)
    out, _ = nybble.quantize(model, "rtn", weights="int3 group=16", out=tmp_path / "apart", form="native")
    judged = run_eval({"q": str(out)}, text, reference=model, seq_len=16, samples=8)["models"]["q"]
    size = inspect(out)
    assert {name: found[name] for name in judged} == judged and "kl" in judged
    assert found["quantized_bits"] == size["bits_per_quantized_weight"] and found["parameters"] == size["parameters"]
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert [found["layers"], found["kv_heads"]] == [config["num_hidden_layers"], config["num_key_value_heads"]]
    assert found["head_dim"] == config["hidden_size"] // config["num_attention_heads"]
    plain = QuantizeAndJudge(model=model, recipe="none", **sizes).run(tmp_path)  # type: ignore[arg-type]
    assert plain["ppl"] != found["ppl"] and plain["bits"] == 16.0 and plain["error"] is None


def test_what_only_the_model_shows_is_illegal(tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "m"))
    made = QuantizeAndJudge(model=model, weights="int4 group=96 pad=false")
    made.check()
    with pytest.raises(UsageError, match="96 does not divide"):
        made.run(tmp_path)


def test_a_training_is_judged_before_and_after(tmp_path: Path) -> None:
    model, text = str(save_tiny(tmp_path / "m")), str(save_text(tmp_path / "t.txt", words=60))
    made = TrainAndJudge(
        recipe="qat", model=model, data=text, judged_on=text, weights="int4 group=16", steps=2, accumulate=1,
        seq_len=16, lr=1e-2,
    )  # fmt: skip
    made.check()
    found = made.run(tmp_path)
    assert found["updates"] == 2 and found["trainable"] > 0 and found["last_loss"] > 0
    named = {name.removeprefix("before_") for name in found if name.startswith("before_")}
    assert named and named <= found.keys() and any(found[name] != found[f"before_{name}"] for name in named)


def test_a_training_that_contradicts_itself_is_illegal() -> None:
    with pytest.raises(UsageError, match="give either it or weights"):
        TrainAndJudge(recipe="qat", model="a/b", scheme="W4A16", weights="int4").check()


@pytest.mark.parametrize("distribution", ["normal", "laplace", "uniform", "student-t"])
def test_drawn_values_have_variance_one(distribution: str) -> None:
    """And the distribution's own fourth moment, where it has one that settles."""
    x = _DRAWN[distribution](generator(0), 1000, 1000)
    assert abs(x.mean()) < 5e-3 and abs(x.square().mean() - 1) < 2e-2
    fourth = {"normal": 3.0, "laplace": 6.0, "uniform": 1.8}.get(distribution)
    if fourth is not None:
        assert abs(x.pow(4).mean() - fourth) < 0.1


def test_the_error_of_a_drawn_tensor_is_that_of_a_uniform_step(tmp_path: Path) -> None:
    """Of uniform values up to sqrt(3) in one block, and 127 steps to its largest: a step squared over 12."""
    found = DrawnTensor(weights="int8 tensor", distribution="uniform").run(tmp_path)
    assert found["mse"] == pytest.approx((3**0.5 / 127) ** 2 / 12, rel=1e-2)
    assert found["bits"] == 8 * Quantizer("int8 tensor").stored_bytes((256, 1024)) / (256 * 1024)


def test_kinds_are_named() -> None:
    assert REGISTRY.names() == ["pretrain", "quantize", "tensor", "train"]
