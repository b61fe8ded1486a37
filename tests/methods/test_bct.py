"""BCT: transformers in integers alone, from the words' rows to the logits, in blocks with powers of two."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.tiny import given, save_text, tiny_tokenizer
from torch import Tensor, nn
from typer.testing import CliRunner

import nybble
from nybble.cli import build
from nybble.core.errors import GranularityError, ModelError, SchemeError, UsageError
from nybble.nn.integer.blocks import Blocks
from nybble.nn.integer.dtypes import Dtypes
from nybble.nn.integer.model import in_integers
from nybble.nn.integer.transformer import of_blocks
from nybble.quantizer import Quantizer

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": 5,
}  # fmt: skip
KINDS = {"bert": "BertModel", "bert with a head": "BertForSequenceClassification", "roberta": "RobertaModel"}
DECODER: dict[str, Any] = {
    "vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHIFT = "scale=pow2 scale_format=(float8_e8m0fnu scale=one)"
INPUTS = "int8 group=64 pad=true scale=pow2"


def encoder(kind: str = "bert", **changes: Any) -> Any:
    """With weights that do something, and rows of norms that differ."""
    made: Any = transformers
    config = transformers.AutoConfig.for_model(kind.split(maxsplit=1)[0], **{**SIZES, **changes})
    torch.manual_seed(3)
    model = getattr(made, KINDS[kind])(config).eval()
    for parameter in model.parameters():
        parameter.data = (
            parameter.data * 4 if parameter.ndim > 1 else parameter.data + 0.1 * torch.randn(len(parameter))
        )
    return model


def decoder() -> Any:
    """Its head reads the table of words."""
    torch.manual_seed(4)
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**DECODER))
    for name, parameter in model.named_parameters():
        parameter.data *= 4 if parameter.ndim > 1 and "wte" not in name else 1
    return model.eval()


def words(rows: int = 3, tokens: int = 11) -> dict[str, Tensor]:
    ids = torch.randint(1, 300, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(tokens) < torch.tensor([[tokens], [5], [8]])[:rows]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def made(model: Any, **lines: Any) -> Any:
    return nybble.quantize(copy.deepcopy(model), "bct", **lines)[0]


def first(found: Any) -> Any:
    return found[0]


def run(model: Any, given: dict[str, Tensor], simulate: bool = False) -> Any:
    with torch.no_grad(), of_blocks(model, simulate):
        return first(model(**given))


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_integers_is_the_simulation_in_floats(kind: str) -> None:
    model = encoder(kind)
    quantized, given = made(model), words()
    ours, simulated = run(quantized, given), run(quantized, given, simulate=True)
    assert isinstance(ours, Blocks) and ours.codes.dtype == torch.int8 and simulated.codes.dtype == torch.float64
    assert torch.equal(ours.codes.double(), simulated.codes) and torch.equal(ours.shifts, simulated.shifts)
    with torch.no_grad():
        assert 0 < off(ours.float(), first(model(**given))) < 0.08  # 0.03 measured


def test_nothing_from_the_words_to_the_logits_is_a_float() -> None:
    quantized = made(encoder("bert with a head"))
    with torch.no_grad(), of_blocks(quantized), Dtypes() as trace:
        quantized(**words())
    assert [op for op in trace.operations if not op.integer] == [] and len(trace.operations) > 1000
    with torch.no_grad(), of_blocks(quantized, simulate=True), Dtypes() as trace:
        quantized(**words())
    assert len([op for op in trace.operations if not op.integer]) > 1000


def test_a_decoder_comes_to_the_same_codes_word_by_word() -> None:
    model = decoder()
    quantized, ids = made(model), words()["input_ids"][:2, :8].clamp(min=3)
    whole = run(quantized, {"input_ids": ids})
    cache: Any = transformers.DynamicCache()
    with torch.no_grad(), of_blocks(quantized), Dtypes() as trace:
        steps = [quantized(input_ids=ids[:, t : t + 1], **given(quantized, cache)).logits for t in range(8)]
    assert [op for op in trace.operations if not op.integer] == []
    for t, step in enumerate(steps):
        assert torch.equal(step.codes[:, 0], whole.codes[:, t]) and torch.equal(step.shifts[:, 0], whole.shifts[:, t])
    cached: Any = cache.layers[0].keys
    assert isinstance(cached, Blocks) and cached.codes.dtype == torch.int8 and cached.shape == (2, 4, 8, 16)
    with torch.no_grad():
        assert 0 < off(whole.float(), model(input_ids=ids).logits) < 0.1


def test_words_that_are_padding_change_nothing() -> None:
    quantized, given = made(encoder()), words()
    together = run(quantized, given)
    alone = run(quantized, {name: value[1:2, :5] for name, value in given.items()})
    assert torch.equal(together.codes[1, :5], alone.codes[0]) and torch.equal(together.shifts[1, :5], alone.shifts[0])


def test_blocks_lose_less_than_layers() -> None:
    """Of four bits, with outlying rows and columns as language models have them."""
    model = encoder()
    for module in model.encoder.modules():
        if isinstance(module, nn.Linear):
            module.weight.data[::16] *= 8
    given = words()
    with torch.no_grad():
        exact = model(**given)[0]
    lost = [
        off(run(made(model, scheme=four_bits(cut)), given).float(), exact) for cut in ("tensor", "flat=1024", "flat=64")
    ]
    assert lost[0] > lost[1] > lost[2] and lost[0] > 1.5 * lost[2]


def four_bits(cut: str, number: str = "int4", scale: str = SHIFT) -> dict[str, Any]:
    line = f"{number} {cut} {scale}"
    rules = [{"targets": ["Embedding"], "weights": line}, {"targets": ["Linear"], "weights": line, "inputs": INPUTS}]
    return {"rules": rules}


def test_a_block_of_4096_weights_has_a_shift_of_8_bits() -> None:
    found = Quantizer("int4 flat=4096 scale=pow2 scale_format=(float8_e8m0fnu scale=one)").quantize(torch.randn(64, 64))
    bits = sum(t.numel() * t.element_size() for t in found.tensors().values()) * 8 / 4096
    assert bits == 4 + 8 / 4096 and 32 / bits == pytest.approx(7.996, abs=5e-4)
    values = found.dequantize()
    steps = values / 2.0 ** (math.floor(math.log2(float(values.abs().max()))) - 2)
    assert torch.equal(steps, steps.round()) and int(steps.abs().max()) <= 7


def test_a_folder_is_judged_in_integers(tmp_path: Path) -> None:
    encoder().save_pretrained(tmp_path / "float")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(tmp_path / "float")
    text = str(save_text(tmp_path / "a.txt"))
    nybble.quantize(str(tmp_path / "float"), "bct", out=tmp_path / "out")
    told = [
        "eval",
        str(tmp_path / "out"),
        "--data",
        text,
        "--reference",
        str(tmp_path / "float"),
        "--seq-len",
        "32",
        "--json",
    ]
    said = [json.loads(CliRunner().invoke(build(), [*told, *more]).stdout) for more in ([], ["--integer"])]
    plain, whole = (found["metrics"]["cosine"] for found in said)
    assert whole != plain and whole > 0.99 and said[1]["integer"] is True
    loaded: Any = nybble.load(tmp_path / "out")[0]
    again: Any = nybble.quantize(str(tmp_path / "float"), "bct")[0]
    assert torch.equal(run(loaded, words()).codes, run(again, words()).codes)


def test_the_model_is_as_it_was_afterwards() -> None:
    quantized, given = made(encoder("bert with a head")), words()
    implementation = quantized.config._attn_implementation
    with torch.no_grad():
        before = quantized(**given).logits
        with in_integers(quantized):
            inside = quantized(**given).logits
            assert type(inside) is Tensor and inside.dtype == torch.float32
        assert torch.equal(quantized(**given).logits, before) and off(inside, before) > 0
    assert quantized.config._attn_implementation == implementation


def test_what_has_no_integer_form_is_refused() -> None:
    model = encoder()
    with pytest.raises(SchemeError, match="word_embeddings: a Embedding has no form"):
        run(made(model, scheme={"rules": four_bits("flat=64")["rules"][1:]}), words())
    with pytest.raises(SchemeError, match="scales are not powers of two"):
        run(made(model, scheme=four_bits("flat=64", scale="scale_format=float32")), words())
    with pytest.raises(SchemeError, match="8 neighbours of a row don't share a scale"):
        run(made(model, scheme=four_bits("group=4")), words())
    with pytest.raises(SchemeError, match="not integers of up to 8 bits"):
        run(made(model, scheme=four_bits("flat=64", "float4_e2m1fn")), words())
    with pytest.raises(UsageError, match="run on the CPU"):
        run(made(model).to("meta"), words())
    with pytest.raises(GranularityError, match="at least one element"):
        Quantizer("int8 flat=0 scale=pow2")
    with pytest.raises(UsageError, match="1 to 8 bits"):
        Quantizer("int9 flat=64 scale=pow2")


def test_a_model_that_does_something_else_is_refused_by_name() -> None:
    quantized = made(encoder(hidden_act="gelu"))
    layer = quantized.encoder.layer[0].intermediate
    layer._modules.pop("intermediate_act_fn")
    layer.intermediate_act_fn = torch.sigmoid
    with pytest.raises(ModelError, match="can't follow sigmoid"):
        run(quantized, words())
