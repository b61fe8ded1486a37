"""Recognizers in training: what the loss, the labels and the measures are of; what has no transcript is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from tests.speech import save_speech, tiny_recognizer

import nybble
from nybble.core.errors import DataError
from nybble.core.progress import Silent
from nybble.data.audio import read_sound
from nybble.data.samples import InMemory
from nybble.models.sources.open import open_source
from nybble.pipelines.evaluate import run_eval
from nybble.pipelines.train import train
from nybble.training.settings import TrainSettings
from nybble.training.tasks import TASKS, task_of


def loaded(folder: Path, model: Any) -> tuple[Any, Any]:
    task = task_of(model, "it")
    return task, task.load(str(folder), InMemory(model.config), model, 1, "evaluation")


def test_labels_are_characters_and_measures_of_the_whole_set(tmp_path: Path) -> None:
    model = tiny_recognizer()
    (save_speech(tmp_path) / "0.txt").write_text("Öne, two!")
    task, found = loaded(tmp_path, model)
    assert TASKS.key_of(task) == "recognition"
    spelled = "".join(model.config.vocabulary[i] for i in found.rows[0]["labels"])
    assert spelled == "ne two"  # what the vocabulary hasn't is left out
    batch = task.collate(found.rows)
    assert (batch["labels"] >= 0).sum() == found.targets == sum(len(row["labels"]) for row in found.rows)
    together = task.measure(model, InMemory(model.config), found.rows, 4, Silent())
    assert together == task.measure(model, InMemory(model.config), found.rows, 1, Silent())
    assert task.samples(model, InMemory(model.config), found.rows)[1]["target"] == "two six"


def test_what_cannot_be_spelled_is_refused(tmp_path: Path) -> None:
    model = tiny_recognizer()
    text = save_speech(tmp_path, 2) / "1.txt"
    for said, message in (("aa" * 8, "16 characters .* gives 14 frames"), ("123", "0 characters")):
        text.write_text(said)
        with pytest.raises(DataError, match=message):
            loaded(tmp_path, model)
    text.unlink()
    with pytest.raises(DataError, match=r"nothing says what is said in .*1\.wav"):
        loaded(tmp_path, model)


def test_wav2vec2_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """Tokenizer, extractor, mask and blank are the model's own; so is what a judge and the task make of it."""
    letters = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz"])}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    tokenizer = cast(Any, transformers.Wav2Vec2CTCTokenizer)(str(tmp_path / "vocab.json"))
    hears: Any = transformers.Wav2Vec2FeatureExtractor
    ears, make = hears(return_attention_mask=True), cast(Any, transformers.Wav2Vec2Config)
    config = make(
        vocab_size=len(letters), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8), conv_stride=(5, 64), conv_kernel=(10, 64), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cast(Any, transformers.Wav2Vec2ForCTC)(config).eval()
    model.lm_head.weight.data *= 60  # so that letters change from frame to frame
    folder = save_speech(tmp_path / "s")
    for part in (model, tokenizer, ears):
        part.save_pretrained(tmp_path / "m")
    found = run_eval({"it": str(tmp_path / "m")}, str(folder), texts=4)
    sounds = [read_sound(folder / f"{i}.wav", 16000) for i in range(4)]
    given = ears(sounds, sampling_rate=16000, padding=True, return_tensors="pt")
    back = nybble.load(tmp_path / "m")[0]
    with torch.no_grad():
        logits = back(given["input_values"].to(back.dtype), attention_mask=given["attention_mask"]).logits
    frames = model._get_feat_extract_output_lengths(given["attention_mask"].sum(-1)).tolist()
    wanted = [tokenizer.decode(row[:n].argmax(-1)).replace("<unk>", "") for row, n in zip(logits, frames, strict=True)]
    assert [each["it"] for each in found["samples"]] == wanted and all(wanted)
    rows = task_of(model, "it").load(str(folder), open_source(str(tmp_path / "m")), model, 1, "evaluation").rows
    assert tokenizer.decode(rows[0]["labels"], group_tokens=False) == "one seven"


def test_training_spells_better(tmp_path: Path) -> None:
    """From a folder to a quantized folder: the loss of what it is trained on falls, through fake-quantized layers."""
    pytest.importorskip("nybble.training.loop", reason="needs accelerate, which nybble's extra 'train' brings")
    folder = str(save_speech(tmp_path / "s"))
    tiny_recognizer().save_pretrained(tmp_path / "m")
    settings = TrainSettings(steps=8, batch=4, accumulate=1, lr=1e-2, dtype="float32", clip=1.0)
    found = train(
        "qat", tmp_path / "m", tmp_path / "out", folder, judged_on=folder, settings=settings,
        weights="int8 channel", activations="int8 tensor", options={"learned": {"weights": "lsq"}},
    )  # fmt: skip
    assert found["curve"][-1][1] < 0.8 * found["curve"][0][1]
    assert set(found["evaluation"]["models"]["after"]) == {"wer", "cer"}
