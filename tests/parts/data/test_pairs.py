"""Text as inputs and targets: what stands where, and the decoder's inputs as each family's own code makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tests.tiny import WORDS, tiny_tokenizer
from tokenizers import processors

from nybble.core.errors import DataError, ModelError, UsageError
from nybble.data import make_source, pair_samples
from nybble.data.kinds.pairs import PART, decoder_input_ids

TEXT = make_source([" ".join(WORDS[3:43])], name="words", note="")


def framed_tokenizer() -> Any:
    """Puts <s> before and </s> behind every text."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def test_targets_go_on_where_inputs_end() -> None:
    samples = pair_samples(TEXT, framed_tokenizer(), samples=None, seq_len=7)
    assert samples.available == 4
    assert samples.input_ids.tolist()[1] == [1, 13, 14, 15, 16, 17, 2]
    assert samples.labels.tolist()[1] == [1, 18, 19, 20, 21, 22, 2]
    bare = pair_samples(TEXT, tiny_tokenizer(), samples=2, seq_len=8)
    assert bare.input_ids.tolist() == [[*range(3, 11)], [*range(19, 27)]]
    assert bare.labels.tolist() == [[*range(11, 19)], [*range(27, 35)]]
    assert bare.manifest()["targets"] == "how the text goes on"


def test_too_little_text_or_room() -> None:
    with pytest.raises(DataError, match="has 4 pairs of inputs and targets of 7 tokens, fewer than the 5"):
        pair_samples(TEXT, framed_tokenizer(), samples=5, seq_len=7)
    with pytest.raises(UsageError, match="a sequence length of 2 leaves no room"):
        pair_samples(TEXT, framed_tokenizer(), samples=1, seq_len=2)


SMALL: dict[str, Any] = {
    "vocab_size": 60, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
T5: dict[str, Any] = {"vocab_size": 60, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "kind", "sizes", "first"),
    [
        ("T5ForConditionalGeneration", "t5", {**T5, "decoder_start_token_id": 0}, 0),
        ("T5Model", "t5", {**T5, "decoder_start_token_id": 5}, 5),
        ("BartForConditionalGeneration", "bart", {**SMALL, "decoder_start_token_id": 7}, 7),
        ("BartModel", "bart", {**SMALL, "decoder_start_token_id": 7}, 7),
        ("M2M100ForConditionalGeneration", "m2m_100", {**SMALL, "decoder_start_token_id": 9}, 9),
        ("MBartForConditionalGeneration", "mbart", {**SMALL, "decoder_start_token_id": 7}, 12),  # the last token
    ],
)
def test_families_make_their_own_decoder_inputs(name: str, kind: str, sizes: dict[str, Any], first: int) -> None:
    with torch.device("meta"):
        model = getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **sizes))
    labels = torch.tensor([[10, 11, 12]])
    assert decoder_input_ids(model, labels).tolist() == [[first, 10, 11]]
    fitted = PART.fitted(pair_samples(TEXT, tiny_tokenizer(), samples=1, seq_len=4), model)
    assert list(fitted.inputs) == ["input_ids", "decoder_input_ids"]
    assert fitted.inputs["decoder_input_ids"].tolist()[0][1:] == [7, 8, 9]
    assert PART.fitted(fitted, model) is fitted


def test_a_config_without_a_start_token_is_named() -> None:
    with torch.device("meta"):
        cls: Any = transformers.T5Model
        model = cls(transformers.AutoConfig.for_model("t5", **T5))
    model.config.decoder_start_token_id = None
    with pytest.raises(ModelError, match=r"the decoder's inputs of T5Model can't be read: .*decoder_start_token_id"):
        decoder_input_ids(model, torch.tensor([[3]]))
