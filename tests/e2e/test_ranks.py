"""Several processes on one job: one process's bytes; one of them writes and speaks, an error in one stops all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.tiny import save_text, save_tiny, tiny_model
from torch.multiprocessing.spawn import spawn

import nybble
from nybble.core.errors import DataError, NybbleError, UsageError
from nybble.reconstruction import halves
from nybble.report import record
from nybble.solvers.gptq import Gptq
from nybble.training.steps.distill import Distill
from nybble.training.steps.restorative_lora import RestorativeLora
from nybble.transforms.learned_rotation import LearnedRotation

SIZES = {"samples": 10, "seq_len": 24, "batch": 2}  # five batches: three for one of two processes
SIGN = {
    "reconstruction": "mse", "weights": "sign-round", "optimizer": "sign", "rates": {"rounding": 0.05, "clip": 0.01},
    "steps": 4, "keep": "best",
}  # fmt: skip
INT4 = {"weights": "int4 group=16 symmetric=false"}
RECIPES: dict[str, Any] = {
    "gptq": {"scheme": INT4, "steps": [{"solver": "gptq"}]},
    "gptq, both paths": {"scheme": INT4, "steps": [{"solver": "gptq", "inputs": "both"}]},
    "static inputs": {
        "scheme": {**INT4, "inputs": "int8 tensor static"},
        "steps": [{"transform": "smooth"}, {"solver": "gptq"}, {"correction": "refine-scales"}],
    },
    "learned": {"scheme": INT4, "steps": [{"solver": "gptq"}, SIGN]},
    "penalties": {
        "scheme": INT4,
        "steps": [{"solver": "rtn"}, {"reconstruction": "mse", "weights": "adaround", "steps": 4, "window": 2}],
    },
    "drawn": {
        "scheme": {**INT4, "inputs": "int8 token rounding=stochastic"},
        "steps": [{"solver": "gptq"}],
    },
    "weighed": {
        "scheme": INT4,
        "steps": [{"solver": "gptq"}, {"reconstruction": "fisher", "weights": "sign-round", "steps": 2}],
    },
    "rotated, trained": {
        "scheme": {**INT4, "inputs": "int4 token"},
        "steps": [
            {"train": "restorative-lora", "steps": 1}, {"transform": "learned-rotation", "steps": 1},
            {"solver": "gptq"}, {"train": "distill", "steps": 1},
        ],
    },
    "experts": {"scheme": INT4, "steps": [{"solver": "gptq"}]},
}  # fmt: skip
OF_MORE = ("gptq", "learned")
"""What three processes do."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    save_tiny(made / "llama", "llama")
    save_tiny(made / "mixtral", "mixtral", num_hidden_layers=1)
    save_text(made / "text.txt", 3000)
    return made


def _quantized(folder: Path, out: Path, names: Iterable[str] = RECIPES) -> None:
    """Every recipe, each step in halves however small it is."""
    halves.LEAST = 1
    for name in names:
        model = folder / ("mixtral" if name == "experts" else "llama")
        settings = SIZES | {"spill": name == "learned"}
        nybble.quantize(model, RECIPES[name], str(folder / "text.txt"), out=out / name, settings=settings)


def _quantized_by_more(folder: Path, out: Path) -> None:
    _quantized(folder, out, OF_MORE)


