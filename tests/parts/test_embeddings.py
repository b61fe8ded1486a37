"""Quantized embeddings, alone and with the head that is tied to them."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.tiny import input_ids, logits, save_text, save_tiny, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

import nybble
from nybble.calibration.error import relative_error
from nybble.checkpoint.account import inspect
from nybble.core.errors import ModelError, SchemeError
from nybble.nn.embedding import QuantEmbedding, TiedEmbedding, TiedHead
from nybble.nn.kinds import Quantized, kind_of, targets_of
from nybble.nn.kinds.tied import tie
from nybble.nn.packed import Packed
from nybble.pipelines.request import build_recipe
from nybble.quantizer import Quantizer
from nybble.recipe import parse_recipe

SETTINGS = nybble.Settings(samples=4, seq_len=12, batch=2)
LINE = "float4_e2m1fn channel"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run(folder: Path, text: Path, out: Path | None = None, recipe: str = "gptq", **options: Any) -> tuple[Any, Any]:
    made = build_recipe(recipe, weights="int8 channel", embeddings=LINE, **options)
    found: tuple[Any, Any] = nybble.quantize(str(folder), made, str(text), out=out, settings=SETTINGS)
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_in_memory_on_disk_and_loaded(tmp_path: Path, family: str) -> None:
    """llama and gpt2 tie their heads here, mistral doesn't."""
    folder, text = save_tiny(tmp_path / "float", family), save_text(tmp_path / "text.txt")
    if family == "gpt2":  # two plain tables; tokens and positions
        made = build_recipe("rtn", weights="int8 channel", embeddings=LINE)
        nybble.quantize(str(folder), made, str(text), out=tmp_path / "out", settings=SETTINGS)
        memory, _ = nybble.quantize(str(folder), made, str(text), settings=SETTINGS)
    else:
        run(folder, text, tmp_path / "out")
        memory, _ = run(folder, text)
    model, _ = nybble.load(tmp_path / "out")
    auto: Any = AutoModelForCausalLM
    other = auto.from_pretrained(tmp_path / "out").eval()
    for found in (memory, model, other):
        embedding, head = found.get_input_embeddings(), found.get_output_embeddings()
        assert isinstance(embedding, QuantEmbedding)
        assert isinstance(head, TiedHead) == (family != "mistral")
        if isinstance(head, TiedHead):
            assert head.weight is embedding.weight
        assert torch.equal(logits(found), logits(memory))
    sizes = inspect(tmp_path / "out")
    tables = [name for name in sizes["modules"] if "embed" in name or "wte" in name]
    assert len(tables) == 1 and sizes["modules"][tables[0]]["bits"] < 6  # codes, and a float32 scale a row
    assert sizes["total"] == sum(sizes["files"].values())
    expected = Quantizer(LINE).fake_quantize(tiny_model(family).get_input_embeddings().weight.float())
    if family == "gpt2":
        assert torch.equal(memory.get_input_embeddings()(input_ids()).float(), expected.bfloat16()[input_ids()].float())


def test_a_tied_table_is_solved_on_the_heads_output(tmp_path: Path) -> None:
    """The solver's objective is the head's output error on calibration, so it beats rounding there."""
    folder, text = save_tiny(tmp_path / "float", "llama"), save_text(tmp_path / "text.txt")
    _, report = run(folder, text)
    row = next(row for row in report.layers if row.name == "model.embed_tokens")
    assert row.error is not None and row.rtn_error is not None and row.error < row.rtn_error
    weight = tiny_model("llama").get_input_embeddings().weight.detach().float()
    plain_error = relative_error(weight, Quantizer(LINE).fake_quantize(weight), None)
    assert row.rtn_error != pytest.approx(plain_error, rel=1e-3)  # not the table's own error


