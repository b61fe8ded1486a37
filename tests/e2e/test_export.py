"""``nybble export`` and ``nybble quantize --target`` as they are typed; bad requests leave nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.processes import start
from tests.parts.export.folders import model, quantized, text
from tests.parts.models.test_gguf_writer import tokenizer_of
from tests.tiny import save_text, save_tiny

import nybble
from nybble.core import files
from nybble.core.errors import FileError, GranularityError, ModelError, SchemeError, UsageError
from nybble.export import REGISTRY, _mlx_verify, get_target
from nybble.models.sources.folder import FolderSource
from nybble.pipelines.export import export
from nybble.pipelines.quantize import preflight, quantize
from nybble.pipelines.request import build_recipe
from nybble.pipelines.targets import meant, split_targets
from nybble.quantizer import Quantizer
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


USUAL = {
    "compressed-tensors": "int4 group=64 pad=true symmetric=false",
    "dense": "int4 group=64 pad=true symmetric=false",
    "gguf": "int4 group=64 pad=true symmetric=false",  # the type behind the colon says what it becomes
    "mlx": "int4 group=64 pad=true symmetric=false",
    "modelopt": "nvfp4",
    "modelopt-nvfp4": "nvfp4",
    "onnx": "int4 group=64 pad=true symmetric=false",
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose tokenizer every target takes."""
    folder = tmp_path_factory.mktemp("wide")
    save_tiny(folder, num_hidden_layers=1, hidden_size=128, intermediate_size=256, vocab_size=264)
    tokenizer_of(size=264).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", REGISTRY.names())
def test_a_target_alone_gets_what_it_takes(name: str, wide: str) -> None:
    """By the recipe best; a scheme that is given stays, and so does a recipe."""
    rule = build_recipe("best", target=name).scheme.rules[0]
    assert (str(rule.weights), rule.inputs) == (str(Quantizer(USUAL[name])), None)
    settings = {"samples": 2, "seq_len": 8}
    if name == "onnx":
        with pytest.raises(ModelError, match=r"target onnx can't hold a LlamaForCausalLM, .* language models go to"):
            preflight(wide, "best", text(), target=name, effort="quick", settings=settings)
    else:
        assert preflight(wide, "best", text(), target=name, effort="quick", settings=settings)
    own = build_recipe("best", target=name, weights="int8 channel")
    assert str(own.scheme.rules[0].weights) == "int8 channel" and own.name == "best-w4a16"
    assert build_recipe("gptq", target=name) == build_recipe("gptq")
    assert build_recipe("best", target=[name, "nvfp4"]).name == "best-nvfp4"


def test_and_its_files_are_those(wide: str, tmp_path: Path) -> None:
    settings = {"samples": 2, "seq_len": 8}
    asked: dict[str, Any] = {"effort": "quick", "settings": settings}
    quantize(wide, "best", text(), out=tmp_path / "q", target=["modelopt-nvfp4"], **asked)
    export(tmp_path / "q", tmp_path / "d")
    said = json.loads((tmp_path / "d" / "hf_quant_config.json").read_text())
    assert said["quantization"]["quant_algo"] == "W4A16_NVFP4"
    assert meant("best", {"target": "gguf"}).files == ("gguf:q4_k_m",)
    assert meant("best", {"target": "gguf", "weights": "q4_0"}).files == ("gguf",)


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({"target": "mlx"}, r"--weights 'int4 group=64 pad=true symmetric=false' --activations none"),
        ({"target": "modelopt-nvfp4"}, "--weights 'nvfp4' --activations none"),
        ({"target": "gguf"}, "--target gguf:q4_k_m takes any weights, with --activations none"),
        ({"target": "mlx", "scheme": "NVFP4"}, "keep no quantizer of activations; pass --activations none"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(asked: dict[str, Any], options: str, wide: str) -> None:
    with pytest.raises(SchemeError, match=options) as refused:
        preflight(wide, "gptq", text(), settings={"samples": 2, "seq_len": 8}, **asked)
    if "--weights" in options:  # and these do
        line = re.search(r"--weights '([^']+)' --activations none", str(refused.value))
        assert line is not None
        again = {"target": asked["target"], "weights": line[1], "activations": "none"}
        assert preflight(wide, "gptq", text(), settings={"samples": 2, "seq_len": 8}, **again)


#: scheme -> what refusals name, by target; one that takes it is left out
BAD: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"weights": "int4 group=48"}, dict.fromkeys(
        ("compressed-tensors", "modelopt", "modelopt-nvfp4", "gguf", "mlx"), "128 columns, and group=48 .*16, 32, 64")),
    ({"weights": "float4_e2m1fn group=32"}, {
        "compressed-tensors": "takes nvfp4 or mxfp4", "modelopt": "takes nvfp4", "modelopt-nvfp4": "takes nvfp4",
        "gguf": "a line of GGUF's own", "mlx": "takes mxfp4, or nvfp4"}),
    ({"weights": "float8_e5m2 channel"}, {
        "compressed-tensors": "takes float8_e4m3fn channel", "modelopt": "float8_e4m3fn tensor", "gguf": "GGUF's own",
        "mlx": "takes mxfp8"}),
    ({"weights": "int8 channel", "matmuls": "int8 tensor"}, {
        "compressed-tensors": "--matmuls left out", "modelopt": "--matmuls left out", "mlx": "leave --matmuls out"}),
    ({"weights": "int8 channel", "kv": "int4 group=16"}, {
        "modelopt": "takes float8_e4m3fn tensor static, or"}),
    ({"weights": "nvfp4", "activations": "nvfp4"}, {
        "gguf": "--activations none", "mlx": "--activations none"}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_schemes_are_refused_before_the_work(number: int, wide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the layer, or the cache, and the nearest that the target takes; no weight is read."""
    monkeypatch.setattr(FolderSource, "load", None)
    asked, refusals = BAD[number]
    for target, nearest in refusals.items():
        with pytest.raises((SchemeError, GranularityError), match=rf"(?s)(self_attn|KV cache).*{nearest}"):
            quantize(wide, "rtn", text(), target=target, settings={"samples": 2, "seq_len": 8}, **asked)


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


@pytest.mark.parametrize(
    ("target", "check", "line"),
    [("mlx", True, "pip install mlx mlx-lm"), ("onnx", False, r"pip install 'nybble\[onnx\]'")],
)
@pytest.mark.parametrize("command", [export, nybble.convert])
def test_a_missing_library_is_named_before_anything_is_written(
    target: str, check: bool, line: str, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    _mlx_verify.library.cache_clear()
    monkeypatch.setattr(_mlx_verify, "version", missing)
    monkeypatch.setattr("nybble.export.onnx.find_spec", lambda name: None)
    monkeypatch.setattr(REGISTRY.get(target), "write", None)
    family = "bert" if target == "onnx" else "llama"
    with pytest.raises(UsageError, match=line):
        command(quantized(family, weights="int4 group=32"), tmp_path / "d", target, check=check)
    assert not list(tmp_path.iterdir())
    _mlx_verify.library.cache_clear()
