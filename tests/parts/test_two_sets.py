"""Schemes of two sets: what they take of each family, and with which values."""

from __future__ import annotations

from typing import Any

import pytest
from tests.parts.training.test_text_tasks import BART, BERT, T5
from tests.parts.training.test_text_tasks import model as made
from torch import nn

from nybble.learned import ACTIVATIONS, WEIGHTS, make_part
from nybble.nn.kinds import targets_of
from nybble.quantizer import Quantizer
from nybble.scheme import preset_scheme
from nybble.two_sets import TWO_SETS

DISTIL: dict[str, Any] = {
    "vocab_size": 60, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 24,
}  # fmt: skip
CLASSES = {"id2label": BERT["id2label"]}
#: class, family, config, second MLP layers, tables, what stays in float
FAMILIES: list[tuple[str, str, dict[str, Any], str, str, set[str]]] = [
    ("BertForSequenceClassification", "bert", BERT, "bert.encoder.layer.{}.output.dense",
     "bert.embeddings.word_embeddings",
     {"classifier", "bert.embeddings.position_embeddings", "bert.embeddings.token_type_embeddings"}),
    ("BertModel", "bert", BERT, "encoder.layer.{}.output.dense", "embeddings.word_embeddings",
     {"embeddings.position_embeddings", "embeddings.token_type_embeddings"}),
    ("RobertaForSequenceClassification", "roberta", BERT, "roberta.encoder.layer.{}.output.dense",
     "roberta.embeddings.word_embeddings",
     {"classifier.out_proj", "roberta.embeddings.position_embeddings", "roberta.embeddings.token_type_embeddings"}),
    ("DistilBertForSequenceClassification", "distilbert", {**DISTIL, **CLASSES},
     "distilbert.transformer.layer.{}.ffn.lin2", "distilbert.embeddings.word_embeddings",
     {"classifier", "distilbert.embeddings.position_embeddings"}),
    ("BartForSequenceClassification", "bart", {**BART, **CLASSES}, "model.{side}.layers.{}.fc2", "model.shared",
     {"classification_head.out_proj"}),
    ("BartForConditionalGeneration", "bart", BART, "model.{side}.layers.{}.fc2", "model.shared", {"lm_head"}),
    ("MBartForConditionalGeneration", "mbart", BART, "model.{side}.layers.{}.fc2", "model.shared", {"lm_head"}),
    ("MarianMTModel", "marian", BART, "model.{side}.layers.{}.fc2", "model.shared", {"lm_head"}),
    ("T5ForConditionalGeneration", "t5", T5, "{side}.block.{}.layer.{last}.DenseReluDense.wo", "shared",
     {"lm_head", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
      "decoder.block.0.layer.0.SelfAttention.relative_attention_bias"}),
]  # fmt: skip


def seconds(pattern: str, count: int) -> set[str]:
    sides = (("encoder", 1), ("decoder", 2)) if "{side}" in pattern else (("", 0),)
    return {pattern.format(i, side=side, last=last) for side, last in sides for i in range(count)}


@pytest.mark.parametrize(
    ("name", "family", "config", "second", "table", "floats"), FAMILIES, ids=[row[0] for row in FAMILIES]
)
def test_what_is_taken(
    name: str, family: str, config: dict[str, Any], second: str, table: str, floats: set[str]
) -> None:
    model = made(name, family, config)
    targets = targets_of(model)
    classes = {n: t.kind.class_names(model.get_submodule(t.module), False) for n, t in targets.items()}
    scheme = preset_scheme("BIT_W1A1")
    found = scheme.match(classes)
    assert {*found.ignored} == floats
    lines = {n: rule for n, rule in found.rules.items() if rule.inputs is not None}
    unsigned = {n for n, rule in lines.items() if rule.inputs is not None and rule.inputs.format.min == 0}
    layers = 2 if "{side}" not in second else 1
    assert unsigned == seconds(second, layers)
    linear = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert lines.keys() == linear - floats
    assert table in found.rules and found.rules[table].inputs is None
    attentions = [rule.matmuls for rule in found.rules.values() if rule.matmuls is not None]
    assert attentions and all(m.probabilities.format.min == 0 > m.query.format.min for m in attentions)


@pytest.mark.parametrize("name", TWO_SETS)
def test_widths_are_those_of_the_name(name: str) -> None:
    scheme = preset_scheme(name)
    weights, inputs = int(name[5]), int(name[7])
    ends = TWO_SETS[name].ends
    for rule in scheme.rules[0 if ends is None else 1 :]:
        if rule.weights is not None:
            assert rule.weights.format.bits == weights
            make_part("statistics", {}).check(rule.weights, WEIGHTS)
        if rule.inputs is not None:
            assert rule.inputs.format.bits == inputs
            make_part("ste" if inputs == 8 else "elastic", {}).check(rule.inputs, ACTIVATIONS)
    if ends is not None:
        assert [str(scheme.rules[0].weights), scheme.rules[0].inputs] == [ends[0], Quantizer(ends[1])]
    assert scheme.name == name
