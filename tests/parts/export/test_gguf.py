"""The target gguf: from a folder that nybble wrote to a file whose values the gguf package reads."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tests.parts.export.folders import quantized
from tests.tiny import save_tiny
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from nybble.checkpoint.account import inspect
from nybble.core.errors import FileError, ModelError, SchemeError, UsageError
from nybble.export._source import FolderSource
from nybble.export.gguf import Gguf, file_stem
from nybble.models.gguf import write as write_module
from nybble.models.gguf.qtensors import exact_type
from nybble.models.sources.gguf_header import read_gguf_header
from nybble.models.sources.open import open_source
from nybble.pipelines.convert import convert
from nybble.pipelines.export import export
from nybble.pipelines.load import load
from nybble.pipelines.quantize import quantize
from nybble.quantizer import Quantizer

SIZES = {
    "vocab_size": 128, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
FILE = "float-Q4_K_M.gguf"
IDS = torch.arange(40)[None] % 128


def model(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": True, **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "float"
    model().save_pretrained(place)
    return place


@pytest.mark.parametrize("line", ["q4_k", "nvfp4", "int4 group=32"])
@torch.no_grad()
def test_exported_is_what_was_quantized(line: str, folder: Path, tmp_path: Path) -> None:
    quantize(folder, "rtn", weights=line, out=tmp_path / "out", target="gguf")
    done = export(tmp_path / "out", tmp_path / "file", "gguf", check=True)
    assert done["check"]["weights"] == 14 and done["check"]["exact_in"] == "float32"
    ours, _ = load(tmp_path / "out", dtype=torch.float32)
    back = open_source(str(next((tmp_path / "file").glob("*.gguf")))).model(torch.float32)
    torch.testing.assert_close(back(IDS).logits, ours(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "file" / "README.md").exists()
    (file,) = (tmp_path / "file").glob("*.gguf")
    found = inspect(file)
    assert found["total"] == file.stat().st_size == sum(found["bytes"].values())
    (kind,) = found["formats"]
    bits = {"q4_k": ("Q4_K", 4.5), "nvfp4": ("NVFP4", 4.5), "int4 group=32": ("Q4_0", 4.5)}[line]
    assert kind["weights"] == 14 and kind["format"] == bits[0] and kind["bits"] == pytest.approx(bits[1], abs=1e-3)
    assert found["bytes"]["codes"] == found["quantized_parameters"] // 2
    assert found["parameters"] == sum(p.numel() for p in model().parameters())


@torch.no_grad()
def test_a_mixture_in_one_step(folder: Path, tmp_path: Path) -> None:
    """Layers are calibrated as they will be stored; the embedding, the head too, is rounded when it is written."""
    quantize(folder, "rtn", weights="q4_k", out=tmp_path / "out", target="gguf:q4_k_m")
    done = export(tmp_path / "out", tmp_path / "file", check=True)
    assert done["target"] == "gguf:q4_k_m"
    header = read_gguf_header(tmp_path / "file" / "float-Q4_K_M.gguf")
    kinds = {name: entry.kind for name, entry in header.tensors.items()}
    assert (
        kinds["token_embd.weight"] == 14 and kinds["blk.1.attn_v.weight"] == 14 and kinds["blk.0.attn_q.weight"] == 12
    )
    assert header.metadata["general.file_type"] == 15 and header.metadata["general.name"] == "float"
    assert done["check"]["weights"] == 15  # the table of embedding and head too was in its codes


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embedding_are_calibrated(tied: bool, folder: Path, tmp_path: Path) -> None:
    """As they will be stored; the head by its own inputs. What the user leaves out, stays out."""
    place = tmp_path / "apart"
    model(tie_word_embeddings=tied).save_pretrained(place)
    before = {name: tensor.clone() for name, tensor in model(tie_word_embeddings=tied).state_dict().items()}
    made, report = quantize(place, "k-quants", IDS, target="gguf:q4_k_m", settings={"dtype": torch.float32})
    lines = {row.name: row.bits for row in report.layers}
    for name, line in {
        "model.embed_tokens": "q6_k" if tied else "q4_k",
        **({} if tied else {"lm_head": "q6_k"}),
    }.items():
        found = made.get_submodule(name).weight.qtensor()
        plain = Quantizer(line).quantize(before[f"{name}.weight"])
        assert found.format == plain.format and name in lines
        # the head's columns count by its inputs' energy, those of a table that is only looked up all alike
        assert torch.equal(found.dequantize(), plain.dequantize()) == (line == "q4_k")
    table = "model.embed_tokens"
    made, report = quantize(place, "rtn", target="gguf:q4_k_m", ignore=[table])
    assert table not in {row.name for row in report.layers}
    assert len(report.layers) == (14 if tied else 15)


def test_files_at_once(folder: Path, tmp_path: Path) -> None:
    """Python's call writes them beside its own, as the command does; how the others are made is said."""
    said: list[str] = []
    asked = ["gguf:q4_k_m", "dense"]
    out, report = quantize(folder, "rtn", out=tmp_path / "out", target=asked, announce=said.append)
    assert [path.name for path in (tmp_path / "out" / "gguf").iterdir() if path.suffix == ".gguf"] == [FILE]
    (done,) = report.exported
    assert done["target"] == "gguf:q4_k_m" and FILE in done["files"]
    assert f"nybble export {out} DEST --target dense writes the files that dense means" in said
    load(out)
    assert inspect(out)["bytes"]["exported"] == done["files"][FILE]
    inside = export(out, out / "more" / "dense", "dense")
    assert inside["source_bytes"] == sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    export(out, tmp_path / "again", "gguf:q4_k_m")
    assert (tmp_path / "again" / FILE).read_bytes() == (out / "gguf" / FILE).read_bytes()
    assert quantize(folder, "rtn", target=asked)[1].exported == ()


