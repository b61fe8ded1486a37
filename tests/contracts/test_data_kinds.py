"""Every kind of data: batches are the samples, side files make the same samples again, misfits are refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.speech import save_speech, tiny_recognizer
from tests.tiny import save_text, tiny_model, tiny_tokenizer
from torch import Tensor

from nybble.checkpoint.load import Beside
from nybble.checkpoint.save import save_side_files
from nybble.core.errors import DataError, FileError, UsageError
from nybble.data import (
    InMemory,
    Samples,
    TokenSamples,
    Wanted,
    image_samples,
    load_text,
    pair_samples,
    preparation_for,
    sentence_samples,
    token_samples,
)
from nybble.data.kinds import KINDS, Size, data_kind
from nybble.data.speech import speech_samples
from nybble.eval.judges import JUDGES, Judge
from nybble.models.adapter import REGISTRY, Adapter
from nybble.models.sources.side_files import copy_side_files, side_files

FROM_FILES = [name for name in KINDS.names() if name not in ("tensors", "latents")]  # the network says what these are
WANTED = Wanted(part="calibration", samples=5, seq_len=12, seed=3)
PREPROCESSOR = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.25]}


class Place:
    """Where a model of any kind comes from: its config, tokenizer and preprocessing."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def tokenizer(self) -> Any:
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = "<unk>"
        return tokenizer

    def preprocessing(self) -> dict[str, Any]:
        return PREPROCESSOR

    def side_files(self) -> dict[str, Path]:
        return {}

    def write_side_files(self, folder: Path) -> str:
        return ""


class Hearing(Place):
    """As a folder of a recognizer, whose config says how it hears."""

    def preprocessing(self) -> dict[str, Any]:
        return {}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    text = save_text(folder / "text.txt").read_text().split()
    (folder / "lines.txt").write_text("\n".join(" ".join(text[i : i + 5 + i % 9]) for i in range(0, 400, 7)))
    np.save(folder / "x.npy", np.random.default_rng(0).integers(0, 256, (7, 20, 18, 3), dtype=np.uint8))
    return {
        "tokens": str(folder / "text.txt"), "sentences": str(folder / "lines.txt"), "images": str(folder / "x.npy"),
        "pairs": str(folder / "text.txt"), "speech": str(save_speech(folder / "speech", count=7)),
    }  # fmt: skip


def place(name: str) -> Place:
    if name == "speech":
        return Hearing(tiny_recognizer().config)
    make: Any = transformers.ViTConfig if name == "images" else transformers.BertConfig
    return Place(make(image_size=16, patch_size=8) if name == "images" else make(vocab_size=300))


def prepared(name: str, sources: dict[str, str]) -> Samples:
    return data_kind(name).prepare(sources[name], place(name), WANTED)


def test_every_kind_has_a_judge_and_every_adapter_a_kind() -> None:
    assert KINDS.names() == JUDGES.names() == ["images", "latents", "pairs", "sentences", "speech", "tensors", "tokens"]
    assert all(isinstance(judge, Judge) and judge.metrics for judge in JUDGES.all().values())
    adapters: dict[str, Adapter] = REGISTRY.all()
    assert {adapter.reads for adapter in adapters.values()} == set(KINDS.names())


@pytest.mark.parametrize("name", FROM_FILES)
def test_samples_are_those_of_the_kinds_own_function(name: str, sources: dict[str, str]) -> None:
    """What is chosen, and the digest that manifests and benchmark files state, don't depend on the way there."""
    origin = place(name)
    if name == "images":
        own: Any = image_samples(sources[name], preparation_for(origin.config, PREPROCESSOR), samples=5, seed=3)
    elif name == "speech":
        own = speech_samples(sources[name], origin, WANTED)
    else:
        cuts: Any = {"tokens": token_samples, "sentences": sentence_samples, "pairs": pair_samples}
        cut = cuts[name]
        text = load_text(sources[name], "calibration")
        own = cut(text, origin.tokenizer(), samples=5, seq_len=12, seed=3)
    found = prepared(name, sources)
    assert found.manifest() == own.manifest()
    for key, tensor in own.inputs.items():
        assert torch.equal(found.inputs[key], tensor)


@pytest.mark.parametrize("name", FROM_FILES)
def test_batches_and_probe(name: str, sources: dict[str, str]) -> None:
    kind, samples = data_kind(name), prepared(name, sources)
    batches = [kind.batch(samples.inputs, start, start + 2, "cpu") for start in (0, 2, 4)]
    for key, tensor in samples.inputs.items():
        assert torch.equal(torch.cat([batch.inputs[key] for batch in batches]), tensor)
    if name == "sentences":
        mask = samples.inputs["attention_mask"].bool()
        assert not mask.all()
        assert torch.equal(torch.cat([batch.real for batch in batches if batch.real is not None]), mask)
    else:
        assert all(batch.real is None for batch in batches)
    probe = kind.probe(samples.inputs, "meta")
    assert probe.keys() == samples.inputs.keys()
    assert all(tensor.is_meta and tensor.shape[0] == 1 for tensor in probe.values())
    size = kind.size(samples)
    if name == "images":
        assert size == Size(5, 2)  # 16 x 16 pixels: a patch and the class token
    elif name == "speech":
        assert size == Size(5, samples.inputs["input_features"].shape[1])
    else:
        assert size == Size(*samples.inputs["input_ids"].shape)
        assert probe["input_ids"].shape == (1, 4)


