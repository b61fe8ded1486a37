"""Each bad input gives one clear line that names the thing, what came and a way out; nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import WORDS, save_text, save_tiny, tiny_model
from transformers import PreTrainedConfig
from transformers.utils import logging

from nybble.checkpoint.parts import holds_finished
from nybble.cli import main
from nybble.core import device
from nybble.core.errors import DataError, DeviceError, FileError, ModelError, NybbleError, UsageError
from nybble.pipelines.prepared import require_training
from nybble.pipelines.quantize import quantize
from nybble.pipelines.request import build_recipe
from nybble.recipe import parse_recipe
from nybble.walk.job import Job
from nybble.walk.settings import Settings
from nybble.walk.steps.make import make_finishes

RECIPE = build_recipe("gptq", weights="int4 group=16")
GOOD = ["--weights", "int4 group=16"]
STATIC = ["--activations", "int8 tensor static"]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bad")
    save_tiny(made / "model", "llama")
    save_text(made / "text.txt", 400)
    (made / "empty.txt").write_text(" \n\n")
    (made / "short.txt").write_text(" ".join(WORDS[3:10]))
    (made / "latin.txt").write_bytes(b"caf\xe9 ba be")
    (made / "list.yaml").write_text("- a\n- b\n")
    (made / "broken.yaml").write_text("scheme: {weights: [\n")
    (made / "latin.yaml").write_bytes(b"name: caf\xe9")
    for name, text in RECIPE_FILES.items():
        (made / f"{name}.yaml").write_text(text)
    return made


RECIPE_FILES = {
    "unknown-key": "scheme: {weights: int4}\nsteps: [{solver: rtn}]\nstep: 1\n",
    "no-scheme": "steps: [{solver: rtn}]\n",
    "steps-number": "scheme: {weights: int4}\nsteps: 5\n",
    "step-text": "scheme: {weights: int4}\nsteps: [rtn]\n",
    "step-kind": "scheme: {weights: int4}\nsteps: [{sovler: rtn}]\n",
    "two-steps": "scheme: {weights: int4}\nsteps: [{solver: rtn}, {solver: gptq}]\n",
    "scheme-number": "scheme: 5\nsteps: [{solver: rtn}]\n",
    "scheme-key": "scheme: {weight: int4}\nsteps: [{solver: rtn}]\n",
    "rules-number": "scheme: {rules: [5]}\nsteps: [{solver: rtn}]\n",
    "targets-text": "scheme: {weights: int4, targets: Linear}\nsteps: [{solver: rtn}]\n",
    "targets-number": "scheme: {weights: int4, targets: 5}\nsteps: [{solver: rtn}]\n",
    "weights-number": "scheme: {weights: 4}\nsteps: [{solver: rtn}]\n",
    "weights-nothing": "scheme: {targets: [Linear]}\nsteps: [{solver: rtn}]\n",
    "outputs-static": "scheme: {outputs: int8 tensor static}\nsteps: [{solver: rtn}]\n",
    "option": "scheme: {weights: int4}\nsteps: [{solver: gptq, dampning: 0.1}]\n",
    "option-type": "scheme: {weights: int4}\nsteps: [{solver: gptq, block: big}]\n",
    "solver": "scheme: {weights: int4}\nsteps: [{solver: gtpq}]\n",
    "preset": "scheme: {preset: W4A61}\nsteps: [{solver: rtn}]\n",
}


class Run(NamedTuple):
    """What a command did."""

    code: Any
    out: str
    err: str


class Usage(NamedTuple):
    """As shutil.disk_usage says it."""

    total: int
    used: int
    free: int


@pytest.fixture
def nybble(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Run a command line in this process."""

    def run(*arguments: object) -> Run:
        monkeypatch.setattr("sys.argv", ["nybble", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        output, errors = capfd.readouterr()
        return Run(stop.value.code or 0, output, errors)

    return run


# What is wrong -> options after `nybble quantize MODEL OUT`, exit code, what the message says.
REQUESTS: dict[str, tuple[list[str], int, str]] = {
    "recipe": (["--recipe", "gtpq"], 2, r"unknown recipe 'gtpq'\. Did you mean 'gptq'\? `nybble recipes` lists them\."),
    "format": (["--weights", "int4g"], 2, r"unknown format or preset 'int4g'\. Did you mean 'int4'\?"),
    "format nothing like it": (["--weights", "zzz"], 2, r"unknown format or preset 'zzz'.*`nybble formats` lists them"),
    "scheme": (["--scheme", "W4A15"], 2, r"unknown scheme 'W4A15'\. Did you mean 'W4A16'\?"),
    "scheme bits": (["--scheme", "W4A4_E2M5"], 2, r"E2M5 has 8 bits, the name says 4"),
    "scheme twice": (["--scheme", "W4A16", *GOOD], 2, r"--scheme says everything; give either it or --weights"),
    "word": (["--weights", "int4 gruop=4"], 2, r"unknown word 'gruop'\. Did you mean 'group'\?"),
    "group": (["--weights", "int4 group=x"], 2, r"group=x is not a size\. Examples: group=32"),
    "zero group": (["--weights", "int4 group=0"], 2, r"a group needs at least one element"),
    "rule": (["--weights", "int4 scale=absmx"], 2, r"'absmx'\. Did you mean 'absmax'\?"),
    "rounding": (["--weights", "int4 rounding=nearest-evn"], 2, r"Did you mean 'nearest-even'\?"),
    "parentheses": (["--weights", "nf4 scale_format=(e4m3"], 2, r"unbalanced parentheses"),
    "int1": (["--weights", "int1"], 2, r"int1 has only the value 0 when symmetric\. Use 'binary'"),
    "int9": (["--weights", "int9"], 2, r"integers have 1 to 8 bits; got 9"),
    "unsigned": (["--weights", "uint4 group=16"], 2, r"weights are signed and uint4 is not; add symmetric=false"),
    "static weights": (["--weights", "int4 static"], 2, r"'static' is for activations"),
    "static tokens": ([*GOOD, "--activations", "int8 token static"], 2, r"have one float32 scale.*leave out 'static'"),
    "columns": (
        ["--weights", "int4 group=32"], 2,
        r"model\.layers\.0\.mlp\.down_proj: 48 columns, and group=32 does not divide them\. Sizes that do: 16, 48\. "
        r"Or 'pad=true' for a shorter last group, or 'channel'",
    ),
    "scales of columns": (
        ["--weights", "int4 group=16 scale_format=(uint6 group=2 scale=least-squares)"], 2,
        r"down_proj: scale_format=\(uint6 group=2 scale=least-squares.*the scales are a matrix of 3 columns, and "
        r"group=2 does not divide them\. Sizes that do: 1, 3\. Or 'pad=true'",
    ),
    "columns of inputs": ([*GOOD, "--activations", "mxfp4"], 2, r"down_proj: activations: 48 columns, and group=32"),
    "rows": (["--weights", "int4 block=5x16"], 2, r"32 rows, and block=5x16 does not divide them"),
    "nothing left": (["--weights", "none"], 2, r"nothing is left to quantize"),
    "ignore": ([*GOOD, "--ignore", "q_porj"], 2, r"the ignore pattern 'q_porj' matches no module\."),
    "ignore close": ([*GOOD, "--ignore", "lm_haed"], 2, r"Did you mean 'lm_head'"),
    "ignore re": ([*GOOD, "--ignore", "re:.*nothing"], 2, r"nothing' matches no module\. (Known|Some)"),
    "ignore bad re": ([*GOOD, "--ignore", "re:("], 2, r"'re:\(' is not a regular"),
    "ignore all": ([*GOOD, "--ignore", "Linear"], 2, r"the target 'Linear' matches no module that is left to it"),
    "kv": ([*GOOD, "--kv", "int4"], 2, r"'tensor' has scales that tokens share.*Write 'int4 token'"),
    "effort word": (["--effort", "much"], 2, r"effort 'much' is neither quick nor full"),
    "samples": ([*GOOD, "--samples", "0"], 2, r"samples is 0; it must be 1 or more"),
    "batch": ([*GOOD, "--batch", "-1"], 2, r"batch is -1; it must be 1 or more"),
    "sequence": ([*GOOD, "--seq-len", "1"], 2, r"a sequence length of 1 leaves no token to predict"),
    "many samples": ([*GOOD, "--samples", "99"], 1, r"has 25 sequences of 16 tokens, fewer than the 99 asked for"),
    "long sequences": ([*GOOD, "--seq-len", "65"], 1, r"sequences of 65 tokens, and the model takes 64; give"),
    "no cuda": ([*GOOD, "--device", "cuda"], 1, r"no CUDA device is available.*use --device cpu"),
    "device": ([*GOOD, "--device", "tpu"], 2, r"device 'tpu' is neither cpu nor cuda"),
    "data": ([*GOOD, "--data", "FOLDER/no.txt"], 1, r"no\.txt' does not exist\. Give a path that does, or 'builtin'"),
    "empty text": ([*GOOD, "--data", "FOLDER/empty.txt"], 1, r"empty\.txt' holds no text: every document is empty"),
    "short text": ([*GOOD, "--data", "FOLDER/short.txt"], 1, r"has 7 tokens, fewer than one sequence of 16"),
    "latin text": ([*GOOD, "--data", "FOLDER/latin.txt"], 1, r"is not UTF-8: byte 0xe9 at offset 3 \(line 1\)"),
    "recipe file": (["--recipe", "FOLDER/no.yaml"], 2, r"no recipe file .*no\.yaml"),
    "scheme file": (["--scheme", "FOLDER/no.yaml"], 2, r"no scheme file .*no\.yaml"),
    "scheme list": (["--scheme", "FOLDER/list.yaml"], 2, r"list\.yaml: a scheme is .* or a mapping; got \['a', 'b'\]"),
    "scheme yaml": (["--scheme", "FOLDER/broken.yaml"], 2, r"broken\.yaml is not valid YAML"),
    "recipe list": (["--recipe", "FOLDER/list.yaml"], 2, r"list\.yaml: a recipe is a mapping .*; got list"),
    "recipe yaml": (["--recipe", "FOLDER/broken.yaml"], 2, r"broken\.yaml is not valid YAML"),
    "recipe latin": (["--recipe", "FOLDER/latin.yaml"], 2, r"latin\.yaml can't be read: .*utf-8"),
    "recipe key": (["--recipe", "FOLDER/unknown-key.yaml"], 2, r"a recipe has no key 'step'\. Did you mean 'steps'"),
    "recipe scheme lacks": (["--recipe", "FOLDER/no-scheme.yaml"], 2, r"the recipe lacks a scheme: a preset's name"),
    "recipe steps type": (["--recipe", "FOLDER/steps-number.yaml"], 2, r"steps is a list of mappings; got 5"),
    "recipe step text": (["--recipe", "FOLDER/step-text.yaml"], 2, r"exactly one of train, transform, .*; got 'rtn'"),
    "recipe step kind": (["--recipe", "FOLDER/step-kind.yaml"], 2, r"solver, .*; got \{'sovler': 'rtn'\}"),
    "recipe two": (["--recipe", "FOLDER/two-steps.yaml"], 2, r"'gptq' can't come after solver 'rtn': .*keep one"),
    "recipe scheme": (["--recipe", "FOLDER/scheme-number.yaml"], 2, r"scheme-number\.yaml: a scheme is .*; got 5"),
    "recipe scheme key": (["--recipe", "FOLDER/scheme-key.yaml"], 2, r"has no key 'weight'\. Did you mean 'weights'"),
    "recipe rules": (["--recipe", "FOLDER/rules-number.yaml"], 2, r"rules is a list of mappings; got \[5\]"),
    "recipe targets": (["--recipe", "FOLDER/targets-text.yaml"], 2, r"targets is a list of names; got 'Linear'"),
    "recipe targets type": (["--recipe", "FOLDER/targets-number.yaml"], 2, r"targets is a list of names; got 5"),
    "recipe weights": (["--recipe", "FOLDER/weights-number.yaml"], 2, r"weights is a quantizer line such as .*; got 4"),
    "recipe nothing": (["--recipe", "FOLDER/weights-nothing.yaml"], 2, r"inputs, outputs, matmuls or kv does nothing"),
    "recipe outputs": (["--recipe", "FOLDER/outputs-static.yaml"], 2, r"outputs are quantized dynamically"),
    "recipe option": (["--recipe", "FOLDER/option.yaml"], 2, r"no option 'dampning'\. Did you mean 'damping'"),
    "recipe option type": (["--recipe", "FOLDER/option-type.yaml"], 2, r"block is an int; got 'big'"),
    "recipe solver": (["--recipe", "FOLDER/solver.yaml"], 2, r"unknown solver 'gtpq'\. Did you mean 'gptq'"),
    "recipe preset": (["--recipe", "FOLDER/preset.yaml"], 2, r"unknown scheme 'W4A61'\. Did you mean 'W4A16'"),
}  # fmt: skip


@pytest.mark.parametrize("what", REQUESTS)
def test_requests(folder: Path, tmp_path: Path, nybble: Callable[..., Run], what: str) -> None:
    options, code, message = REQUESTS[what]
    options = [option.replace("FOLDER", str(folder)) for option in options]
    usual = {"--recipe": "gptq", "--data": str(folder / "text.txt"), "--seq-len": "16"}
    rest = [item for pair in usual.items() if pair[0] not in options for item in pair]
    run = nybble("quantize", folder / "model", tmp_path / "out", *options, *rest, "--json")
    assert run.code == code, run.err
    assert re.search(message, run.err), run.err
    check_line(run)
    assert os.listdir(tmp_path) == []


def check_line(run: Run) -> None:
    """One line after the pre-flight lines, no traceback; on standard output nothing, or with --json the same again."""
    lines = run.err.strip().splitlines()
    wrong = [number for number, line in enumerate(lines) if line.startswith("nybble: ")]
    assert wrong[0] >= len(lines) - 5 and "Traceback" not in run.err
    assert len(lines[wrong[0]]) < 700
    if run.out:
        error = json.loads(run.out)["error"]
        assert error["exit_code"] == run.code and error["type"].endswith("Error")
        assert run.err.strip().endswith(f"nybble: {error['message']}".strip())


def test_usage_errors_of_the_parser(folder: Path, tmp_path: Path, nybble: Callable[..., Run]) -> None:
    out = tmp_path / "out"
    for arguments, message in (
        (["quantize", folder / "model"], "OUT"),
        (["quantize", folder / "model", out, "--recipe", "rtn", "--weights", "int4 group=64"], "does not divide them"),
        (["quantize"], "MODEL"),
        (["quantise"], "quantise"),
        (["quantize", folder / "model", out, "--recipe", "rtn", "--grup", "4"], "--grup"),
        (["quantize", folder / "model", out, "--recipe", "rtn", "--samples", "many"], "--samples"),
        (["formats", "--values"], "--values"),
    ):
        run = nybble(*arguments)
        assert run.code == 2 and message in run.err and run.out == ""
        assert "Traceback" not in run.err


def test_other_commands(folder: Path, tmp_path: Path, nybble: Callable[..., Run]) -> None:
    model, text = folder / "model", ["--data", folder / "text.txt", "--seq-len", "16"]
    for arguments, code, message in (
        (["eval", model, *text, "--metrics", "pppl"], 2, r"unknown metric 'pppl'\. Did you mean 'ppl'"),
        (["eval", model, *text, "--metrics", "kl"], 2, r"'kl' compares with the float model"),
        (["eval", model, *text, "--device", "cuda"], 1, r"no CUDA device"),
        (["eval", model, "--data", folder / "text.txt"], 1, r"sequences of 512 tokens|fewer than one sequence of 512"),
        (["eval", tmp_path / "no" / "model", *text], 1, r"no/model"),
        (["eval", folder / "text.txt", *text], 1, r"neither a \.gguf nor a folder"),
        (["inspect", folder / "text.txt"], 1, r"neither a \.gguf nor a folder"),
        (["inspect", tmp_path / "no"], 1, r"there is no .*no\. Give a folder"),
        (["report", tmp_path / "no"], 1, r"no is not a folder"),
        (["eval", model, *text, "--metrics", ""], 2, r"no metric is named; there are agreement"),
        (["eval", "", *text], 2, r"the model's name is empty"),
        (["eval", model, "--data", tmp_path / "no.txt"], 1, r"no\.txt' does not exist"),
        (["formats", "fp6"], 2, r"Did you mean 'float6_e2m3fn' or 'float6_e3m2fn'"),
        (["formats", "mxfp"], 2, r"Did you mean 'mxfp8'"),
        (["formats", "float32"], 2, r"what tensors are without quantization"),
        (["generate", model, " "], 2, r"the prompt is empty"),
        (["generate", model, "ba", "--max-new-tokens", "0"], 2, r"max_new_tokens is 0"),
        (["generate", model, "ba", "--device", "cuda:7"], 1, r"no CUDA device"),
        (["formats", "int9"], 2, r"integers have 1 to 8 bits"),
        (["formats", "--plot", tmp_path / "x.png"], 2, r"--plot draws one format"),
        (["recipes", "gtpq"], 2, r"Did you mean 'gptq'"),
    ):
        run = nybble(*arguments)
        assert run.code == code, run.err
        assert re.search(message, run.err), run.err
        check_line(run)


# ------------------------------------------------------------------------------------------------------ models and data
def broken(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(folder / "model", to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def run_quantize(model: Path, folder: Path, out: Path, **options: Any) -> None:
    settings = Settings(seq_len=16, batch=4, **options.pop("settings", {}))
    quantize(model, options.pop("recipe", RECIPE), str(folder / "text.txt"), out=out, settings=settings, **options)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_weights_that_are_not_finite(folder: Path, tmp_path: Path, name: str, value: float, recipe: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    model = broken(folder, tmp_path / "model", change)
    with pytest.raises(DataError, match=f"{name} holds 1 NaN or Inf among .* values; repair the model file"):
        run_quantize(model, folder, tmp_path / "out", recipe=build_recipe(recipe, weights="int4 group=16"))
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("recipe", [RECIPE, build_recipe("minmax-int")])
def test_calibration_that_overflows(folder: Path, tmp_path: Path, recipe: Any) -> None:
    """Finite weights, infinite activations: a norm that blows up in float16."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.input_layernorm.weight"].fill_(3e38)

    model = broken(folder, tmp_path / "model", change)
    with pytest.raises(DataError, match=r"calibration inputs of model\.layers\.1\.\S+ hold NaN or Inf"):
        run_quantize(model, folder, tmp_path / "out", recipe=recipe)
    assert os.listdir(tmp_path) == ["model"]


def test_block_outputs_that_overflow(folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"].fill_(3e38)

    model = broken(folder, tmp_path / "model", change)
    with pytest.raises(DataError, match=r"the outputs of block 0 hold NaN or Inf; try another dtype"):
        run_quantize(model, folder, tmp_path / "out")


def damage(model: Path, what: str) -> None:
    weights = model / "model.safetensors"
    data = weights.read_bytes()
    match what:
        case "truncated":
            weights.write_bytes(data[: len(data) // 2])
        case "no header":
            weights.write_bytes(b"{}")
        case "no weights":
            weights.unlink()
        case "pickle":
            weights.rename(model / "pytorch_model.bin")
        case "no config":
            (model / "config.json").unlink()
        case "config text":
            (model / "config.json").write_text("{not json")
        case "model type":
            (model / "config.json").write_text('{"model_type": "lama"}')
        case "no tokenizer":
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (model / name).unlink()
        case "quantized":
            config = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "hqq"}}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", r"model\.safetensors: not a valid safetensors file: its tensors take"),
        ("no header", r"ends before its header does .*is the download complete"),
        ("no weights", r"no \.safetensors file"),
        ("pickle", r"pytorch_model\.bin, a pickle, which can run code and is never loaded"),
        ("no config", r"config\.json is missing"),
        ("config text", r"config\.json can't be read: JSONDecodeError"),
        ("model type", r"model_type 'lama' is unknown.*Did you mean 'llama'"),
        ("no tokenizer", r"holds no tokenizer\. Put one beside the weights"),
        ("quantized", r"is already quantized \(hqq\); start from the float model"),
    ],
)
def test_models_that_cannot_be_read(
    folder: Path, tmp_path: Path, what: str, message: str, nybble: Callable[..., Run]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    damage(model, what)
    run = nybble(
        "quantize", model, tmp_path / "out", "--recipe", "gptq", *GOOD, "--data", folder / "text.txt", "--seq-len", "16"
    )
    assert run.code == 1
    assert re.search(message, run.err), run.err
    check_line(run)
    assert os.listdir(tmp_path) == ["model"]


def test_a_tied_head_cannot_be_a_target(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "scheme.yaml").write_text("{targets: [lm_head], weights: int4 channel, ignore: []}")
    with pytest.raises(UsageError, match=r"lm_head: its weight is tied to the embeddings.*Add it to ignore"):
        run_quantize(
            folder / "model", folder, tmp_path / "out", recipe=build_recipe("rtn", scheme=str(tmp_path / "scheme.yaml"))
        )


def test_a_head_of_its_own_is_quantized(folder: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama", tie_word_embeddings=False)
    (tmp_path / "scheme.yaml").write_text("{weights: int4 channel, ignore: []}")
    recipe = build_recipe("gptq", scheme=str(tmp_path / "scheme.yaml"))
    _, report = quantize(
        tmp_path / "model", recipe, str(folder / "text.txt"), out=tmp_path / "out", settings=Settings(seq_len=16)
    )
    head = report.layers[-1]
    assert head.name == "lm_head" and head.notes == ()
    assert head.error is not None and head.rtn_error is not None and head.error < head.rtn_error


def test_padded_groups_work_to_the_end(folder: Path, tmp_path: Path, nybble: Callable[..., Run]) -> None:
    out, text = tmp_path / "out", ["--data", folder / "text.txt", "--seq-len", "16"]
    run = nybble(
        "quantize", folder / "model", out, "--recipe", "gptq", "--weights", "int4 group=32 pad=true", *text, "--json"
    )
    assert run.code == 0, run.err
    result = json.loads(run.out)
    down = next(row for row in result["layers"] if row["name"] == "model.layers.0.mlp.down_proj")
    assert down["bits"] == 4 + 16 * 2 / 48  # two float16 scales for a row of 48; no padding is stored
    assert nybble("eval", out, *text, "--json").code == 0
    assert nybble("generate", out, "ba be", "--max-new-tokens", "3").code == 0


def test_the_output_exists(folder: Path, tmp_path: Path, nybble: Callable[..., Run]) -> None:
    for kind in ("folder", "file", "link"):
        out = tmp_path / kind
        if kind == "folder":
            out.mkdir()
        elif kind == "file":
            out.touch()
        else:
            out.symlink_to("nowhere")
        run = nybble("quantize", folder / "model", out, "--recipe", "rtn", *GOOD)
        assert run.code == 1 and f"{out} exists already. Remove it or choose another output folder." in run.err
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link"]


# ---------------------------------------------------------------------------------------------------- memory and disks
def test_too_little_memory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_memory", lambda: 10_000_000)
    with pytest.raises(DeviceError, match=r"about 0\.3 GB are needed on cpu and 0\.0 GB are free.*--spill.*--samples"):
        run_quantize(folder / "model", folder, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"train": "distill"}, r"With dense_gb: 0, logits_gb: 0 in the recipe it takes"),
        ({"train": "distill", "dense_gb": 0.0}, r"grows with the model, not with the samples: leave the step out"),
    ],
)  # fmt: skip
def test_too_little_memory_for_a_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: dict[str, Any], said: str
) -> None:
    """What it takes isn't the samples': says what of it may go, or that nothing may."""
    recipe = parse_recipe({"name": "x", "scheme": {"weights": "int4 channel"}, "steps": [{"solver": "rtn"}, step]})
    job = Job.make(tiny_model(), None, recipe, torch.zeros(4, 16, dtype=torch.int64), Settings(samples=4))
    asked = make_finishes(recipe)
    elements = sum(t.matrices * t.shape[0] * t.shape[1] for targets in job.plan.blocks for t in targets)
    needed = asked[0].working_bytes(elements, job.dtype)
    monkeypatch.setattr(device, "available_memory", lambda: needed - 1)
    with pytest.raises(DeviceError, match=said):
        require_training(job, asked)


def test_too_little_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10, 10, 20_000))
    with pytest.raises(FileError, match=r"out: [\d,]+ bytes are needed but 20,000 are free\. Free some space"):
        run_quantize(folder / "model", folder, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_device_that_runs_full(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr("nybble.walk.steps.solver.see_block", full)
    with pytest.raises(DeviceError, match=r"cpu ran out of memory\. Use a smaller --batch"):
        run_quantize(folder / "model", folder, tmp_path / "out")


@pytest.mark.parametrize("spill", [False, True])
def test_the_disk_runs_full(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spill: bool) -> None:
    """At each flush to the disk in turn: one clear error, no OUT; with room again, --resume gives the same bytes."""
    run_quantize(folder / "model", folder, tmp_path / "whole")
    expected = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    out, real, failures = tmp_path / "out", os.fsync, 0
    left, seen = 0, set[bool]()

    def fsync(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    for room in range(100):
        left = 3 * room if failures % 2 else 2  # every other run resumes a run that got further
        try:
            run_quantize(folder / "model", folder, out, settings={"resume": True, "spill": spill})
        except FileError as error:
            assert "the disk is full" in str(error) and "Free some space" in str(error)
            kept = holds_finished(tmp_path / "out.partial")
            assert (tmp_path / "out.partial").exists() == kept == ("; --resume goes on from there." in str(error))
            seen.add(kept)
            assert not out.exists()
            failures += 1
            continue
        break
    assert failures >= 5 and seen == {True, False}
    assert {p.name: p.read_bytes() for p in out.iterdir()} == expected
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


def test_a_spill_file_without_room(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FileError, match=r"bin\.quantized\.0\.hidden: the disk is full\. [\d,]+ bytes are needed"):
        run_quantize(folder / "model", folder, tmp_path / "out", settings={"spill": True})
    assert not list(tmp_path.iterdir())


def test_two_runs_into_one_folder(folder: Path, tmp_path: Path) -> None:
    from nybble.core.files import AtomicFolder

    with (
        AtomicFolder(tmp_path / "out", resumable=True),
        pytest.raises(FileError, match="another process is writing it"),
    ):
        run_quantize(folder / "model", folder, tmp_path / "out")


# ------------------------------------------------------------------------------------------------- in Python, and JSON
def test_requests_from_python(folder: Path, tmp_path: Path) -> None:
    from tests.tiny import tiny_model

    with pytest.raises(UsageError, match="has no tokenizer here; give tokenizer="):
        quantize(tiny_model(), RECIPE)
    with pytest.raises(UsageError, match=r"quantized in memory; save it with nybble\.save"):
        quantize(tiny_model(), RECIPE, out=tmp_path / "out")
    model: Any = torch.nn.Sequential(torch.nn.Linear(16, 16))
    assert len(quantize(model, build_recipe("rtn", weights="int4"))[1].layers) == 1  # a plain network is one block
    model = torch.nn.Sequential(torch.nn.Conv3d(2, 2, 1), torch.nn.Linear(1, 1))
    model.config = PreTrainedConfig()
    with pytest.raises(ModelError, match=r"Sequential multiplies in layers of its own \(Conv3d\)"):
        quantize(model, build_recipe("rtn", weights="int4"))
    changed, report = quantize(tiny_model(), build_recipe("rtn", weights="int4 group=16"))
    assert len(report.layers) == 14
    with pytest.raises(UsageError, match="matches no module that is left to it"):
        quantize(changed, build_recipe("rtn", weights="int4 group=16"))
    with pytest.raises(UsageError, match="nothing in this model is quantized"):
        from nybble import save

        save(tiny_model(), tmp_path / "out")


def test_samples_left_out_takes_what_there_is(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    run_quantize(folder / "model", folder, tmp_path / "out", announce=lines.append)
    assert any("calibration 25 x 16 tokens (all that" in line for line in lines)
    with pytest.raises(NybbleError, match="fewer than the 26 asked for"):
        run_quantize(folder / "model", folder, tmp_path / "b", settings={"samples": 26})


def test_json_is_one_object(folder: Path, tmp_path: Path, nybble: Callable[..., Run]) -> None:
    text = ["--data", folder / "text.txt", "--seq-len", "16"]
    out = tmp_path / "out"
    commands: dict[str, list[object]] = {
        "quantize": [folder / "model", out, "--recipe", "gptq", *GOOD, *text, "--eval", folder / "text.txt"],
        "inspect": [out],
        "eval": [out, *text, "--metrics", "ppl,kl,agreement", "--reference", folder / "model"],
        "generate": [out, "ba be", "--max-new-tokens", "3"],
        "recipes": [],
        "formats": [],
    }
    found = {}
    for name, arguments in commands.items():
        run = nybble(name, *arguments, "--json")
        assert run.code == 0, run.err
        found[name] = json.loads(run.out)
        assert run.out.count("\n") == 1
        assert "Loading weights" not in run.err and "Warning" not in run.err
    assert found["eval"]["metrics"].keys() == {"ppl", "kl", "agreement"} and found["eval"]["tokens"] == 25 * 15
    assert found["quantize"]["evaluation"]["quantized"]["kl"] == pytest.approx(found["eval"]["metrics"]["kl"])
    assert found["quantize"]["bytes"] == found["inspect"]["total"]
    assert nybble("formats", "e2m1", "--json").code == 0
    assert nybble("recipes", "gptq", "--json").code == 0


@pytest.mark.parametrize("columns", ["40", "200"])
def test_tables_in_any_width(
    folder: Path, tmp_path: Path, nybble: Callable[..., Run], columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    run = nybble("quantize", folder / "model", tmp_path / "out", "--recipe", "rtn", *GOOD)
    assert run.code == 0 and "model.layers.1.mlp.down_proj" in run.out.replace("\n", "")
    assert "total on disk" in nybble("inspect", tmp_path / "out", "--modules").out
    for command in ("quantize", "eval", "inspect", "generate", "formats", "recipes"):
        run = nybble(command, "--help")
        assert run.code == 0 and command in run.out
