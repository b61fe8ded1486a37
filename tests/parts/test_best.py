"""The recipe ``best``: a family by target, and what the command line takes where no recipe is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_text, save_tiny, tiny_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import nybble
from nybble.cli import main
from nybble.core.errors import UsageError
from nybble.pipelines.finished import without_spare
from nybble.pipelines.request import build_recipe
from nybble.recipe import Recipe, load_recipe, parse_recipe
from nybble.recipes import targets
from nybble.search.recipe import load_search_recipe
from nybble.training.recipe import load_training_recipe
from nybble.walk.job import Job
from nybble.walk.steps.make import make_finishes


def test_best_is_a_family_by_target() -> None:
    assert set(targets()) >= {"w4a16", "w3a16", "w2a16", "w4a8", "nvfp4", "mxfp4"}
    assert load_recipe("best") == load_recipe("best-w4a16")
    assert build_recipe("best", target="w4a16") == load_recipe("best").with_effort("full")
    assert build_recipe("best", target="NVFP4").scheme == load_recipe("nvfp4").scheme
    with pytest.raises(UsageError, match=r"unknown target 'w4a61'. Did you mean 'w4a16'"):
        build_recipe("best", target="w4a61")
    with pytest.raises(UsageError, match=r"target 'nvfp4' goes with the recipe 'best'; 'gptq' has its own scheme"):
        build_recipe("gptq", target="nvfp4")


@pytest.mark.parametrize(
    ("target", "changes", "says"),
    [
        ("w2a16", {"weights": "int4 group=64"}, "means weights in 2 bits with inputs in float, .*4 bits.*target w4a16"),
        ("W4A16", {"weights": "int4 group=64", "activations": "int8 token"}, ".*inputs in 8 bits.*take --target w4a8"),
        ("w4a8", {"weights": "int4 group=32"}, ".*beside --weights alone inputs stay in float.*take --target w4a16"),
        ("w3a16", {"scheme": "W8A8"}, ".*8 bits with inputs in 8 bits.*leave --target out, or --recipe best-w3a16"),
        ("nvfp4", {"weights": "mxfp4", "activations": "mxfp4"}, ".*group=16.*group=32.*take --target mxfp4"),
        ("mxfp4", {"weights": "int4 group=32", "activations": "mxfp4"}, ".*int4 group=32 with inputs in float4"),
    ],
)
def test_a_target_that_the_scheme_contradicts(target: str, changes: Any, says: str) -> None:
    with pytest.raises(UsageError, match=f"target '{target}' {says}"):
        build_recipe("best", target=target, **changes)


TWO = [{"targets": ["re:.*down_proj"], "weights": "int4 channel"}, {"targets": ["Linear"], "weights": "int2 group=64"}]


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("w2a16", {"weights": "int2 group=32"}),
        ("w2a16", {"weights": "nf2 group=64"}),
        ("w4a16", {"scheme": "W4A16"}),
        ("w4a8", {"weights": "int4 channel", "activations": "float8_e4m3fn token"}),
        ("nvfp4", {"weights": "nvfp4-46", "activations": "nvfp4"}),
        ("w2a16", {"kv": "int4 group=32", "embeddings": "int8 channel", "ignore": ["re:.*down_proj"]}),
        ("w2a16", {"scheme": {"rules": TWO}}),
    ],
)
def test_a_target_takes_other_lines_of_its_bits(target: str, changes: Any) -> None:
    assert build_recipe("best", target=target, **changes).name == f"best-{target}"


@pytest.mark.parametrize("target", targets())
def test_every_target_begins_with_gptq(target: str) -> None:
    """So that a window which signed gradients would make worse has GPTQ's codes to go back to."""
    steps = load_recipe(f"best-{target}").steps
    assert [step.name for step in steps if step.kind == "solver"] == ["gptq"]
    assert {"sign-round"} <= {step.options.get("weights") for step in steps}


