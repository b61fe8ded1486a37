"""The form of what is written: compressed-tensors' where that says all of it, bit for bit; else nybble's own."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.parts.export.folders import model, quantized, text
from tests.tiny import logits, tiny_tokenizer
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers import auto as auto_quantizers

import nybble
from nybble.checkpoint import transformers_compressed
from nybble.checkpoint.account import inspect
from nybble.checkpoint.load import described
from nybble.core import versions
from nybble.core.errors import FileError, SchemeError, UsageError
from nybble.export import _ct_library as library
from nybble.nn.kinds import describe, quant_modules
from nybble.nn.kv_model import recorded_kv
from nybble.nn.layouts import Layouts
from nybble.pipelines.evaluate import run_eval
from nybble.pipelines.export import export
from nybble.pipelines.quantize import preflight, quantize

pytest.importorskip("compressed_tensors", reason="the form of that name")

COMPRESSED = "compressed-tensors"
HELD: dict[str, dict[str, Any]] = {
    "codes that change their sign, zero points": {"weights": "uint4 group=32 symmetric=false scale_format=bfloat16"},
    "another packing": {"weights": "ternary channel packing=base3"},
    "odd bits, a tensor's zero point": {"weights": "int3 tensor symmetric=false"},
    "no scale": {"weights": "int8 channel scale=one"},
    "blocks of floats, inputs in groups": {
        "weights": "float8_e4m3fn block=16x32 scale_format=bfloat16",
        "activations": "float8_e4m3fn group=32 scale_format=float32"
    },
    "a factor of E4M3 scales, shared": {"weights": "nvfp4", "activations": "none", "target": COMPRESSED},
    "exponents, inputs, a cache": {
        "weights": "mxfp4", "activations": "mxfp4-ct", "kv": "float8_e4m3fn token", "family": "qwen3"
    },
    "calibrated inputs with a zero point": {
        "weights": "int8 channel", "activations": "uint8 tensor static symmetric=false", "calibrated": True
    },
    "a table": {
        "weights": "int4 group=16 scale_format=bfloat16", "embeddings": "int4 group=16 scale_format=bfloat16",
        "family": "mistral",
    },
    "float weights": {"weights": "none", "activations": "float8_e4m3fn token"},
    "a cache without scales": {"weights": "int4 group=16", "kv": "float8_e4m3fn tensor scale=one"},
    "a cache alone": {"weights": "none", "kv": "float8_e4m3fn token"},
}  # fmt: skip
NATIVE: dict[str, tuple[dict[str, Any], str]] = {
    "a format": ({"weights": "nf4 group=32"}, "nf4 group=32 scale_format=bfloat16; it takes int4 group=32"),
    "scales that would be wider": (
        {"weights": "int4 group=16 scale_format=float16"}, "float16 scales of a bfloat16 model in float32",
    ),
    "a divisor for each": ({"weights": "nvfp4"}, "different global scales of NVFP4"),
    "scales in eight bits": ({"weights": "mxint8"}, "scales that are quantized themselves"),
    "a rule for inputs": ({"weights": "mxfp4", "activations": "mxfp4"}, "runtimes measure inputs by their own rule"),
    "a head that reads the table": (
        {"weights": "int4 group=32", "embeddings": "int4 group=32", "family": "qwen2"}, "it would be stored twice",
    ),
    "experts": ({"weights": "int4 group=16", "family": "mixtral"}, "they would be stored apart"),
    "thin matrices": (
        {"recipe": "lorc", "weights": "int4 group=16", "calibrated": True}, "without the correction lorc",
    ),
}  # fmt: skip


def form_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "nybble.json").read_text())["form"]
    return found


def descriptions(model: Any) -> tuple[Any, ...]:
    layouts = Layouts()
    return {name: describe(m, layouts) for name, m in quant_modules(model)}, layouts.entries, recorded_kv(model)


@pytest.mark.parametrize("case", HELD)
def test_what_it_says_comes_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    """Layers, activations and cache as the native folder has them; the files as exporting that one gives them."""
    other, native = quantized(**HELD[case]), quantized(**HELD[case], form="native")
    assert form_in(other)["name"] == COMPRESSED and form_in(native) == {"name": "native"}
    ours, theirs = nybble.load(other)[0], nybble.load(native)[0]
    assert descriptions(ours) == descriptions(theirs) == descriptions(described(other))
    assert torch.equal(logits(ours), logits(theirs))
    exact = "factor" not in case  # siblings' scales were brought under one divisor: other bytes, the same values
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)) or not exact, name
    export(native, tmp_path / "d", COMPRESSED)
    for name in ("model.safetensors", "config.json"):
        assert (other / name).read_bytes() == (tmp_path / "d" / name).read_bytes()
    found = inspect(other)
    assert sum(found["bytes"].values()) == found["total"] and "unquantized" in found["bytes"]
    assert found["quantized_parameters"] == inspect(native)["quantized_parameters"]
    export(other, tmp_path / "again", COMPRESSED)  # as every target reads it
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("line", ["int4 group=16", "int4 group=16 symmetric=false"])
def test_others_load_it_as_it_is(line: str) -> None:
    """As anybody types it: zero points, which transformers can't keep packed, need no argument either."""
    folder = quantized(weights=line)
    auto: Any = AutoModelForCausalLM
    loaded = auto.from_pretrained(folder, dtype=torch.bfloat16)
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.equal(logits(loaded), logits(nybble.load(folder, dtype="bfloat16")[0]))
    card = (folder / "README.md").read_text()
    assert "vllm serve ." in card and "import nybble" not in card and line.split()[0] in card
    assert "or its id on the hub" in card and "`from_pretrained` doesn't fetch that file" in card