def _worker(rank: int, folder: Path, out: Path, count: int, works: Sequence[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=count)
    try:
        for work in works:
            globals()[work](folder, out / work)
    finally:
        dist.destroy_process_group()


def start(count: int, folder: Path, out: Path, *works: str) -> None:
    """Run functions of this module in several processes that know each other, which take long to start."""
    for work in works:
        (out / work).mkdir()
    spawn(_worker, (folder, out, count, works), nprocs=count)  # type: ignore[no-untyped-call]


def files(out: Path) -> dict[str, bytes]:
    """By name; seconds are no result."""
    found = (p for p in sorted(out.rglob("*")) if p.is_file() and p.name != "times.json")
    return {str(p.relative_to(out)): p.read_bytes() for p in found}


@pytest.fixture(scope="module")
def one(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes."""
    out, least, threads = tmp_path_factory.mktemp("one"), halves.LEAST, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _quantized(folder, out)
    finally:
        halves.LEAST = least
        torch.set_num_threads(threads)
    return files(out)


@pytest.fixture(scope="module")
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave, each thing in a folder of its name."""
    out = tmp_path_factory.mktemp("pair")
    start(2, folder, out, "_quantized", "_in_memory", "_noting_rows", "_learning", "_failing")
    return out


def test_two_come_to_the_bytes_of_one(pair: Path, one: dict[str, bytes]) -> None:
    two = files(pair / "_quantized")
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    manifest = json.loads(one["learned/nybble.json"])
    assert {w["steps"] for row in manifest["layers"] for w in row["learned"]["windows"]} == {4}


def test_three_come_to_them_too(folder: Path, tmp_path: Path, one: dict[str, bytes]) -> None:
    start(3, folder, tmp_path, "_quantized_by_more")
    three = files(tmp_path / "_quantized_by_more")
    assert {name.partition("/")[0] for name in three} == set(OF_MORE)
    assert [name for name in three if one[name] != three[name]] == []


def _in_memory(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    model = tiny_model()
    ids = torch.randint(3, 50, (6, 12), generator=torch.Generator().manual_seed(2))
    made, report = nybble.quantize(model, RECIPES["gptq"], ids, settings={"batch": 2})
    rank = dist.get_rank() if dist.is_initialized() else "one"
    found = [t.tolist() for _, t in sorted(made.state_dict().items())]
    (out / f"{rank}.json").write_text(json.dumps([found, [row.to_dict() for row in report.layers]]))


def test_every_process_holds_a_result_in_memory(folder: Path, tmp_path: Path, pair: Path) -> None:
    threads = torch.get_num_threads()
    _in_memory(folder, tmp_path)
    torch.set_num_threads(threads)
    one = (tmp_path / "one.json").read_text()
    assert [(pair / "_in_memory" / f"{rank}.json").read_text() == one for rank in range(2)] == [True, True]


def _learning(folder: Path, out: Path) -> None:
    """What is learned of the whole model, where no two processes would learn the same."""
    rank, monkey, calls = dist.get_rank(), pytest.MonkeyPatch(), list[str]()

    def apart(cls: type, name: str) -> None:
        plain = getattr(cls, name)

        def made(*given: Any) -> Any:
            calls.append(cls.__name__)
            torch.nn.init.normal_(torch.empty(rank + 1))  # what is drawn differs, too
            return plain(*given)

        monkey.setattr(cls, name, made)

    for cls, name in ((RestorativeLora, "run"), (LearnedRotation, "learn"), (Distill, "run")):
        apart(cls, name)
    ids, said = torch.randint(3, 50, (6, 12), generator=torch.Generator().manual_seed(2)), list[str]()
    model, report = nybble.quantize(
        tiny_model(), RECIPES["rotated, trained"], ids, settings={"batch": 2}, announce=said.append
    )
    found = [[name, t.float().tolist()] for name, t in sorted(model.state_dict().items())]
    rows = [row.to_dict() for row in report.layers]
    (out / f"{rank}.json").write_text(json.dumps([calls, said, found, rows]))
    monkey.undo()


def test_one_learns_of_the_whole_model_for_all(pair: Path) -> None:
    (calls, said, *one), (none, silent, *two) = (
        json.loads((pair / "_learning" / f"{rank}.json").read_text()) for rank in range(2)
    )
    assert calls == ["RestorativeLora", "LearnedRotation", "Distill"] and none == silent == []
    assert sum("by the first process for all: about" in line for line in said) == 3
    assert one == two


def _noting_rows(folder: Path, out: Path) -> None:
    """Which rows a process makes of its own."""
    made, plain = list[str](), record._row

    def noted(state: Any, name: str, known: Any) -> Any:
        made.append(f"{state.prefix}{name}")
        return plain(state, name, known)

    record._row = noted  # type: ignore[assignment]
    ids = torch.randint(3, 50, (6, 12), generator=torch.Generator().manual_seed(2))
    _, report = nybble.quantize(tiny_model(), RECIPES["gptq"], ids, settings={"batch": 2})
    (out / f"{dist.get_rank()}.json").write_text(json.dumps([made, [row.name for row in report.layers]]))
    record._row = plain


def test_each_row_is_made_by_one(pair: Path) -> None:
    (mine, rows), (yours, same) = (
        json.loads((pair / "_noting_rows" / f"{rank}.json").read_text()) for rank in range(2)
    )
    assert rows == same
    assert mine and yours and sorted(mine + yours) == sorted(rows)


def _failing(folder: Path, out: Path) -> None:
    """A solver that fails in the second process, when it has a layer to solve; then requests that differ."""
    rank, monkey = dist.get_rank(), pytest.MonkeyPatch()

    def broken(self: Gptq, *args: Any) -> Any:
        raise DataError("the second one can't")

    said = []
    if rank == 1:
        monkey.setattr(Gptq, "solve", broken)
    try:
        nybble.quantize(folder / "llama", "gptq", str(folder / "text.txt"), out=out / "made", settings=SIZES, **INT4)  # type: ignore[arg-type]
    except NybbleError as error:
        said.append(f"{type(error).__name__}: {error}")
    monkey.undo()
    try:
        settings = SIZES | {"seed": rank}
        nybble.quantize(folder / "llama", "gptq", str(folder / "text.txt"), settings=settings, **INT4)  # type: ignore[arg-type]
    except UsageError as error:
        said.append(str(error))
    (out / f"said-{rank}").write_text("\n".join(said))


def test_an_error_in_one_stops_all_and_nothing_is_left(pair: Path) -> None:
    first, second = ((pair / "_failing" / f"said-{rank}").read_text().splitlines() for rank in range(2))
    assert first == second
    assert first[0].startswith("DataError: model.layers.0.") and first[0].endswith("the second one can't")
    assert re.match(r"the processes are asked for different things: data\.\w+ is .*; of rank 1 ", first[1])
    assert {p.name for p in (pair / "_failing").iterdir()} == {"said-0", "said-1"}


def test_torchrun_is_all_that_is_said(folder: Path, tmp_path: Path) -> None:
    """Two processes by torch's own launcher, and one: the same files; of two one table, and one line of progress."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nybble"]
    options = ["--data", str(folder / "text.txt"), "--samples", "6", "--seq-len", "24", "--batch", "2"]
    line = ["--recipe", "gptq", "--weights", "int4 group=16"]
    command = [sys.executable, "-m", *torchrun, "quantize", str(folder / "llama"), str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *options, *line], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert len([row for row in done.stdout.splitlines() if "bits a weight" in row]) == 1
    assert done.stderr.count("14 weights in 2 blocks") == 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = {"samples": 6, "seq_len": 24, "batch": 2}
    nybble.quantize(
        folder / "llama", "gptq", str(folder / "text.txt"), out=tmp_path / "one", weights="int4 group=16",
        settings=settings,
    )  # fmt: skip
    torch.set_num_threads(threads)
    assert files(tmp_path / "one") == files(tmp_path / "two")
