"""Utterances as models hear them, error rates, and recognizers: what is padded doesn't matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.speech import save_speech, save_wav, tiny_recognizer, tone
from tests.tiny import framed_tokenizer
from torch.nn import functional

import nybble
from nybble.core.errors import DataError, UsageError
from nybble.data.samples import InMemory, Wanted
from nybble.data.speech import speech_samples
from nybble.data.transcripts import collapsed, edits, error_rates, normalised
from nybble.nn.packed import Packed
from nybble.pipelines.evaluate import run_eval
from nybble.walk.settings import Settings

ALL = Wanted(part="evaluation", samples=None, seq_len=1)


class Place(InMemory):
    """With a feature extractor beside the weights."""

    def __init__(self, config: Any, extractor: Any, tokenizer: Any = None) -> None:
        super().__init__(config, tokenizer)
        object.__setattr__(self, "extractor", extractor)

    def preprocessing(self) -> dict[str, Any]:
        return dict(self.extractor.to_dict())  # type: ignore[attr-defined]


def test_features_are_the_extractors_own(tmp_path: Path) -> None:
    """Each utterance by itself as in one padded batch, which the extractor makes of all."""
    folder = save_speech(tmp_path / "s", 3)
    make: Any = transformers.ParakeetFeatureExtractor
    extractor = make(feature_size=16, win_length=320)
    found = speech_samples(str(folder), InMemory(tiny_recognizer().config), ALL)
    steps = np.float64(2**15)
    sounds = [(np.round(tone(i) * (steps - 1)) / steps).astype(np.float32) for i in range(3)]
    wanted = extractor(sounds, sampling_rate=16000, return_tensors="pt")
    mask = found.inputs["attention_mask"]
    assert torch.equal(mask, wanted["attention_mask"].long()) and not mask.bool().all()
    assert torch.allclose(found.inputs["input_features"], wanted["input_features"], atol=1e-4)
    assert found.seconds == pytest.approx(sum(map(len, sounds)) / 16000)


def test_an_encoder_decoder_reads_its_answer(tmp_path: Path) -> None:
    folder, tokenizer = save_speech(tmp_path / "s", 2), framed_tokenizer()
    hear: Any = transformers.WhisperFeatureExtractor
    extractor = hear(feature_size=8, chunk_length=1)
    make: Any = transformers.WhisperConfig
    config = make(num_mel_bins=8, decoder_start_token_id=7, max_target_positions=6)
    found = speech_samples(str(folder), Place(config, extractor, tokenizer), ALL)
    assert found.inputs["input_features"].shape == (2, 8, 100)
    ids = tokenizer("one seven")["input_ids"]
    row = found.inputs["decoder_input_ids"][0][found.inputs["decoder_attention_mask"][0].bool()].tolist()
    assert row == [7, *ids[:6][:-1]]


def test_sounds_that_make_no_features_are_named(tmp_path: Path) -> None:
    save_wav(tmp_path / "short.wav", tone(0)[:200])
    place = InMemory(tiny_recognizer().config)
    with pytest.raises(DataError, match=r"short\.wav.* 200 samples"):
        speech_samples(str(tmp_path), place, ALL)
    with pytest.raises(DataError, match="has 1 utterances, fewer than the 2"):
        speech_samples(str(tmp_path), place, Wanted(part="calibration", samples=2, seq_len=1))
    make: Any = transformers.Wav2Vec2Config
    with pytest.raises(UsageError, match=r"how this model hears isn't known: preprocessor_config\.json .* is missing"):
        speech_samples(str(tmp_path), InMemory(make()), ALL)


def test_error_rates_by_hand() -> None:
    assert edits("abc", "") == 3 and edits([], [1]) == 1 and edits("flaw", "lawn") == 2
    found = error_rates(["One, two three!", "four"], ["one too three", "four five"])
    assert found == {"wer": 2 / 4, "cer": (1 + 5) / (13 + 4)}
    assert normalised("L’été 'quoted' IT'S") == "l'été quoted it's"
    assert collapsed([3, 3, 0, 3, 1, 1], blank=3) == [0, 1]
    with pytest.raises(DataError, match="no words"):
        error_rates(["--"], ["a"])


def test_error_rates_are_jiwers() -> None:
    jiwer = pytest.importorskip("jiwer")
    rng = np.random.default_rng(0)
    words = ["a", "bee", "see", "do", "it's"]
    texts = [[" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(40)] for _ in range(2)]
    found = error_rates(*texts)
    assert found["wer"] == pytest.approx(jiwer.wer(*texts), abs=1e-12)
    assert found["cer"] == pytest.approx(jiwer.cer(*texts), abs=1e-12)


# -------------------------------------------------------------------------------------------------------- recognizers
@pytest.mark.parametrize("more", [{}, {"separable": False}, {"dense": True}], ids=["quartznet", "jasper", "dense"])
def test_padding_changes_nothing(tmp_path: Path, more: dict[str, Any]) -> None:
    model = tiny_recognizer(**more)
    x = torch.randn(1, 21, 16, generator=torch.Generator().manual_seed(0))
    wide = torch.cat([x, torch.full((1, 9, 16), 7.0)], 1)
    mask = torch.tensor([[1] * 21 + [0] * 9])
    with torch.no_grad():
        alone, padded = model(x).logits, model(wide, mask).logits
    count = model._get_subsampling_output_length(mask.sum(-1)).item()
    assert alone.shape == (1, 11, 29) and count == 11
    assert torch.allclose(padded[:, :11], alone, atol=1e-5)
    depthwise = [m for m in model.modules() if isinstance(m, torch.nn.Conv1d) and m.groups > 1]
    assert bool(depthwise) == model.config.separable
    assert len(model.net.blocks[1].residuals) == (2 if model.config.dense else 1)
    model.save_pretrained(tmp_path / "it")
    back, _ = nybble.load(tmp_path / "it", dtype="float32")
    with torch.no_grad():
        assert torch.equal(back(x).logits, alone)


def test_the_loss_is_ctcs() -> None:
    """Each utterance by itself, over its own frames and characters, as torch has it."""
    model = tiny_recognizer()
    rng = torch.Generator().manual_seed(0)
    x, lengths, labels = torch.randn(2, 30, 16, generator=rng), (30, 22), [[1, 2, 2, 3], [5, 6]]
    mask = torch.tensor([[int(i < n) for i in range(30)] for n in lengths])
    given = torch.tensor([labels[0], [*labels[1], -100, -100]])
    with torch.no_grad():
        found = model(x, mask, given).loss
        own = []
        for i, count in enumerate(lengths):
            likely = functional.log_softmax(model(x[i : i + 1, :count]).logits[0], -1)
            sizes = torch.tensor([len(likely)]), torch.tensor([len(labels[i])])
            loss = functional.ctc_loss(likely, torch.tensor(labels[i]), *sizes, blank=28)
            own.append(loss.item())
    assert found.item() == pytest.approx(sum(own) / 2, rel=1e-5)


def test_from_a_folder_of_sounds_to_error_rates(tmp_path: Path) -> None:
    """What is quantized and judged on a folder, and what its texts are; all frames of an utterance and no others."""
    folder, model = str(save_speech(tmp_path / "s")), tiny_recognizer()
    model.save_pretrained(tmp_path / "m")
    settings = Settings(dtype="float32", batch=2)
    nybble.quantize(
        str(tmp_path / "m"), "minmax-int", folder, settings=settings, weights="int8 channel",
        activations="int8 tensor static", out=tmp_path / "q",
    )  # fmt: skip
    back, _ = nybble.load(tmp_path / "q", dtype="float32")
    assert sum(isinstance(layer, Packed) for layer in back.modules()) == 16
    found = run_eval({"float": str(tmp_path / "m"), "quantized": str(tmp_path / "q")}, folder, texts=2)
    assert found["data"]["words"] == 8 and found["data"]["transcripts"] == 4
    assert [each["prompt"] for each in found["samples"]] == ["one seven", "two six"]
    assert found["samples"][0]["audio"].startswith("data:audio/wav;base64,UklGR")
    samples = speech_samples(folder, InMemory(model.config), ALL)
    told = []
    for i, row in enumerate(samples.inputs["input_features"]):
        count = int(samples.inputs["attention_mask"][i].sum())
        with torch.no_grad():
            ids = model(row[None, :count]).logits[0].argmax(-1).tolist()
        told.append("".join(model.config.vocabulary[i] for i in collapsed(ids, 28)))
    assert found["samples"][0]["float"] == told[0]
    assert found["models"]["float"] == error_rates([t for t in samples.texts if t], told)
    (tmp_path / "s" / "1.txt").unlink()
    with pytest.raises(DataError, match="has 3 transcripts for 4 sounds"):
        run_eval({"float": str(tmp_path / "m")}, folder)


def test_whisper_from_a_folder(tmp_path: Path) -> None:
    folder, tokenizer = str(save_speech(tmp_path / "s")), framed_tokenizer()
    make: Any = transformers.WhisperConfig
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    config = make(
        vocab_size=len(tokenizer), d_model=16, max_source_positions=50, max_target_positions=24, num_mel_bins=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **heads, **sizes,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.WhisperForConditionalGeneration(config)
    model.generation_config.update(max_length=20, suppress_tokens=None, begin_suppress_tokens=None)
    model.save_pretrained(tmp_path / "m")
    hear: Any = transformers.WhisperFeatureExtractor
    hear(feature_size=8, chunk_length=1).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    settings = Settings(dtype="float32", batch=2)
    _, report = nybble.quantize(str(tmp_path / "m"), "gptq", folder, settings=settings, weights="int4 group=16")
    assert {row.name.split(".")[1] for row in report.layers} == {"encoder", "decoder"}
    assert report.manifest["data"]["transcripts"] == 4
    found = run_eval({"float": str(tmp_path / "m")}, folder)
    assert found["models"]["float"]["wer"] > 0