@pytest.mark.parametrize("form", ["compressed-tensors", "native"])
def test_from_the_hub_it_comes_without_the_manifest(form: str, tmp_path: Path) -> None:
    """As the cards of both forms say: from_pretrained fetches config and weights, and needs no more."""
    changes: dict[str, Any] = (
        {"weights": "int4 group=16"} if form == "compressed-tensors" else {"weights": "nf4 group=32"}
    )
    folder = quantized(**changes)
    assert form_in(folder)["name"] == form and "or its id on the hub" in (folder / "README.md").read_text()
    shutil.copytree(folder, tmp_path / "fetched", ignore=shutil.ignore_patterns("nybble.json", "README.md"))
    auto: Any = AutoModelForCausalLM
    fetched, whole = (auto.from_pretrained(place, dtype=torch.bfloat16) for place in (tmp_path / "fetched", folder))
    assert torch.equal(logits(fetched), logits(whole))


@pytest.mark.parametrize("case", NATIVE)
def test_the_rest_is_native_and_says_why(case: str, tmp_path: Path) -> None:
    changes, why = NATIVE[case]
    folder = quantized(**changes)
    card = (folder / "README.md").read_text()
    assert form_in(folder)["name"] == "native" and why in form_in(folder)["why"]
    assert form_in(folder)["why"] in card and "import nybble" in card
    again = nybble.save(nybble.load(folder)[0], tmp_path / "saved", tiny_tokenizer())
    assert form_in(again) == form_in(folder)
    assert torch.equal(logits(nybble.load(again)[0]), logits(nybble.load(folder)[0]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": "nf4 group=32"}, r"model\.layers\.0.*nf4 group=32.*it takes int4 group=32"),
        ({"weights": "mxint8"}, "scales that are quantized themselves"),
        (
            {"weights": "float4_e2m1fn group=16 scale_format=(float8_e4m3fn tensor scale=mse)"},
            "NVFP4 over a factor",
        ),
        ({"weights": "mxfp4", "activations": "int8 token scale=percentile"}, "measure inputs by their own rule"),
        ({"weights": "int4 group=32", "embeddings": "int4 group=32", "family": "qwen2"}, "it would be stored twice"),
        ({"weights": "int4 group=16", "family": "mixtral"}, "they would be stored apart"),
    ],
)
def test_what_the_scheme_tells_is_refused_before_any_work(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    family = changes.pop("family", "llama")
    for ask in (quantize, preflight):
        with pytest.raises(SchemeError, match=rf"{words}.*--form auto"):
            ask(str(model(family)), "rtn", out=tmp_path / "q", form=COMPRESSED, **changes)
    assert not list(tmp_path.iterdir())


def test_asked_for_the_scheme_is_kept_to_it() -> None:
    """What the usual form has to refuse: factors that differ between siblings, inputs by a rule of their own."""
    folder = quantized(weights="nvfp4", form=COMPRESSED)
    assert form_in(folder)["name"] == COMPRESSED and form_in(quantized(weights="nvfp4"))["name"] == "native"


def test_what_steps_make_of_it_is_refused_at_the_end_and_nothing_is_lost(tmp_path: Path) -> None:
    out, said = tmp_path / "q", list[str]()
    changes: dict[str, Any] = {"data": text(), "weights": "int4 group=16"}
    settings = {"seq_len": 32, "samples": 4}
    with pytest.raises(FileError, match=r"can't hold.*without the correction lorc.*--resume and --form auto"):
        quantize(str(model()), "lorc", out=out, form=COMPRESSED, settings=settings, **changes)
    assert not out.exists() and (tmp_path / "q.partial" / "parts").is_dir()
    quantize(str(model()), "lorc", out=out, settings={**settings, "resume": True}, announce=said.append, **changes)
    assert any("are done" in line for line in said) and any("written in nybble's own form: " in line for line in said)
    whole = quantized(recipe="lorc", calibrated=True, weights="int4 group=16")
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    with pytest.raises(FileError, match="can't hold"):
        nybble.save(nybble.load(out)[0], tmp_path / "saved", form=COMPRESSED)
    assert not (tmp_path / "saved").exists()


def test_a_complete_folder_has_the_form_that_it_has(tmp_path: Path) -> None:
    """Of a run that was killed before the folder was moved."""
    out = tmp_path / "q"
    shutil.copytree(quantized(weights="int4 group=16", form=COMPRESSED), tmp_path / "q.partial")
    (tmp_path / "q.partial" / "parts").mkdir()
    changes: dict[str, Any] = {"weights": "int4 group=16", "settings": {"resume": True}}
    with pytest.raises(FileError, match="complete, in the form compressed-tensors; now it is to be native"):
        quantize(str(model()), "rtn", out=out, form="native", **changes)
    quantize(str(model()), "rtn", out=out, form=COMPRESSED, **changes)
    assert form_in(out)["name"] == COMPRESSED


def test_forms_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown form 'natve'\. Did you mean 'native'"):
        quantize(str(model()), out=tmp_path / "q", form="natve")
    with pytest.raises(UsageError, match="form='native' is of files, and there is no out"):
        quantize(str(model()), form="native")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same folder, by default and asked for, and it is read again; only --check wants the package."""
    cases = ("exponents, inputs, a cache", "a cache without scales", "a table", "calibrated inputs with a zero point")
    before = {case: quantized(**HELD[case]) for case in cases}
    for name in [name for name in sys.modules if name.partition(".")[0] == "compressed_tensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)  # whoever imports it now gets an ImportError
    library.library.cache_clear()
    monkeypatch.setattr(versions, "version", _missing)
    for number, (case, folder) in enumerate(before.items()):
        changes = dict(HELD[case])
        changes |= (
            {"data": text(), "settings": {"seq_len": 32, "samples": 4}} if changes.pop("calibrated", False) else {}
        )
        out = tmp_path / str(number)
        form = COMPRESSED if number else "auto"
        quantize(str(model(changes.pop("family", "llama"))), "rtn", out=out, form=form, **changes)
        for name in ("model.safetensors", "config.json", "README.md"):
            assert (out / name).read_bytes() == (folder / name).read_bytes(), (case, name)
        assert torch.equal(logits(nybble.load(out)[0]), logits(nybble.load(folder)[0]))
        export(out, tmp_path / f"{number}-again", COMPRESSED)
        with pytest.raises(UsageError, match="--check of this target needs the package compressed-tensors"):
            export(out, tmp_path / f"{number}-checked", COMPRESSED, check=True)
    assert "pip install compressed-tensors" in (tmp_path / "0" / "README.md").read_text()
    library.library.cache_clear()


def test_transformers_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Behind ``import nybble`` it opens what nybble wrote, packed; of others' folders it says what they need."""
    monkeypatch.setattr(transformers_compressed, "is_compressed_tensors_available", lambda: False)
    for known in ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"):
        monkeypatch.setattr(auto_quantizers, known, dict(getattr(auto_quantizers, known)))
    transformers_compressed.register()
    auto: Any = AutoModelForCausalLM
    for case in ("exponents, inputs, a cache", "a cache without scales", "codes that change their sign, zero points"):
        folder = quantized(**HELD[case])
        model, info = auto.from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        expected = nybble.load(folder)[0]
        assert descriptions(model) == descriptions(expected) and torch.equal(logits(model), logits(expected))
        base: Any = AutoModel
        assert [type(m) for m in base.from_pretrained(folder).modules()] == [type(m) for m in model.model.modules()]
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "again")), logits(model))
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("nybble.json"))
    with pytest.raises(ImportError, match=r"pip install compressed-tensors.*fetch from the hub.*load opens them all"):
        auto.from_pretrained(tmp_path / "bare")