def test_a_tied_table_is_searched_on_all_inputs_of_the_head(tmp_path: Path) -> None:
    """Whatever the loss, and however few inputs of other layers it takes."""
    folder, text = save_tiny(tmp_path / "float", "llama"), save_text(tmp_path / "text.txt")
    found = []
    for loss in ("output", "fisher"):
        step = {"solver": "llm-fp4", "loss": loss, "grid": 6, "rounds": 1, "tokens": 4}
        scheme = {"targets": ["Linear", "Embedding"], "weights": "e2m1 channel"}
        made = parse_recipe({"name": "x", "scheme": scheme, "steps": [step]})
        model: Any
        model, report = nybble.quantize(str(folder), made, str(text), settings=SETTINGS)
        row = next(row for row in report.layers if row.name == "model.embed_tokens")
        found.append((model.get_input_embeddings().weight.qtensor().dequantize(), row.error, row.rtn_error))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]


def test_a_head_is_put_behind_its_table_in_whatever_order_a_file_has_them(tmp_path: Path) -> None:
    """Transformers sorts config.json, so ``lm_head`` comes first."""
    folder, text = save_tiny(tmp_path / "float", "llama"), save_text(tmp_path / "text.txt")
    model, _ = run(folder, text, recipe="rtn")
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert next(iter(config["quantization_config"]["modules"])) == "lm_head"
    assert torch.equal(logits(nybble.load(tmp_path / "again")[0]), logits(model))


def test_a_second_table_takes_the_head_along() -> None:
    """A later step may put another quantized table where the first one stands."""
    model = tiny_model("llama")
    target = replace(targets_of(model)["model.embed_tokens"], head="lm_head")
    old = model.get_input_embeddings()
    for line in (LINE, "int8 channel"):
        model.set_input_embeddings(old)
        target.kind.put(model, target, Quantized(weights=[Quantizer(line).quantize(old.weight.detach().float())]))
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert isinstance(head, TiedHead) and head.weight is embedding.weight
        assert embedding.weight.qtensor().spec()["format"] == Quantizer(line).format.name


