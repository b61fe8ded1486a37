"""Data that a caller hands over in Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import WORDS, input_ids, logits, tiny_model, tiny_tokenizer

import nybble
from nybble.core.errors import DataError, UsageError
from nybble.data import load_text, token_samples

TEXTS = [" ".join(WORDS[3 + i : 30 + i]) for i in range(20)]
LINE = "int4 group=16 scale_format=float16"


def quantized(data: Any, **more: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    model, report = nybble.quantize(tiny_model(), "gptq", data, weights=LINE, settings={"seq_len": 16}, **more)
    return logits(model), report.manifest["data"]


def test_texts_are_cut_as_a_file_of_them_is(tmp_path: Any) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    tokenizer = tiny_tokenizer()
    file = load_text(str(tmp_path / "texts.jsonl"), "calibration", tokenizer)
    cut = token_samples(file, tokenizer, samples=128, seq_len=16, seed=0, fewer=True)
    wanted, _ = quantized(cut)
    found, manifest = quantized(TEXTS, tokenizer=tokenizer)
    assert torch.equal(found, wanted)
    assert manifest["source_sha256"] == file.sha256 and manifest["tokens_sha256"] == cut.sha256


def test_every_way_to_give_the_same_tokens() -> None:
    ids = input_ids()
    plain, _ = quantized(tiny_text_samples(ids))
    ways: list[Any] = [ids, {"input_ids": ids}, [ids[0], ids[1]], [ids[:1], ids[1:]]]
    ways += [[{"input_ids": row} for row in ids], [{"input_ids": row.tolist()} for row in ids]]
    manifests = []
    for way in ways:
        found, manifest = quantized(way)
        assert torch.equal(found, plain)
        manifests.append(manifest)
    assert all(manifest == manifests[0] for manifest in manifests)
    assert manifests[0]["inputs"] == {"input_ids": [2, 12]} and manifests[0]["samples"] == 2


def tiny_text_samples(ids: torch.Tensor) -> Any:
    from nybble.data import TokenSamples

    return TokenSamples(
        input_ids=ids, sha256="", tokens=ids.numel(), available=2, source="here", source_sha256="", note=""
    )


def test_padding_is_masked_and_counts_for_nothing() -> None:
    ids = input_ids()
    found, manifest = quantized([ids[0], ids[1, :7]])
    assert manifest["inputs"] == {"input_ids": [2, 12], "attention_mask": [2, 12]}
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    other = torch.where(mask.bool(), ids, 40)  # something else where the padding is
    assert torch.equal(quantized({"input_ids": other, "attention_mask": mask})[0], found)
    assert not torch.equal(quantized({"input_ids": other})[0], found)


def test_images_without_a_name_are_what_the_network_sees() -> None:
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    line = "int8 tensor static"
    scales = []
    for data in (images, [images[:2], images[2:]], {"pixel_values": images}):
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5))
        made, _ = nybble.quantize(network, "rtn", data, weights="int8 channel", activations=line)
        scales.append(float(made[0].inputs.params().scale))
    assert scales == [pytest.approx(float(images.max()) / 127)] * 3


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (TEXTS, UsageError, "give tokenizer="),
        (5, UsageError, "data is a int; it can be"),
        ([*TEXTS, None], UsageError, "list of NoneType, str"),
        ([], DataError, "empty list"),
        ({}, DataError, "without inputs"),
        (torch.rand(2, 4), DataError, "token ids are integers"),
        (torch.tensor([[4, -100]]), DataError, "token -100"),
        (torch.zeros(0, 4, dtype=torch.int64), DataError, "shape"),
        ([{"input_ids": [3]}, {"inputs": [3]}], DataError, "different inputs"),
        ({"input_ids": ["a"]}, DataError, "no tensor"),
    ],
)
def test_what_is_no_data_is_named(data: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        quantized(data)


def test_images_are_no_texts() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    with pytest.raises(UsageError, match="reads no text"):
        nybble.quantize(network, "rtn", TEXTS, weights="int8 channel", activations="int8 tensor static")