def test_the_usual_recipe_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place, text = save_tiny(tmp_path / "model", num_hidden_layers=1), save_text(tmp_path / "text.txt", 600)

    def run(*arguments: Any) -> tuple[Any, str, str]:
        asked = ("quantize", place, *arguments, "--data", text, "--samples", 2, "--seq-len", 8, "--effort", "quick")
        monkeypatch.setattr("sys.argv", ["nybble", *map(str, asked)])
        monkeypatch.setattr("warnings.formatwarning", __import__("warnings").formatwarning)
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, *capfd.readouterr()

    code, out, _ = run(tmp_path / "a", "--json")
    assert code == 0 and '"recipe": "best-w4a16"' in out
    sizes = {row["weights"] for row in json.loads(out)["layers"]}  # of 32 and 48 columns
    assert sizes == {f"int4 group={n} symmetric=false scale_format=bfloat16" for n in (32, 48)}
    code, out, _ = run(tmp_path / "b", "--target", "w2a16", "--weights", "int2 group=16 symmetric=false", "--json")
    assert code == 0 and '"recipe": "best-w2a16"' in out
    code, _, err = run(tmp_path / "c", "--target", "w9")
    assert code == 2 and "unknown target 'w9'" in err
    code, _, err = run(tmp_path / "d", "--recipe", "rtn", "--target", "nvfp4")
    assert code == 2 and "goes with the recipe 'best'" in err


def test_the_list_has_it_with_its_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def listed(*options: str) -> str:
        monkeypatch.setattr("sys.argv", ["nybble", "recipes", *options])
        with pytest.raises(SystemExit):
            main()
        return capsys.readouterr().out

    first, *others = json.loads(listed("--json"))["recipes"]
    assert (first["name"], first["same_as"]) == ("best", "best-w4a16")
    assert first["targets"] == {target: f"best-{target}" for target in targets()}
    same = next(recipe for recipe in others if recipe["name"] == first["same_as"])
    assert all(first[key] == same[key] for key in ("scheme", "steps"))
    shown = listed()
    assert "│ best " in shown and "trained by nybble train" in shown and "│ llm-qat " in shown
    training = {recipe["name"]: recipe for recipe in json.loads(listed("--json"))["training"]}
    assert training["llm-qat"] == json.loads(listed("llm-qat", "--json")) == load_training_recipe("llm-qat").to_dict()
    assert listed("llm-qat", "--matrix") == ""
    searches = {recipe["name"]: recipe for recipe in json.loads(listed("--json"))["search"]}
    assert searches["hawq"] == json.loads(listed("hawq", "--json")) == load_search_recipe("hawq").to_dict()
    assert "methods of nybble search" in shown and "│ hawq " in shown
    file = tmp_path / "own.yaml"
    file.write_text(listed("hawq"), encoding="utf-8")
    assert json.loads(listed(str(file), "--json")) == searches["hawq"]


def shortened(target: str) -> Recipe:
    """At full effort, of two steps wherever something is learned."""
    found = build_recipe("best", target=target).to_dict()
    found["steps"] = [{**step, "steps": 2} if "steps" in step else step for step in found["steps"]]
    return parse_recipe(found)


@pytest.mark.parametrize("target", ["w2a16", "w3a16", "nvfp4"])
def test_it_ends_with_distillation_where_that_gains(target: str) -> None:
    """At full effort, of any model whose output can be compared; at quick effort not."""
    assert make_finishes(load_recipe(f"best-{target}").with_effort("quick")) == []
    (step,) = make_finishes(load_recipe(f"best-{target}"))
    assert step.optional and step.steps == 200  # type: ignore[attr-defined]
    ids = torch.randint(3, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    cases: list[tuple[Any, Any, str]] = [(tiny_model(dtype=torch.float32), ids, "kl")]
    cases += [(network, torch.randn(8, 64), "mse")] if target == "w2a16" else []
    for model, data, loss in cases:
        lines = list[str]()
        _, report = nybble.quantize(model, shortened(target), data, announce=lines.append)
        assert any("whole quantized model is trained (distill)" in line for line in lines)
        losses = {w["loss"] for row in report.layers for w in (row.learned or {}).get("windows", ())}
        assert f"distill, {loss}" in losses


def test_a_model_too_large_for_distillation_is_as_before() -> None:
    """Pre-flight of 8B weights, which has neither more memory nor a training; of 135M it names both."""
    lines = {}
    for layers, width in ((32, 4096), (2, 64)):
        config = LlamaConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
            num_key_value_heads=1, vocab_size=128,
        )  # fmt: skip
        with torch.device("meta"):
            model = LlamaForCausalLM(config).bfloat16()
        job = Job.make(model, None, load_recipe("best-w2a16"), torch.zeros(4, 8, dtype=torch.int64), nybble.Settings())
        found = without_spare(job)
        lines[width] = found.spared, len(make_finishes(found.recipe)), found.taught is None
    assert lines[4096] == (
        ("left out: train distill, as the model's dense weights and gradients don't fit the step's dense_gb",), 0, True
    )  # fmt: skip
    assert lines[64] == ((), 1, False)