def test_command_line_of_llm_fp4_with_embeddings(tmp_path: Path) -> None:
    folder, text = save_tiny(tmp_path / "float", "llama"), save_text(tmp_path / "text.txt")
    made = build_recipe("llm-fp4", embeddings=LINE, matmuls="float4_e2m1fn tensor static", effort="quick")
    model, report = nybble.quantize(str(folder), made, str(text), settings=SETTINGS)
    assert sum(isinstance(module, Packed) for module in model.modules()) == 15
    assert {row.name for row in report.layers} >= {"model.embed_tokens", "model.layers.1.self_attn.matmuls.value"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_rows_are_those_of_the_familys_own_class(dtype: torch.dtype) -> None:
    """Every class of transformers that scales what it looks up, found by their source, with a scale that rounds."""
    found = {
        (path.parent.name, name)
        for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
        for name in re.findall(r"^class (\w+ScaledWordEmbedding)\(nn.Embedding\)", path.read_text(), re.MULTILINE)
    }
    assert len(found) > 15
    ids = torch.randint(0, 12, (2, 5), generator=torch.Generator().manual_seed(0))
    for family, name in sorted(found - {("t5gemma2", "T5Gemma2TextScaledWordEmbedding")}):  # which has a second table
        cls = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
        theirs = cls(12, 8, 0, embed_scale=1.2345678).to(dtype)
        kind = kind_of(theirs)
        assert kind is not None and kind.entry == "embedding", name
        root = nn.Module()
        root.add_module("it", theirs)
        table = Quantizer("int8 channel").quantize(theirs.weight.detach().float())
        theirs.weight.data = table.dequantize().to(dtype)
        expected = theirs(ids)
        kind.put(root, targets_of(root)["it"], Quantized(weights=[table]))
        assert torch.equal(root.get_submodule("it")(ids), expected), name
        assert not torch.equal(expected, theirs.weight[ids])


ENCODER_DECODERS = {
    "BartForConditionalGeneration": "bart", "M2M100ForConditionalGeneration": "m2m_100",
    "PegasusXForConditionalGeneration": "pegasus_x", "T5ForConditionalGeneration": "t5",
}  # fmt: skip
BOTH: dict[str, Any] = {
    "vocab_size": 300, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "scale_embedding": True, "d_kv": 8, "d_ff": 48,
    "num_layers": 1, "num_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", ["gemma3_text", *ENCODER_DECODERS])
def test_scaled_and_shared_tables_to_a_folder_and_back(tmp_path: Path, name: str) -> None:
    """An encoder's and a decoder's embeddings and the head read one table, each with the scale that it has."""
    if name in ENCODER_DECODERS:
        cls: Any = getattr(transformers, name)
        torch.manual_seed(3)
        exact = cls(transformers.AutoConfig.for_model(ENCODER_DECODERS[name], **BOTH)).eval()
        given = {"input_ids": input_ids(), "decoder_input_ids": input_ids().flip(1)}
    else:
        exact, given = tiny_model(name, dtype=torch.float32), {"input_ids": input_ids()}
    exact.save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    settings = nybble.Settings(dtype=torch.float32)
    options: Any = {"weights": "int8 channel", "embeddings": "int8 channel", "settings": settings}
    out, report = nybble.quantize(tmp_path / "float", "gptq", given, out=tmp_path / "out", **options)
    assert sum("shared" in row.name or "embed_tokens" in row.name for row in report.layers) == 1
    with torch.no_grad():
        before = exact(**given, use_cache=False).logits
        memory, _ = nybble.quantize(exact, "gptq", given, **options)
        expected = memory(**given, use_cache=False).logits
        assert 0 < (expected - before).norm() < 0.05 * before.norm()
        theirs = type(memory).from_pretrained(out).eval()
        theirs.save_pretrained(tmp_path / "again")
        for found in (nybble.load(out)[0], theirs, nybble.load(tmp_path / "again")[0]):
            assert torch.equal(found(**given, use_cache=False).logits, expected)
            tables = [m for m in found.modules() if isinstance(m, QuantEmbedding)]
            assert len([m for m in tables if m.weight.shape == (300, 32)]) == 1
            shared = [m for m in found.modules() if isinstance(m, TiedEmbedding | TiedHead)]
            assert all(m.weight is found.get_input_embeddings().weight for m in shared)
            assert len(shared) == (3 if name in ENCODER_DECODERS else 1)


GEMMA = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8, "pad_token_id": 0,
}  # fmt: skip
APART: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "a decoder's": (
        "T5GemmaForConditionalGeneration",
        {"encoder": GEMMA, "decoder": GEMMA, "tie_word_embeddings": True},
        {"lm_head.out_proj"},
    ),
    "none, while a part of the config says so": (
        "T5GemmaForConditionalGeneration",
        {"encoder": GEMMA, "decoder": GEMMA, "tie_word_embeddings": False},
        set(),
    ),
    "a decoder's of another size": (
        "MarianMTModel",
        {"decoder_vocab_size": 53, "share_encoder_decoder_embeddings": False, "tie_word_embeddings": True},
        {"lm_head"},
    ),
    "outputs scaled where the config ties": (
        "UMT5ForConditionalGeneration", {}, {"lm_head", "encoder.embed_tokens", "decoder.embed_tokens"},
    ),
    "a table called the output embeddings": (
        "FSMTForConditionalGeneration",
        {"src_vocab_size": 60, "tgt_vocab_size": 60, "langs": ["a", "b"], "tie_word_embeddings": True},
        {"model.decoder.output_projection", "model.decoder.embed_tokens"},
    ),
    "a head whose weight is read": (
        "MobileBertForMaskedLM", {**GEMMA, "embedding_size": 8, "intra_bottleneck_size": 16}, set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", APART)
@torch.no_grad()
def test_each_head_reads_the_table_that_it_was_tied_to(tmp_path: Path, case: str) -> None:
    """As the float model computes with each weight's rounded values in its place."""
    name, changes, tied = APART[case]
    cls: Any = getattr(transformers, name)
    torch.manual_seed(3)
    exact = cls(cls.config_class(**{**BOTH, "vocab_size": 60, **changes})).eval()
    for parameter in exact.parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            parameter.mul_(4)
    exact.save_pretrained(tmp_path / "float")
    given = {"input_ids": input_ids()}
    if exact.config.is_encoder_decoder:
        given["decoder_input_ids"] = input_ids().flip(1)
    settings = nybble.Settings(dtype=torch.float32)
    said: list[str] = []
    out, report = nybble.quantize(
        tmp_path / "float", "rtn", out=tmp_path / "out", weights="int8 channel", embeddings="int8 channel",
        settings=settings, announce=said.append, form="native",
    )  # fmt: skip
    for row in report.layers:
        weight = exact.get_submodule(row.name).weight
        weight.copy_(Quantizer("int8 channel").fake_quantize(weight))
    expected = exact(**given).logits
    theirs = cls.from_pretrained(out).eval()
    theirs.save_pretrained(tmp_path / "again")
    for found in (nybble.load(out)[0], theirs, nybble.load(tmp_path / "again")[0]):
        torch.testing.assert_close(found(**given).logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert {n for n, m in found.named_modules() if isinstance(m, TiedHead | TiedEmbedding)} == tied
    if name == "MobileBertForMaskedLM":
        assert any("reads their weights" in line and "embeddings.word_embeddings" in line for line in said)


@pytest.mark.parametrize("name", ["CLIPTextModel", "ChineseCLIPTextModel"])
@torch.no_grad()
def test_a_table_that_the_familys_initialiser_touches(tmp_path: Path, name: str) -> None:
    cls: Any = getattr(transformers, name)
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(3)
    exact = cls(cls.config_class(**sizes, num_attention_heads=2, max_position_embeddings=16, eos_token_id=2)).eval()
    exact.save_pretrained(tmp_path / "float")
    settings = nybble.Settings(dtype=torch.float32)
    options: Any = {"weights": "int8 channel", "embeddings": "int8 channel", "settings": settings}
    out, _ = nybble.quantize(tmp_path / "float", "rtn", out=tmp_path / "out", form="native", **options)
    memory, _ = nybble.quantize(exact, "rtn", **options)
    expected = memory(input_ids()).last_hidden_state
    for found in (nybble.load(out)[0], cls.from_pretrained(out).eval()):
        assert isinstance(found.get_input_embeddings(), QuantEmbedding)
        assert torch.equal(found(input_ids()).last_hidden_state, expected)
        assert all(torch.equal(b, dict(memory.named_buffers())[n]) for n, b in found.named_buffers())


def test_half_of_a_shared_table_is_refused() -> None:
    config: Any = transformers.AutoConfig.for_model("bart", **BOTH)
    for scheme, words in (
        ({"rules": [{"targets": ["model.decoder.embed_tokens"], "weights": "int8 channel"}]}, "no rule takes"),
        (
            {
                "rules": [{"targets": ["Embedding"], "weights": "int8 channel"}],
                "ignore": ["model.decoder.embed_tokens"],
            },
            "Ignore both, or neither",
        ),
    ):
        with pytest.raises(SchemeError, match=words):
            nybble.quantize(transformers.BartForConditionalGeneration(config), "rtn", scheme=scheme)


def test_a_head_over_other_tokens_reads_no_table() -> None:
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=False)
    nybble.quantize(model, "rtn", scheme={"rules": [{"targets": ["Embedding"], "weights": "int8 channel"}]})
    model.lm_head = nn.Linear(32, 200, bias=False)
    with pytest.raises(ModelError, match="lm_head is no head over the 300 tokens of the input embedding"):
        tie(model, "lm_head")


def test_refusals(tmp_path: Path) -> None:
    text = save_text(tmp_path / "text.txt")
    llama = save_tiny(tmp_path / "llama", "llama")
    scheme = tmp_path / "scheme.yaml"
    scheme.write_text("{rules: [{targets: [Embedding], weights: int8 channel, inputs: int8 token}]}")
    with pytest.raises(SchemeError, match="its rule has weights only"):
        nybble.quantize(str(llama), build_recipe("rtn", scheme=str(scheme)), str(text), settings=SETTINGS)
    scheme.write_text("{rules: [{targets: [Linear], weights: int8 channel}], ignore: []}")
    with pytest.raises(SchemeError, match=r"tied to the embeddings.*targets: \[Embedding\]"):
        nybble.quantize(str(llama), build_recipe("rtn", scheme=str(scheme)), str(text), settings=SETTINGS)