def test_layers_of_one_layout_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Mock(wraps=exact_type)
    monkeypatch.setattr(write_module, "exact_type", seen)
    with FolderSource(quantized(weights="q8_0")) as source:
        weights = [weight for layer in source.layers.values() for weight in layer.weights.values()]
        Gguf().notes(source)
    assert seen.call_count == len({id(weight) for weight in weights}) < len(weights)


def test_no_room_for_them(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was quantized stays, and the message says how to go on; nothing half-written."""

    def full(self: Gguf, source: object, place: Path) -> None:
        (place / "half").touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Gguf, "write", full)
    out = tmp_path / "out"
    with pytest.raises(FileError, match=r"the disk is full.* `nybble export .*gguf --target gguf:q4_k_m` makes this"):
        quantize(folder, "rtn", out=out, target="gguf:q4_k_m")
    assert {path.name for path in tmp_path.iterdir()} == {"float", "out"} and not list(out.glob("gguf*"))
    load(out)


@pytest.mark.parametrize("target", ["dense", "compressed-tensors", "gguf", "mlx"])
def test_a_full_disk_leaves_nothing(target: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each flush in turn, of what is converted first too."""
    quantize(folder, "rtn", weights="int8 group=32", out=tmp_path / "out", target="gguf")
    real, kept = os.fsync, set(os.listdir(tmp_path))
    for room in range(20):
        flushes = iter(range(room))

        def fsync(handle: int, flushes: Iterator[int] = flushes) -> None:
            if next(flushes, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            try:
                convert(tmp_path / "out", tmp_path / "made", target, round="auto")
            except FileError as error:
                assert "the disk is full" in str(error) and set(os.listdir(tmp_path)) == kept
            else:
                break
    assert room > 2 and set(os.listdir(tmp_path)) == {*kept, "made"}


@pytest.mark.parametrize(
    ("title", "stem"), [("org/Name 1B (chat)", "Name-1B-chat"), ("...", "model"), ("a..b", "a..b")]
)
def test_names_of_files(title: str, stem: str) -> None:
    assert file_stem(title) == stem


def test_what_it_cannot_hold(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match=r"no GGUF type holds 'int4_full group=64 scale=float16 zero_point"):
        quantize(folder, "rtn", weights="int4 group=64 symmetric=false", out=tmp_path / "no", target="gguf")
    with pytest.raises(SchemeError, match="a GGUF keeps no quantizer of inputs"):
        quantize(folder, "rtn", weights="q8_0", activations="int8 token", out=tmp_path / "no", target="gguf")
    quantize(folder, "rtn", weights="int4 group=64 symmetric=false", out=tmp_path / "out")
    with pytest.raises(UsageError, match="unknown option 'q4_k_x'"):
        export(tmp_path / "out", tmp_path / "file", "gguf:q4_k_x")
    with pytest.raises(ModelError, match=r"(?s)target gguf can't hold this model.*gguf:TYPE, which rounds again"):
        export(tmp_path / "out", tmp_path / "file", "gguf")
    done = export(tmp_path / "out", tmp_path / "file", "gguf:q8_0")
    assert any("rounded again" in note for note in done["notes"])
    assert not (tmp_path / "no").exists()


def test_what_no_scheme_makes_fit_is_refused_before_anything_is_quantized(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An architecture, a tensor, a tokenizer, a damaged one, a type that an old package doesn't know."""
    monkeypatch.setattr("nybble.walk.walk.Walk.run", None)  # nothing is
    gpt2, biased, named = save_tiny(tmp_path / "gpt2", "gpt2"), tmp_path / "biased", tmp_path / "named"
    model(mlp_bias=True).save_pretrained(biased)
    shutil.copytree(folder, named)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(named)
    for place, said in (
        (gpt2, "type 'gpt2' can't be written as GGUF"),
        (biased, "no biases in the MLP"),
        (named, "a tokenizer of type WordLevel can't be written as GGUF"),
    ):
        for target, line in (("gguf", "q8_0"), ("gguf:q4_k_m", None)):
            with pytest.raises(ModelError, match=said):
                quantize(place, "rtn", weights=line, out=tmp_path / "no", target=target)
    (named / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"the tokenizer of .*named can't be read"):
        quantize(named, "rtn", weights="q8_0", out=tmp_path / "no", target="gguf")
    monkeypatch.setattr("gguf.constants.GGMLQuantizationType", IntEnum("Old", {"F32": 0, "Q8_0": 8}))
    for target, line, kind in (("gguf", "nvfp4", "NVFP4"), ("gguf:q4_k", None, "Q4_K")):
        with pytest.raises(UsageError, match=f"package gguf doesn't know {kind}; pip install -U gguf"):
            quantize(folder, "rtn", weights=line, out=tmp_path / "no", target=target)
    assert not list(tmp_path.glob("no*"))


@pytest.mark.parametrize(("window", "told"), [(16, True), (64, False), (None, False)])
def test_a_window_that_llama_cpp_does_not_keep_is_told(window: int | None, told: bool, tmp_path: Path) -> None:
    """Of as many tokens as the context has, there is nothing to lose."""
    sizes: Any = SIZES
    MistralForCausalLM(MistralConfig(**sizes, sliding_window=window)).save_pretrained(tmp_path / "float")
    notes = convert(tmp_path / "float", tmp_path / "d", "gguf:f16")["notes"]
    said = "llama.cpp's llama attends to every token, this model to the last 16: longer texts differ"
    assert [note for note in notes if "attends to every token" in note] == [said] * told


def test_a_damaged_tokenizer_is_an_error_of_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(quantized(weights="q8_0"), out)
    (out / "tokenizer.json").write_text("{")
    with pytest.raises(FileError, match=r"the tokenizer of .*out can't be read"):
        export(out, tmp_path / "d", "gguf")
    assert not (tmp_path / "d").exists()


def test_without_a_tokenizer_it_says_so(tmp_path: Path) -> None:
    """The file is whole, and llama.cpp would not load it."""
    bare = tmp_path / "bare"
    shutil.copytree(quantized(weights="q8_0"), bare, ignore=shutil.ignore_patterns("tokenizer*"))
    found = export(bare, tmp_path / "d", "gguf")
    assert [note for note in found["notes"] if "no tokenizer.json" in note and "llama.cpp" in note]
    assert "holds no tokenizer" in (tmp_path / "d" / "README.md").read_text()


def test_a_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    """Qwen's class makes a BPE of any vocabulary, of a list of words one without merges."""
    save_tiny(tmp_path / "float", "qwen2")
    with pytest.raises(ModelError, match=r"a tokenizer without merges can't be .* Leave the tokenizer"):
        convert(tmp_path / "float", tmp_path / "d", "gguf:q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["float"]
