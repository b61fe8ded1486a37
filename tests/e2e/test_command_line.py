"""What a newcomer types first: help, versions, dry runs, mistakes; and that none of it waits for torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import save_text, save_tiny, tiny_tokenizer
from transformers import BertConfig, BertModel

from nybble.cli import main
from nybble.cli.recipes import grouped, listed
from nybble.core.versions import VERSION
from nybble.formats import get_format
from nybble.pipelines.matrix import legal_combinations
from nybble.pipelines.quantize import quantize

FOUND = """
import sys
from nybble.cli import main
from nybble.cli.recipes import grouped, listed
sys.argv = ["nybble", *{arguments!r}]
try:
    main()
except SystemExit as stop:
    print(stop.code or 0, {{"torch", "numpy", "transformers", "yaml"}} & set(sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["quantize", "--help"], 0),
        (["quantise"], 2),
        (["quantize", "demo:smollm2", "out", "--recipe", "gtpq"], 2),
        (["quantize", "demo:smollm2", "out", "--recipe", "no.yaml"], 2),
        (["quantize", "./nosuch", "out", "--recipe", "rtn"], 1),
        (["quantize", "demo:smollm2", "/", "--recipe", "rtn"], 1),
        (["quantize", "demo:smollm2", "out.gguf", "--recipe", "rtn"], 2),
        (["quantize", "demo:smollm2", "out", "--recipe", "rtn", "--eval", "nosuch.txt"], 1),
        (["quantize", "demo:smollm2", "out", "--recipe", "gptq", "--data", "nosuch.jsonl", "--json"], 1),
        (["eval", "demo:smollm2", "--data", "no/such.txt"], 1),
        (["eval", "demo:smollm2", "--metrics", "ppl,kl"], 2),
        (["generate", "no.gguf", "hello"], 1),
        (["inspect", "nosuch"], 1),
        (["recipes", "gtpq"], 2),
        (["recipes", "qat", "--matrix"], 2),
        (["train", "no.yaml", "demo:smollm2", "out"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_answers_that_wait_for_nothing(arguments: list[str], code: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FOUND.format(arguments=arguments)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stderr.splitlines()[-1] == f"{code} set()"
    assert list(tmp_path.iterdir()) == [] and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "model")
    save_text(folder / "text.txt", 300)
    (folder / "short.txt").write_text("ba be")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    return folder


@pytest.fixture
def nybble(nybble_command: Any) -> Any:
    return nybble_command


def test_the_version(nybble: Any) -> None:
    assert nybble("--version")[:2] == (0, f"nybble {VERSION}\n")


def test_a_dry_run_checks_all_and_writes_nothing(place: Path, tmp_path: Path, nybble: Any) -> None:
    asked = ["quantize", place / "model", tmp_path / "out", "--recipe", "gptq", "--data", place / "text.txt"]
    asked += ["--seq-len", "16", "--weights", "int4 group=16", "--dry-run"]
    code, out, _ = nybble(*asked)
    assert code == 0 and out.startswith("14 weights in 2 blocks") and "calibration 18 x 16 tokens" in out
    known = re.search(r"about 0\.\d\d GB of memory above the (\d+\.\d\d) GB in use now, ", out)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert known and float(known[1]) * 1e9 == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), rel=0.2)
    code, out, _ = nybble(*asked, "--json")
    assert code == 0 and json.loads(out)["preflight"][0].startswith("14 weights in 2 blocks")
    assert nybble(*asked, "--weights", "int4 group=7")[0] == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("held_out", "says"),
    [("short.txt", "fewer than one sequence"), ("latin.txt", "not UTF-8"), ("", "name is empty")],
)
def test_held_out_text_is_read_before_the_work(
    place: Path, tmp_path: Path, nybble: Any, held_out: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.pipelines.quantize.Walk", None)  # any work would fail
    text = str(place / held_out) if held_out else ""
    code, out, err = nybble(
        *("quantize", place / "model", tmp_path / "out", "--recipe", "rtn", "--weights", "int4 group=16"),
        *("--eval", text, "--seq-len", "16", "--json"),
    )
    assert code in (1, 2) and says in json.loads(out)["error"]["message"] and says in err
    assert list(tmp_path.iterdir()) == []


def test_metrics_that_compare_are_refused_before_a_model_is_read(
    place: Path, nybble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.pipelines.evaluate.load_with_origin", None)
    for metric in ("kl", "agreement", "cosine"):
        code, _, err = nybble("eval", place / "model", "--metrics", f"{metric}")
        assert code == 2 and f"metric '{metric}' compares with the float model; give it (--reference MODEL)" in err


def test_what_a_kind_of_model_is_not_judged_by_is_refused_before_it_is_read(
    place: Path, tmp_path: Path, nybble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a float folder and a quantized one: the class is known from config.json."""
    model, encoder, packed = place / "model", tmp_path / "bert", tmp_path / "packed"
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=64, num_hidden_layers=1, **sizes)).save_pretrained(encoder)
    tiny_tokenizer().save_pretrained(encoder)
    assert nybble("quantize", encoder, packed, "--recipe", "rtn", "--weights", "int8 channel")[0] == 0
    monkeypatch.setattr("nybble.pipelines.evaluate.load_with_origin", None)
    compare = "a model of sentences is judged by cosine, kl, agreement, which compare with the float model"
    for arguments, said in {
        (encoder,): compare,
        (packed,): compare,
        (packed, "--metrics", "ppl"): "a model of sentences is judged by cosine, kl, agreement; not by ppl",
        (model, "--metrics", "top1"): "a model of tokens is judged by agreement, kl, nll, ppl; not by top1",
        (model, "--metrics", "pl"): "unknown metric 'pl'. Did you mean 'ppl'?",
        (model, "--seq-len", "0"): "seq_len is 0; it must be 1 or more",
        (model, "--data", place / "short.txt"): "fewer than one sequence",
    }.items():
        code, _, err = nybble("eval", *arguments)
        assert code in (1, 2) and said in err, arguments


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        (["quantize", "demo:smollm2", "out", "--recipe", "gtpq"], "UsageError", 2),
        (["quantize", "demo:smollm2", "--nosuch"], "UsageError", 2),
        (["formats", "int9"], "FormatError", 2),
        (["inspect", "nosuch"], "FileError", 1),
    ],
)
def test_an_error_is_one_object_under_json(arguments: list[str], kind: str, code: int, nybble: Any) -> None:
    found, out, err = nybble(*arguments, "--json")
    error = json.loads(out)["error"]
    assert found == code and error["type"] == kind and error["exit_code"] == code and error["message"] in err


def test_a_bug_is_an_object_too_and_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "nybble"}}')
    monkeypatch.setattr("nybble.checkpoint.account.inspect", lambda out: 1 / 0)
    monkeypatch.setattr("sys.argv", ["nybble", "inspect", str(tmp_path), "--json"])
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)  # main() has its own
    with pytest.raises(ZeroDivisionError):
        main()
    error = json.loads(capfd.readouterr().out)["error"]
    assert error == {"type": "ZeroDivisionError", "message": "division by zero", "exit_code": 1}


@pytest.mark.parametrize("option", ["weights", "activations", "scheme", "embeddings", "matmuls", "kv"])
def test_an_empty_option_is_not_the_default(option: str, place: Path, tmp_path: Path, nybble: Any) -> None:
    code, _, err = nybble("quantize", place / "model", tmp_path / "out", "--recipe", "rtn", f"--{option}", "")
    assert code == 2 and ("empty quantizer line" in err or "unknown scheme ''" in err)


def test_warnings_are_a_line_as_errors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)
    monkeypatch.setattr("sys.argv", ["nybble", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert warnings.formatwarning("is left out", UserWarning, "x.py", 3) == "nybble: warning: is left out\n"


def test_a_kv_cache_is_kept(place: Path, tmp_path: Path, nybble: Any) -> None:
    """--kv is served: recorded in the folder, and used by generate."""
    asked = ["quantize", place / "model", tmp_path / "out", "--recipe", "rtn", "--weights", "int4 group=16"]
    code, _, err = nybble(*asked, "--kv", "int4 group=8")
    assert code == 0 and "transformers caches in float" in err
    form = json.loads((tmp_path / "out" / "nybble.json").read_text())["form"]
    assert form["quantization"]["kv"] == "int4 group=8"
    assert nybble("generate", tmp_path / "out", "ba be bi", "--max-new-tokens", "2")[0] == 0


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("bf16", "float16_e8m7"), ("bfloat16", "float16_e8m7"), ("fp16", "float16_e5m10"), ("half", "float16_e5m10"),
        ("fp8", "float8_e4m3fn"), ("fp8_e5m2", "float8_e5m2"), ("fp4", "float4_e2m1fn"),
    ],
)  # fmt: skip
def test_everyday_names_of_floats(name: str, member: str, nybble: Any) -> None:
    found = json.loads(nybble("formats", name, "--json")[1])
    assert found["name"] == member and name in found["aliases"]
    assert get_format(name) == get_format(member)


def test_bfloat16_is_torchs() -> None:
    import torch

    codes = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        wanted = codes.view(dtype).double()
        assert torch.equal(torch.from_numpy(get_format(name).values.copy()).nan_to_num(7), wanted.nan_to_num(7))


def test_codes_that_are_never_stored_are_marked(nybble: Any) -> None:
    out = nybble("formats", "int4")[1]
    assert "15 values from -7 to 7" in out and "0x8 -8*" in out and "int4_full" in out
    assert json.loads(nybble("formats", "int4", "--json")[1])["unused"] == [8]
    assert "*" not in nybble("formats", "int4 symmetric=false")[1]
    assert "ternary_full" not in nybble("formats", "ternary")[1]


def test_the_matrix_says_each_reason_once() -> None:
    rows = legal_combinations(["gptq", "lorc"], ["af4", "int4", "linear8", "nf4"])
    found = grouped([row for row in rows if row["reason"]])
    assert (["shifted"], ("af4", "linear8", "nf4"), ("gptq", "lorc")) in [tuple(group[:3]) for group in found]
    assert len(found) == len({group[3] for group in found}) == 2
    assert listed(["a"] * 9, ["a"] * 10) == "a, a, a, a, a, a and 3 more" and listed(["a"], ["a"]) == "all"


def test_modules_are_a_table(place: Path, tmp_path: Path, nybble: Any) -> None:
    """Of both forms: compressed-tensors has a shape beside."""
    line = "int4 group=16 scale_format=bfloat16"
    native = {"format": line, "elements": "1,536", "bits": "5.000", "codes": "768", "scales": "192"}
    for form, wanted in (
        ("native", native),
        ("compressed-tensors", native | {"bits": "5.083", "tables": "16"}),
    ):
        quantize(place / "model", weights="int4 group=16", out=tmp_path / form, form=form)
        out = nybble("inspect", tmp_path / form, "--modules")[1]
        assert "{" not in out
        shown = out.partition("quantized weights, and")[2].splitlines()
        head, row = (line for line in shown if "elements" in line or "layers.0.mlp.up_proj" in line)
        cells = [[cell.strip() for cell in re.split("[│┃]", line)[2:-1]] for line in (head, row)]
        assert dict(zip(*cells, strict=True)) == wanted


def test_a_folder_is_not_called_like_a_file(place: Path, tmp_path: Path) -> None:
    from nybble.core.errors import UsageError

    for name in ("x.gguf", "x.safetensors", "X.GGUF"):
        with pytest.raises(UsageError, match="would be a folder with the name of a"):
            quantize(place / "model", weights="int4 group=16", out=tmp_path / name)
    quantize(place / "model", weights="int4 group=16", out=tmp_path / "llama-3.2-v1.5")