def _missing(name: str) -> str:
    if name == "compressed-tensors":
        raise PackageNotFoundError(name)
    return installed(name)


def test_a_cache_that_got_a_scale(tmp_path: Path) -> None:
    shutil.copytree(quantized(**HELD["a cache without scales"]), tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    tensors["model.layers.1.self_attn.v_scale"] *= 2
    save_file(tensors, tmp_path / "q" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FileError, match=r"layers\.1\.self_attn\.v_scale is 2; nybble\.json says .* no scale"):
        nybble.load(tmp_path / "q")


CHANGES: dict[str, tuple[Any, str]] = {
    "weights": (lambda c: _group(c)["weights"].update(num_bits=7), "weights of .*num_bits = 8, .* = 7"),
    "zero points": (lambda c: _group(c)["weights"].update(symmetric=False), "lacks .*weight_zero_point"),
    "inputs": (lambda c: _group(c)["input_activations"].update(num_bits=4), "input activations of .*num_bits = 8"),
    "no inputs": (lambda c: _group(c).update(input_activations=None), "input activations of .*config.json float"),
    "outputs": (
        lambda c: _group(c).update(output_activations=_group(c)["input_activations"]),
        "output .*nybble.json says float",
    ),
    "the cache": (lambda c: c["kv_cache_scheme"].update(type="int"), "the KV cache.*type = 'float', .* 'int'"),
    "no cache": (lambda c: c.update(kv_cache_scheme=None), "the KV cache: .*config.json float"),
    "a float layer": (lambda c: c["ignore"].append("model.layers.1.mlp.up_proj"), "mlp.up_proj: .*config.json float"),
    "another group size": (lambda c: _group(c)["weights"].update(strategy="group", group_size=32), "weight_scale"),
}  # fmt: skip


def _group(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["config_groups"]["group_0"]
    return found


@pytest.mark.parametrize("case", CHANGES)
def test_two_files_that_contradict_each_other(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "q"
    changes = {"weights": "int8 channel", "activations": "int8 token", "kv": "float8_e4m3fn token"}
    shutil.copytree(quantized(**changes), folder)
    config = json.loads((folder / "config.json").read_text())
    change, said = CHANGES[case]
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    for use in (nybble.load, inspect):
        with pytest.raises(FileError, match=said):
            use(folder)


def test_without_its_record_it_is_anybodys(tmp_path: Path) -> None:
    """nybble.json left behind: the weights as they were, inputs in float, which is said."""
    shutil.copytree(quantized(weights="int4 group=16", form=COMPRESSED), tmp_path / "q")
    (tmp_path / "q" / "nybble.json").unlink()
    ours, theirs = nybble.load(tmp_path / "q")[0], nybble.load(quantized(weights="int4 group=16"))[0]
    assert torch.equal(logits(ours), logits(theirs))


def test_quantized_again(tmp_path: Path) -> None:
    """As what another library quantized: from the values that it stands for."""
    coarse, _ = quantize(str(quantized(weights="int8 channel")), "rtn", weights="int8 channel")
    error = (logits(coarse) - logits(nybble.load(quantized(weights="int8 channel"))[0])).abs().max()
    assert error < 0.02 * logits(coarse).abs().max()


def test_judged_and_reported(tmp_path: Path) -> None:
    folder = quantized(weights="int4 group=16")
    both = {"a": str(folder), "b": str(quantized(weights="int4 group=16", form="native"))}
    found = run_eval(both, text(), seq_len=32, samples=4)
    assert found["models"]["a"] == found["models"]["b"]
    from nybble.pipelines.report import write_report

    told = write_report(folder, tmp_path / "report.html")
    assert told["layers"] == 14
