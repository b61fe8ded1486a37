"""``nybble train`` in several processes: one process's bytes, files of one of them, an error in one stops all."""

from __future__ import annotations

import json
import os
import random
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.tiny import WORDS, save_tiny
from torch.multiprocessing.spawn import spawn

from nybble.cli import main
from nybble.core.errors import LearningError, UsageError
from nybble.core.progress import Silent
from nybble.pipelines.dataset import generate_dataset
from nybble.pipelines.train import train
from nybble.training import objective
from nybble.training.generated import Generation
from nybble.training.settings import TrainSettings

pytest.importorskip("peft", reason="needs PEFT, which nybble's extra 'train' brings")
pytest.importorskip("accelerate", reason="needs accelerate, which nybble's extra 'train' brings")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")

SETTINGS = TrainSettings(steps=3, batch=1, accumulate=3, seq_len=12, lr=0.01, save_every=1, dtype="float32")
LOOP = {"steps": 3, "batch": 1, "accumulate": 3, "seq_len": 12, "lr": 0.01, "save_every": 1, "dtype": "float32"}
INT4 = {"weights": "int4 group=16"}
RUNS: dict[str, dict[str, Any]] = {
    "stages": {
        "recipe": "qat",
        "scheme": INT4,
        "options": {"stages": [{"scheme": {"weights": "int8 group=16"}}], "losses": {"task": 1.0, "logits": 1.0}},
    },
    "scales": {"recipe": "distill", "weights": "int4 group=16", "options": {"what": ["scales", "norms"]}},
    "adapters": {"recipe": "qlora", "options": {"rank": 2, "dropout": 0.5}, "merge": True},
    "own": {"recipe": "llm-qat", "weights": "int4 group=16", "activations": "int8 token", "data": "self:5"},
}
"""Three forwards an update: two of one process, one of the other."""
WITHOUT_COMMAND = ("stages", "scales", "adapters")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    save_tiny(made / "model", dtype=torch.float32)
    rng = random.Random(0)
    for name, count in (("data.jsonl", 8), ("held.jsonl", 1)):
        lines = [{"text": " ".join(rng.choices(WORDS[3:13], k=rng.randint(3, 9)))} for _ in range(count)]
        (made / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made


def _train(folder: Path, out: Path, name: str, **more: Any) -> dict[str, Any]:
    settings = LOOP if name == "own" else SETTINGS
    given = {"model": folder / "model", "data": str(folder / "data.jsonl"), "settings": settings, **RUNS[name], **more}
    return train(out=out, **given)


class _Stops(Silent):
    """An error behind an update, or a text, of the process that is told."""

    def __init__(self, behind: int, of: str = "training") -> None:
        self.left, self.of = behind, of

    def start(self, total: int, what: str) -> None:
        self.what = what

    def advance(self, n: int = 1, note: str = "") -> None:
        self.left -= n * (self.what == self.of)
        if self.left <= 0 and self.what == self.of:
            raise RuntimeError("stopped")  # which ends the other process as well


def _all(folder: Path, out: Path) -> None:
    for name in RUNS if not dist.is_initialized() else WITHOUT_COMMAND:
        judged = str(folder / "held.jsonl") if name == "stages" else None  # answers take longest of all
        found = _train(folder, out / name, name, judged_on=judged)
        (out / f"{name}.{_rank()}.said").write_text(json.dumps({**found, "out": "", "seconds": 0}))


def _stopped(folder: Path, out: Path) -> None:
    """In the second stage: resumed by two processes, then once more by one in the test."""
    for name in ("two", "one"):
        with pytest.raises(Exception, match="stopped"):
            _train(folder, out / name, "stages", progress=_Stops(5))
    again = replace(SETTINGS, resume=True)
    _train(folder, out / "two", "stages", settings=again)


def _failing(folder: Path, out: Path) -> None:
    """What one process finds wrong ends both."""
    said = []
    with pytest.raises(UsageError) as few:
        _train(folder, out / "few", "scales", settings=replace(SETTINGS, accumulate=1, batch=4))
    said.append(str(few.value))
    plain, rank = objective.Objective.__call__, _rank()
    if rank == 1:
        objective.Objective.__call__ = lambda *given: plain(*given) * float("nan")  # type: ignore[method-assign]
    with pytest.raises(LearningError) as wrong:
        _train(folder, out / "nan", "scales")
    objective.Objective.__call__ = plain  # type: ignore[method-assign]
    said.append(str(wrong.value))
    with pytest.raises(UsageError) as other:
        _train(folder, out / "other", "scales", settings=replace(SETTINGS, seed=rank))
    said.append(str(other.value))
    (out / f"{rank}.json").write_text(json.dumps(said))


WORKS = ("_all", "_stopped", "_failing", "_texts", "_command")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _texts(folder: Path, out: Path) -> None:
    """Six batches, the last one short: three of each; killed once, and gone on with."""
    given: dict[str, Any] = {"options": Generation(count=11, length=9, batch=2), "dtype": "float32"}
    found = generate_dataset(str(folder / "model"), out / "whole.jsonl", **given)
    with pytest.raises(Exception, match="stopped"):
        generate_dataset(str(folder / "model"), out / "cut.jsonl", **given, progress=_Stops(5, "texts"))
    again = generate_dataset(str(folder / "model"), out / "cut.jsonl", **given, resume=True)
    (out / f"{_rank()}.json").write_text(json.dumps([{**found, "out": ""}, {**again, "out": ""}]))


def _command(folder: Path, out: Path) -> None:
    """As torchrun starts it; accelerate would average gradients with the other process, did it see these variables."""
    launched = {"RANK": _rank(), "LOCAL_RANK": _rank(), "WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "run"}
    os.environ |= {name: str(value) for name, value in launched.items()}
    given = ["--weights", "int4 group=16", "--activations", "int8 token", "--data", "self:5"]
    loop = [word for name, value in LOOP.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    sys.argv = ["nybble", "train", "llm-qat", str(folder / "model"), str(out / "own"), *given, *loop, "--json"]
    with redirect_stdout(StringIO()) as said, pytest.raises(SystemExit) as ended:
        main()
    (out / f"{_rank()}.json").write_text(json.dumps([ended.value.code or 0, said.getvalue()]))


def _worker(rank: int, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2)
    try:
        for work in WORKS:
            globals()[work](folder, out / work)
    finally:
        dist.destroy_process_group()


def files(out: Path) -> dict[str, bytes]:
    """By name, with paths of the folder itself made alike; seconds are no result."""
    found = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    kept = {n: b for n, b in found.items() if n != "times.json" and not n.startswith("logs/")}
    return {name: data.replace(str(out).encode(), b"OUT") for name, data in kept.items()}


@pytest.fixture(scope="module")
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave."""
    out = tmp_path_factory.mktemp("pair")
    for work in WORKS:
        (out / work).mkdir()
    spawn(_worker, (folder, out), nprocs=2)  # type: ignore[no-untyped-call]
    return out


@pytest.fixture(scope="module")
def one(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, threads = tmp_path_factory.mktemp("one"), torch.get_num_threads()
    torch.set_num_threads(1)
    _all(folder, out)
    (out / "texts").mkdir()
    _texts(folder, out / "texts")
    torch.set_num_threads(threads)
    return out


@pytest.mark.parametrize("name", WITHOUT_COMMAND)
def test_two_come_to_the_bytes_of_one(pair: Path, one: Path, name: str) -> None:
    """Forwards with dropout, stages, base and merged model, texts that the model made, and what is said of it all."""
    alone, shared = files(one / name), files(pair / "_all" / name)
    assert alone.keys() == shared.keys() and any(path.endswith(".safetensors") for path in alone)
    assert [path for path in alone if alone[path] != shared[path]] == []
    assert len(json.loads(alone["training.json"])["curve"]) == 3 * (2 if name == "stages" else 1)
    said = [(pair / "_all" / f"{name}.{rank}.said").read_text() for rank in range(2)]
    assert said == [(one / f"{name}.0.said").read_text().replace(str(one / name), str(pair / "_all" / name))] * 2
    assert not list((pair / "_all").glob("*.partial"))


def test_gone_on_with_by_two_or_by_one(folder: Path, pair: Path, one: Path) -> None:
    wanted = files(one / "stages")
    assert (pair / "_stopped" / "one.partial" / "checkpoints" / "stage-0.safetensors").exists()
    again = replace(SETTINGS, resume=True)
    _train(folder, pair / "_stopped" / "one", "stages", settings=again)
    for name in ("two", "one"):
        found = files(pair / "_stopped" / name)
        assert found["model.safetensors"] == wanted["model.safetensors"], name


def test_an_error_in_one_stops_all(pair: Path) -> None:
    """And leaves nothing half-written."""
    (few, wrong, other), second = (json.loads((pair / "_failing" / f"{rank}.json").read_text()) for rank in range(2))
    assert few.startswith("accumulate is 1, and 2 processes share the forwards of an update; give accumulate 2 or more")
    assert wrong == "the loss of update 1 is nan; use a smaller lr, or dtype float32."
    assert other == "the processes are asked for different things: settings.seed is 0; of rank 1 1."
    assert second == [few, wrong, other]
    left = sorted(path.name for path in (pair / "_failing").iterdir() if path.is_dir())
    assert left in ([], ["nan.partial"])


def test_texts_are_shared(pair: Path, one: Path) -> None:
    wanted = (one / "texts" / "whole.jsonl").read_bytes()
    assert len(wanted.splitlines()) == 11
    for name in ("whole", "cut"):
        assert (pair / "_texts" / f"{name}.jsonl").read_bytes() == wanted
    said = [json.loads((pair / "_texts" / f"{rank}.json").read_text()) for rank in range(2)]
    assert said == [json.loads((one / "texts" / "0.json").read_text())] * 2
    assert not list((pair / "_texts").glob("*.begun*"))


def test_the_command(pair: Path, one: Path) -> None:
    """On texts that the model makes of itself; the first process speaks."""
    alone, shared = files(one / "own"), files(pair / "_command" / "own")
    assert alone.keys() == shared.keys()
    assert [path for path in alone if alone[path] != shared[path]] == []
    (code, said), other = (json.loads((pair / "_command" / f"{rank}.json").read_text()) for rank in range(2))
    assert code == 0 and json.loads(said)["steps"] == 3 and other == [0, ""]
