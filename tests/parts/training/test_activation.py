"""Another activation function in place of a network's own: what is calculated, and what a folder says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.parts.training.test_text_tasks import BART, BERT, T5, model
from torch import nn

from nybble.core.errors import ModelError, UsageError
from nybble.scheme import preset_scheme
from nybble.training.activation import use_activation
from nybble.training.methods.qat import PART, QatOptions

NETWORKS = [
    ("BertForSequenceClassification", "bert", {**BERT, "hidden_act": "relu"}, BERT),
    ("BartForConditionalGeneration", "bart", {**BART, "activation_function": "relu"}, BART),
    ("T5ForConditionalGeneration", "t5", {**T5, "feed_forward_proj": "gated-relu"},
     {**T5, "feed_forward_proj": "gated-gelu"}),
]  # fmt: skip


def answer(made: Any) -> torch.Tensor:
    ids = torch.arange(3, 12)[None]
    more = {"decoder_input_ids": ids} if made.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = made(input_ids=ids, **more).logits
    return found


@pytest.mark.parametrize(("name", "family", "wanted", "config"), NETWORKS)
def test_a_network_is_as_one_that_was_made_with_it(
    name: str, family: str, wanted: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    made, other = model(name, family, config), model(name, family, wanted)
    assert not torch.equal(answer(made), answer(other))
    use_activation(made, "relu")
    assert torch.equal(answer(made), answer(other))
    made.save_pretrained(tmp_path)
    again = getattr(transformers, name).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(answer(again), answer(other), rtol=1e-5, atol=1e-6)  # by where its tensors lie


def test_refusals() -> None:
    with pytest.raises(UsageError, match=r"there is no function 'rely'\. Did you mean 'relu'"):
        PART.check(QatOptions(activation="rely"), preset_scheme("W4A16"))
    with pytest.raises(ModelError, match="names no activation function"):
        use_activation(nn.Linear(2, 2), "relu")
    made = model("BertForSequenceClassification", "bert", BERT)
    made.config.hidden_act = "tanh"
    with pytest.raises(ModelError, match="calculates tanh in no module"):
        use_activation(made.bert.encoder, "relu")
