"""Damaged models of every layout: read, or refused in nybble's own words; benchmarks/fuzz runs a hundred thousand.

Config, headers, indices, shapes, dtypes and numbers are changed, files cut or left out. Another error, 2 seconds,
64 MiB, a file elsewhere or a message of a thousand words is a fault.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from benchmarks.fuzz.folders import folders
from benchmarks.fuzz.judge import FaultError, read, watched
from benchmarks.fuzz.mutate import damaged
from benchmarks.fuzz.run import files_of, put, trials

import nybble
from nybble.core.errors import FileError

TRIALS = 36
READERS = (
    "compressed-tensors pack int4 zeros", "compressed-tensors with activations and a cache",
    "compressed-tensors experts", "bitsandbytes nf4 nested", "gptq of own bits", "awq", "auto-round", "modelopt NVFP4",
    "modelopt mixed", "mlx", "mxfp4", "float in shards", "nybble",
)  # fmt: skip


@pytest.fixture
def quiet() -> Iterator[None]:
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    with torch.no_grad():
        yield
    transformers.logging.set_verbosity(before)


@pytest.mark.filterwarnings("ignore")  # other libraries have much to say about damaged files
@pytest.mark.parametrize("name", READERS)
def test_nothing_but_own_errors(name: str, tmp_path: Path, quiet: None) -> None:
    whole = files_of(folders()[name](tmp_path))
    there = tmp_path / "it"
    there.mkdir()
    put(whole, there, {})
    assert read(there, 2) == "read"
    put({}, there, whole)
    at = [""]
    with watched(at):
        outcomes, kinds, faults = trials(name, whole, there, range(TRIALS), 1, at)
    assert not faults
    assert outcomes["read"] < TRIALS - 8 and outcomes.total() == TRIALS  # most trials reach a check
    assert len(kinds) > 4


def test_the_judge_sees_what_it_is_to_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is none of nybble's, memory, a file elsewhere, an error that is its own cause."""
    from nybble.models.sources import open as opened

    def elsewhere(spec: str) -> None:
        (tmp_path / "secret").read_bytes()
        raise FileError("a message of some length")

    def circular(spec: str) -> None:
        error = FileError("a message of some length")
        raise error from error

    def greedy(spec: str) -> None:
        try:
            raise MemoryError
        except MemoryError as error:
            raise FileError("a message of some length") from error

    def wrong(spec: str) -> None:
        raise KeyError(spec)

    (tmp_path / "secret").write_text("x")
    (tmp_path / "it").mkdir()
    for made, text in ((elsewhere, "opened"), (circular, "own cause"), (greedy, "memory"), (wrong, "KeyError escaped")):
        monkeypatch.setattr(opened, "open_source", made)
        with watched([""]), pytest.raises(FaultError, match=text):
            read(tmp_path / "it", 0)


def test_no_error_is_its_own_cause(tmp_path: Path) -> None:
    folder = folders()["nybble"](tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layouts"] = [{}]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileError) as caught:
        nybble.load(folder)
    seen: list[BaseException | None] = [caught.value]
    while seen[-1] is not None:
        assert seen[-1].__cause__ not in seen
        seen.append(seen[-1].__cause__)


def test_damage_is_of_many_kinds_and_always_the_same() -> None:
    files = {"config.json": b'{"a": [1, {"b": "c"}], "quantization_config": {"bits": 4}}', "x.gguf": bytes(range(64))}
    first = [damaged(files, random.Random(i)) for i in range(200)]
    assert first == [damaged(files, random.Random(i)) for i in range(200)]
    assert sum(found != files for _, found in first) > 150
    assert set(Counter(what for what, _ in first)) == {"bytes", "cut"}
