"""``nybble export`` and ``nybble quantize --target`` as they are typed; bad requests leave nothing behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from tests.e2e.processes import start
from tests.parts.export.folders import model, quantized
from tests.tiny import save_text

import nybble
from nybble.core import files
from nybble.core.errors import FileError, SchemeError, UsageError
from nybble.export import REGISTRY, get_target
from nybble.pipelines.targets import split_targets
from nybble.recipes import targets

pytest.importorskip("compressed_tensors", reason="the target of that name")


def run(arguments: list[str], errors: Path) -> tuple[int | None, str, str]:
    """Exit code, standard output, standard error of ``nybble ARGUMENTS``."""
    process = start(arguments, errors)
    process.join()
    return process.exitcode, Path(f"{errors}.out").read_text(), errors.read_text()


def test_two_kinds_of_targets_never_meet() -> None:
    assert not {name.partition(":")[0] for name in targets()} & set(REGISTRY.names())
    assert split_targets(["NVFP4", "compressed-tensors"]) == ("NVFP4", ["compressed-tensors"])
    assert split_targets("dense:f16") == (None, ["dense:f16"])
    with pytest.raises(UsageError, match=r"unknown target 'gguff'\."):
        split_targets("gguff")
    with pytest.raises(UsageError, match="two targets for the recipe best: w4a16, nvfp4"):
        split_targets(["w4a16", "nvfp4"])


@pytest.mark.parametrize("name", REGISTRY.names())
def test_every_target_says_what_it_takes(name: str) -> None:
    part = get_target(name)
    assert part.summary and part.takes and all(row.source and row.runtime and row.form for row in part.takes)
    for option in part.options:
        assert get_target(f"{name}:{option}").option == option


def test_the_command_line(tmp_path: Path) -> None:
    """Quantized for a target and exported to it, without saying it twice; one JSON object; the tokenizer goes along."""
    text, out = save_text(tmp_path / "text.txt"), tmp_path / "q"
    common = ["--data", str(text), "--seq-len", "32", "--samples", "4"]
    made = ["quantize", str(model()), str(out), "--recipe", "gptq", "--weights", "nvfp4", *common]
    assert run([*made, "--target", "compressed-tensors"], tmp_path / "e0")[0] == 0
    code, printed, said = run(["export", str(out), str(tmp_path / "d"), "--check", "--json"], tmp_path / "e1")
    assert code == 0, said
    found = json.loads(printed)
    assert found["target"] == "compressed-tensors" and found["check"]["weights"] == 14 and found["notes"] == []
    assert {"tokenizer.json", "generation_config.json", "README.md"} <= {*os.listdir(tmp_path / "d")}
    assert (tmp_path / "d" / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    assert found["bytes"] == sum(p.stat().st_size for p in (tmp_path / "d").iterdir())
    assert json.loads((out / "nybble.json").read_text())["targets"] == ["compressed-tensors"]
    code, printed, said = run(["export", str(out), str(tmp_path / "d2"), "--check"], tmp_path / "e2")
    assert code == 0 and "14 weights equal to the last bit in float32" in printed and "0.9.0" in printed
    code, _, said = run(["export", str(out), str(tmp_path / "d"), "--target", "dense"], tmp_path / "e3")
    assert code == 1 and "exists already" in said
    code, _, said = run(["export", str(out), str(tmp_path / "x"), "--target", "vllm"], tmp_path / "e4")
    assert code == 2 and "unknown export target 'vllm'" in said
    code, _, said = run(["export", str(model()), str(tmp_path / "x"), "--target", "dense"], tmp_path / "e5")
    assert code == 1 and "not a model that nybble wrote" in said
    assert not (tmp_path / "x").exists()


def test_python(tmp_path: Path) -> None:
    """The room of targets and the function have one name, whatever is imported first."""
    found = nybble.export(quantized(weights="int8 channel"), tmp_path / "d", "dense")
    assert found["target"] == "dense" and callable(nybble.export)
    with pytest.raises(SchemeError, match=r"compressed-tensors can't hold .*it takes nvfp4 or mxfp4"):
        nybble.quantize(str(model()), "rtn", weights="float4_e2m1fn group=32", target="compressed-tensors")


def test_a_scheme_is_kept_to_what_a_target_holds(tmp_path: Path) -> None:
    """In memory too: scales in the model's dtype, powers of two above them, one above siblings."""
    nybble.quantize(
        str(model()), "rtn", out=tmp_path / "q", weights="int4 group=16", target=["compressed-tensors", "dense"]
    )
    rules = json.loads((tmp_path / "q" / "nybble.json").read_text())["recipe"]["scheme"]["rules"]
    assert rules[0]["weights"] == "int4 group=16 scale_format=bfloat16"
    quantized_model, _ = nybble.quantize(str(model()), "rtn", weights="nvfp4", target="compressed-tensors")
    nybble.save(quantized_model, tmp_path / "saved")
    found = nybble.export(tmp_path / "saved", tmp_path / "d", check=True)
    assert found["target"] == "compressed-tensors" and found["check"]["exact_in"] == "float32"


def test_what_is_damaged_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    shutil.copytree(quantized(weights="int8 channel"), tmp_path / "q")
    weights = tmp_path / "q" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for target in REGISTRY.names():
        with pytest.raises(FileError, match=r"model\.safetensors"):
            nybble.export(tmp_path / "q", tmp_path / "d", target)
    assert sorted(os.listdir(tmp_path)) == ["q"]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with pytest.raises(FileError, match="bytes are needed but 1,000 are free"):
        nybble.export(quantized(weights="int8 channel"), tmp_path / "d", "dense")
    assert not list(tmp_path.iterdir())
