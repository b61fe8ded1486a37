"""Text as inputs and targets: what stands where, and the decoder's inputs as each family's own code makes them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.tiny import WORDS, framed_tokenizer, tiny_tokenizer, two_language_tokenizer

import nybble
from nybble.calibration.trace import capture_block_calls
from nybble.core.errors import DataError, ModelError, UsageError
from nybble.data import load_text, make_source, pair_samples
from nybble.data.kinds.pairs import PART, decoder_input_ids
from nybble.data.rows import row_record
from nybble.pipelines.evaluate import judge_folder

TEXT = make_source([" ".join(WORDS[3:43])], name="words", note="")


def test_targets_go_on_where_inputs_end() -> None:
    samples = pair_samples(TEXT, framed_tokenizer(), samples=None, seq_len=7)
    assert samples.available == 4
    assert samples.input_ids.tolist()[1] == [1, 13, 14, 15, 16, 17, 2]
    assert samples.labels.tolist()[1] == [1, 18, 19, 20, 21, 22, 2]
    bare = pair_samples(TEXT, tiny_tokenizer(), samples=2, seq_len=8)
    assert bare.input_ids.tolist() == [[*range(3, 11)], [*range(19, 27)]]
    assert bare.labels.tolist() == [[*range(11, 19)], [*range(27, 35)]]
    assert bare.manifest()["targets"] == "how the text goes on"


@pytest.mark.parametrize(("source", "target"), [("source", "target"), ("text", "summary"), ("text", "translation")])
def test_targets_that_a_file_gives(tmp_path: Path, source: str, target: str) -> None:
    """Padded on the right; the decoder's inputs are the family's, and padding is marked for both sides."""
    rows = [{source: "bo bu ba", target: "ca ce"}, {source: " ".join(WORDS[3:43]), target: "da"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    tokenizer = framed_tokenizer()
    tokenizer.pad_token = "<unk>"
    ids = dict(zip(WORDS, range(len(WORDS)), strict=True))
    found = pair_samples(load_text(str(tmp_path / "pairs.jsonl"), "calibration"), tokenizer, samples=None, seq_len=6)
    assert found.input_ids.tolist() == [[1, ids["bo"], ids["bu"], ids["ba"], 2, 0], [1, 3, 4, 5, 6, 2]]
    assert found.labels.tolist() == [[1, ids["ca"], ids["ce"], 2], [1, ids["da"], 2, -100]]
    assert (found.tokens, found.available) == (11, 2)
    assert found.manifest()["targets"] == "given with the text"
    with torch.device("meta"):
        cls: Any = transformers.BartForConditionalGeneration
        model = cls(transformers.AutoConfig.for_model("bart", **SMALL, decoder_start_token_id=7))
    fitted = PART.fitted(found, model)
    assert fitted.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert fitted.inputs["decoder_input_ids"].tolist() == [[7, 1, ids["ca"], ids["ce"]], [7, 1, ids["da"], 2]]
    assert fitted.inputs["decoder_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_given_targets_are_those_of_the_picked_rows_in_their_own_tokens() -> None:
    tokenizer = two_language_tokenizer()
    rows = [{"text": WORDS[10 + i], "target": WORDS[20 + i]} for i in range(8)]
    source = make_source([row_record(row, "x", None) for row in rows], name="x", note="")
    found = pair_samples(source, tokenizer, samples=3, seq_len=4, seed=1)
    picked = [row[0] - 10 for row in found.input_ids.tolist()]
    assert picked != [0, 1, 2]
    assert found.input_ids.tolist() == [[10 + i, 2] for i in picked]
    # one longer than the inputs: by its length a tensor shows whose it is
    assert found.labels.tolist() == [[20 + i, 1, -100] for i in picked]


def test_padding_of_a_decoder_is_its_own() -> None:
    cls: Any = transformers.BartForConditionalGeneration
    model = cls(transformers.AutoConfig.for_model("bart", **SMALL, decoder_start_token_id=2)).eval()
    real = torch.tensor([[1, 1, 0], [1, 1, 1]])
    given = {
        "input_ids": torch.full((2, 4), 5), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]),
        "decoder_input_ids": torch.full((2, 3), 6), "decoder_attention_mask": real,
    }  # fmt: skip
    for end, mask in ((None, given["attention_mask"]), (torch.zeros(2, 4, 8), real)):
        (call,) = capture_block_calls(model, given, end=end)
        assert call.mask is not None and call.mask.tolist() == mask.bool().tolist()


def test_targets_of_some_records_are_refused() -> None:
    tokenizer = framed_tokenizer()
    tokenizer.pad_token = "<unk>"
    rows = [{"text": "ba be", "target": "bi"}, {"text": "bo"}]
    source = make_source([row_record(row, "x", None) for row in rows], name="x", note="")
    with pytest.raises(DataError, match="'x' has no target for 1 of 2 records"):
        pair_samples(source, tokenizer, samples=None, seq_len=6)
    with pytest.raises(DataError, match=r"'translation' holds en and de.*'source' and 'target'"):
        row_record({"translation": {"en": "a", "de": "b"}}, "x", None)


def test_calibrated_and_judged_on_given_targets(tmp_path: Path) -> None:
    """The judge's perplexity is that of transformers' own loss, and calibration leaves padding out on both sides."""
    torch.manual_seed(0)
    cls: Any = transformers.BartForConditionalGeneration
    model = cls(transformers.AutoConfig.for_model("bart", **SMALL, decoder_start_token_id=2, bos_token_id=1)).eval()
    tokenizer = framed_tokenizer()
    tokenizer.pad_token = "<unk>"
    rows = [{"source": "bo bu ba", "target": "ca ce"}, {"source": "da de di do du", "target": "fa fe fi fo"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    model.save_pretrained(tmp_path / "float")
    tokenizer.save_pretrained(tmp_path / "float")
    seen: dict[str, float] = {}
    for name, module in model.named_modules():
        if name.endswith(("decoder.layers.0.fc1", "encoder.layers.0.fc1")):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.update(
                    {name: max(seen.get(name, 0), float(args[0].detach().abs().max()))}
                )
            )
    for row in rows:  # one by one, so that nothing is padded
        labels = tokenizer(text_target=row["target"], return_tensors="pt")["input_ids"]
        model(**tokenizer(row["source"], return_tensors="pt"), labels=labels)
    scheme = {"weights": "int8 channel", "inputs": "int2 tensor static", "targets": [r"re:.*layers\.0\.fc1"]}
    recipe = {"name": "x", "scheme": scheme, "steps": [{"solver": "rtn"}]}
    settings = nybble.Settings(samples=2, seq_len=8, dtype=torch.float32)
    out, report = nybble.quantize(
        tmp_path / "float", recipe, tmp_path / "pairs.jsonl", out=tmp_path / "q", settings=settings
    )
    assert {row.name: row.input_scale for row in report.layers} == {
        n: pytest.approx(x, rel=1e-4) for n, x in seen.items()
    }
    found = judge_folder(out, str(tmp_path / "float"), str(tmp_path / "pairs.jsonl"), seq_len=8, device="cpu")
    total = 0.0
    with torch.no_grad():
        for row in rows:
            labels = tokenizer(text_target=row["target"], return_tensors="pt")["input_ids"]
            loss = model(**tokenizer(row["source"], return_tensors="pt"), labels=labels).loss
            total += float(loss) * labels.numel()
    assert found["data"]["predictions"] == 4 + 6
    assert found["models"]["float"]["ppl"] == pytest.approx(math.exp(total / 10), rel=0.01)


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