@pytest.mark.parametrize("name", FROM_FILES)
def test_side_files_make_the_same_samples(name: str, sources: dict[str, str], tmp_path: Path) -> None:
    origin, kind = place(name), data_kind(name)
    came, result = tmp_path / "came", tmp_path / "result"
    came.mkdir()
    if name == "images":
        (came / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    elif name != "speech":
        origin.tokenizer().save_pretrained(came)
    copy_side_files(side_files(came), result)
    beside = Beside(result, origin.config)
    again = kind.prepare(sources[name], beside, WANTED)
    assert again.manifest() == prepared(name, sources).manifest()
    tokenizer = kind.tokenizer(beside)
    assert tokenizer is None if name in ("images", "speech") else tokenizer is not None and tokenizer.get_vocab()
    assert (result / "preprocessor_config.json").exists() == (name == "images")


def test_generation_settings_stand_beside_the_weights(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.generation_config.temperature, model.generation_config.do_sample = 0.25, True
    origin: Any = place("tokens")
    save_side_files(data_kind("tokens"), origin, model, tmp_path)
    assert transformers.GenerationConfig.from_pretrained(tmp_path).temperature == 0.25
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"generation_config\.json: Not a directory"):
        save_side_files(data_kind("images"), origin, model, tmp_path / "file" / "inside")


class Given:
    """A caller's own samples."""

    def __init__(self, **inputs: Tensor) -> None:
        self.inputs, self.source, self.available, self.tokens = inputs, "mine", 1, 1

    def manifest(self) -> dict[str, Any]:
        return {}


MODEL = SimpleNamespace(
    config=SimpleNamespace(num_channels=3, get_text_config=lambda: SimpleNamespace(n_positions=8)),
    get_input_embeddings=lambda: torch.nn.Embedding(20, 2),
)


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("tokens", {"input_ids": torch.zeros(2, 9, dtype=torch.int64)}, "sequences of 9 tokens, and the model takes 8"),
        ("tokens", {"input_ids": torch.full((2, 8), 20)}, "token 20, and the model's embeddings have 20 rows"),
        ("sentences", {"input_ids": torch.full((2, 8), 20)}, "token 20, and the model's embeddings have 20 rows"),
        ("sentences", {"input_ids": torch.zeros(2, 8), "attention_mask": torch.ones(3, 8)}, "2 of input_ids, 3 of att"),
        ("tokens", {}, "has no inputs"),
        ("images", {"pixel_values": torch.zeros(0, 3, 4, 4)}, "0 of pixel_values"),
        ("images", {"pixel_values": torch.zeros(2, 1, 4, 4)}, "have 1 channels, and the model takes 3"),
        ("images", {"pixel_values": torch.zeros(2, 4, 4)}, r"the data has pixel_values \[2, 4, 4\]"),
        ("images", {"input_ids": torch.zeros(2, 9)}, r"takes pixel_values .* the data has input_ids \[2, 9\]"),
    ],
)
def test_misfits_are_refused(name: str, inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(DataError, match=message):
        data_kind(name).check(Given(**inputs), MODEL)


def test_what_fits_is_taken() -> None:
    data_kind("tokens").check(Given(input_ids=torch.full((2, 8), 19)), MODEL)
    data_kind("tokens").check(Given(inputs_embeds=torch.zeros(2, 99, 4)), MODEL)  # a caller's own
    data_kind("images").check(Given(pixel_values=torch.zeros(2, 3, 4, 4)), MODEL)


def test_what_a_place_does_not_have() -> None:
    memory = InMemory(place("images").config)
    with pytest.raises(UsageError, match="has no tokenizer here; give tokenizer="):
        data_kind("tokens").prepare("builtin", memory, WANTED)
    for part, done in (("calibration", "calibrated"), ("evaluation", "judged")):
        wanted: Any = Wanted(part=part, samples=None, seq_len=2)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=f"is {done} on images; give them with --data"):
            data_kind("images").prepare("builtin", memory, wanted)
    with pytest.raises(UsageError, match=r"unknown kind of data 'image'\. Did you mean 'images'"):
        data_kind("image")


def test_evaluation_takes_the_other_half() -> None:
    """Of ``builtin``: what a model was calibrated on is not what it is judged on."""
    halves = [
        data_kind("tokens").prepare("builtin", place("tokens"), Wanted(part=part, samples=2, seq_len=8))
        for part in ("calibration", "evaluation")
    ]
    assert all(isinstance(half, TokenSamples) for half in halves)
    assert halves[0].manifest()["source_sha256"] != halves[1].manifest()["source_sha256"]
