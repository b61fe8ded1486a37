"""Quantized embeddings, alone and with the head that is tied to them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import input_ids, logits, save_text, save_tiny, tiny_model
from transformers import AutoModelForCausalLM

import nybble
from nybble.calibration.error import relative_error
from nybble.checkpoint.account import inspect
from nybble.core.errors import SchemeError
from nybble.nn.embedding import QuantEmbedding, TiedHead
from nybble.nn.kinds import Quantized, targets_of
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


def test_refusals(tmp_path: Path) -> None:
    text = save_text(tmp_path / "text.txt")
    folder = save_tiny(tmp_path / "gemma3", "gemma3_text")
    with pytest.raises(SchemeError, match="Gemma3TextScaledWordEmbedding computes something else"):
        run(folder, text)
    llama = save_tiny(tmp_path / "llama", "llama")
    scheme = tmp_path / "scheme.yaml"
    scheme.write_text("{rules: [{targets: [Embedding], weights: int8 channel, inputs: int8 token}]}")
    with pytest.raises(SchemeError, match="its rule has weights only"):
        nybble.quantize(str(llama), build_recipe("rtn", scheme=str(scheme)), str(text), settings=SETTINGS)
    scheme.write_text("{rules: [{targets: [Linear], weights: int8 channel}], ignore: []}")
    with pytest.raises(SchemeError, match=r"tied to the embeddings.*targets: \[Embedding\]"):
        nybble.quantize(str(llama), build_recipe("rtn", scheme=str(scheme)), str(text), settings=SETTINGS)
