"""Tasks of encoders and encoder-decoders: which model has which, the model's own loss, what is measured and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.tiny import FAMILIES, WORDS, framed_tokenizer
from torch.nn import functional

from nybble.core.errors import DataError, ModelError, UsageError
from nybble.core.progress import Silent
from nybble.data.samples import InMemory
from nybble.training.tasks import TASKS, Task, task_of
from nybble.training.tasks.translation import _search

BERT: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 24, "pad_token_id": 0, "id2label": {0: "news", 1: "sport", 2: "weather"},
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
ONE = {**BERT, "id2label": {0: "score"}}
BART: dict[str, Any] = {
    "vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 24,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
    "dropout": 0.0,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "pad_token_id": 0,
    "decoder_start_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
CLASSIFIERS = [
    ("BertForSequenceClassification", "bert", BERT), ("RobertaForSequenceClassification", "roberta", BERT),
    ("BartForSequenceClassification", "bart", {**BART, "id2label": BERT["id2label"]}),
    ("LlamaForSequenceClassification", "llama", {**FAMILIES["llama"], "id2label": BERT["id2label"]}),
]  # fmt: skip
TRANSLATORS = [
    ("BartForConditionalGeneration", "bart", BART), ("MBartForConditionalGeneration", "mbart", BART),
    ("MarianMTModel", "marian", BART), ("T5ForConditionalGeneration", "t5", T5),
]  # fmt: skip


def model(name: str, family: str, config: dict[str, Any], **more: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = getattr(transformers, name)(transformers.AutoConfig.for_model(family, **{**config, **more})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return made


def loaded(made: Any, folder: Path, rows: list[dict[str, Any]], seq_len: int = 16) -> tuple[Task, InMemory, Any]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task, origin = task_of(made, "it"), InMemory(made.config, framed_tokenizer())
    return task, origin, task.load(str(path), origin, made, seq_len, "calibration").rows


def sentences(count: int) -> list[str]:
    """Of different lengths."""
    return [" ".join(WORDS[3 + (7 * i + j) % 50] for j in range(2 + i % 5)) for i in range(count)]


@pytest.mark.parametrize(
    ("name", "family", "config", "key"),
    [
        *((*each, "classification") for each in CLASSIFIERS),
        ("BertForSequenceClassification", "bert", ONE, "regression"),
        *((*each, "translation") for each in TRANSLATORS),
        ("LlamaForCausalLM", "llama", FAMILIES["llama"], "language"),
    ],
)
def test_what_a_model_is_trained_to_do(name: str, family: str, config: dict[str, Any], key: str) -> None:
    with torch.device("meta"):
        made = getattr(transformers, name)(transformers.AutoConfig.for_model(family, **config))
    assert [other for other, task in TASKS.all().items() if task.claims(made)] == [key]
    assert TASKS.key_of(task_of(made, name)) == key


SPEECH = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("name", "family", "config"),
    [
        ("BertModel", "bert", BERT), ("BertForTokenClassification", "bert", BERT), ("LlamaModel", "llama", SPEECH),
        ("Wav2Vec2ForXVector", "wav2vec2", {**SPEECH, "num_conv_pos_embedding_groups": 2}),
        ("WhisperForConditionalGeneration", "whisper", {"num_hidden_layers": 1}),
        ("PatchTSTForPrediction", "patchtst", {"num_hidden_layers": 1}),
    ],
)  # fmt: skip
def test_what_no_task_trains(name: str, family: str, config: dict[str, Any]) -> None:
    """No head, another one, or no text: named, before any data is read."""
    with torch.device("meta"):
        made = getattr(transformers, name)(transformers.AutoConfig.for_model(family, **config))
    with pytest.raises(ModelError, match=rf"a {name}, and no training task .*classification: text classifiers"):
        task_of(made, name)


@pytest.mark.parametrize(("name", "family", "config"), CLASSIFIERS)
def test_a_classifier_is_measured_as_one_text_at_a_time_says(
    tmp_path: Path, name: str, family: str, config: dict[str, Any]
) -> None:
    made = model(name, family, config)
    texts, names = sentences(7), list(BERT["id2label"].values())
    task, origin, rows = loaded(made, tmp_path, [{"text": t, "label": names[i % 3]} for i, t in enumerate(texts)])
    tokenizer, labels = framed_tokenizer(), torch.arange(7) % 3
    alone = [made(torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in texts]
    logits = torch.stack(alone).detach()
    found = task.measure(made, origin, rows, 3, Silent())
    assert found["loss"] == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-4)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
    assert task.shown in found
    batch = task.collate(rows)
    output = made(**batch)  # the loss that it learns from is of the same records
    assert output.loss.item() == pytest.approx(found["loss"], rel=1e-4)
    assert task.counted(batch, output.logits).tolist() == [True] * 7
    said = task.samples(made, origin, rows)
    assert [each["text"] for each in said] == [names[int(each.argmax())] for each in logits[:3]]
    assert [each["target"] for each in said] == names and [each["prompt"] for each in said] == texts[:3]


def test_a_head_that_gives_one_number_is_measured_by_its_error(tmp_path: Path) -> None:
    made = model("BertForSequenceClassification", "bert", ONE)
    texts, labels = sentences(5), [0.5, 1.25, 2.0, 3.5, 4.0]
    task, origin, rows = loaded(made, tmp_path, [{"text": t, "label": x} for t, x in zip(texts, labels, strict=True)])
    found = task.measure(made, origin, rows, 2, Silent())
    logits = torch.cat([made(torch.tensor([row["input_ids"]])).logits[0] for row in rows]).detach()
    pearson = torch.corrcoef(torch.stack([logits, torch.tensor(labels)]))[0, 1].item()
    assert found["loss"] == pytest.approx(functional.mse_loss(logits, torch.tensor(labels)).item(), rel=1e-4)
    assert found["pearson"] == pytest.approx(pearson, rel=1e-4)
    assert made(**task.collate(rows)).loss.item() == pytest.approx(found["loss"], rel=1e-4)
    said = task.samples(made, origin, rows)
    assert [each["target"] for each in said] == ["0.5", "1.25", "2"] and len(task.samples(made, origin, rows[:1])) == 1
    assert float(said[1]["text"]) == pytest.approx(logits[1].item(), rel=1e-3)


@pytest.mark.parametrize(("name", "family", "config"), TRANSLATORS)
def test_a_translator_is_measured_by_its_loss_and_sacrebleu(
    tmp_path: Path, name: str, family: str, config: dict[str, Any]
) -> None:
    metrics = pytest.importorskip("sacrebleu.metrics", reason="the judge: pip install sacrebleu")
    made = model(name, family, config)
    made.generation_config.num_beams, made.generation_config.max_new_tokens = 3, 9
    texts = sentences(5)[::-1]
    tokenizer = framed_tokenizer()
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    alone = [made.generate(each, num_beams=3, do_sample=False, max_new_tokens=9)[0] for each in ids]
    said = [str(tokenizer.decode(each, skip_special_tokens=True)) for each in alone]
    targets = [say if i % 2 and say.strip() else text for i, (say, text) in enumerate(zip(said, texts, strict=True))]
    pairs = [{"source": s, "target": t} for s, t in zip(texts, targets, strict=True)]
    task, origin, rows = loaded(made, tmp_path, pairs)
    found = task.measure(made, origin, rows, 2, Silent())
    losses = [made(torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss.item() for r in rows]
    counts = [len(row["labels"]) for row in rows]
    nll = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert found["nll"] == pytest.approx(nll, rel=1e-4)
    batch = task.collate(rows)
    output = made(**batch)
    assert output.loss.item() == pytest.approx(nll, rel=1e-4)
    assert task.counted(batch, output.logits).sum() == sum(counts)
    assert found["bleu"] == pytest.approx(metrics.BLEU().corpus_score(said, [targets]).score, abs=1e-6)
    assert task.shown in found
    wanted = [{"prompt": p, "text": x, "target": y} for p, x, y in zip(texts, said, targets, strict=True)]
    assert task.samples(made, origin, rows) == wanted[:3]


def test_a_search_ends_and_draws_nothing(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="the judge: pip install sacrebleu")
    made = model("BartForConditionalGeneration", "bart", BART)
    made.generation_config.eos_token_id, made.generation_config.forced_eos_token_id = None, None
    made.generation_config.do_sample = True
    task, origin, rows = loaded(made, tmp_path, [{"source": "ba be", "target": "bi bo"}])
    one, two = (task.samples(made, origin, rows)[0]["text"] for _ in range(2))
    assert one == two and len(one.split()) <= 8  # twice the target's four tokens
    assert [len(row["labels"]) for row in rows] == [4] and _search(made, rows).max_new_tokens == 8
    assert made.generation_config.do_sample and made.generation_config.max_new_tokens is None  # the model's own stays


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert = model("BertForSequenceClassification", "bert", BERT)
    rows = [{"text": "ba", "label": "news"}]
    task_of(bert, "it").check(bert, "it", 24)
    for made, most in ((bert, 24), (model("RobertaForSequenceClassification", "roberta", BERT), 23)):
        with pytest.raises(UsageError, match=f"seq_len is {most + 1}, and it has positions for {most} tokens"):
            task_of(made, "it").check(made, "it", most + 1)
    with pytest.raises(DataError, match=r"has token \d+, and the model's embeddings have 3 rows"):
        loaded(model("BertForSequenceClassification", "bert", BERT, vocab_size=3), tmp_path, rows)
    for config, kind in ((BERT, "regression"), (ONE, "multi_label_classification")):
        with pytest.raises(ModelError, match=f"problem_type '{kind}'"):
            loaded(model("BertForSequenceClassification", "bert", config, problem_type=kind), tmp_path, rows)
    llama = model(*CLASSIFIERS[3], pad_token_id=None)
    with pytest.raises(DataError, match=r"names no padding token.*Set pad_token_id"):
        loaded(llama, tmp_path, rows)
    bart = model("BartForConditionalGeneration", "bart", BART)
    monkeypatch.setattr("nybble.training.tasks.translation.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"judged by sacrebleu: pip install 'nybble\[train\]'"):
        task_of(bart, "it").check(bart, "it", 16)
