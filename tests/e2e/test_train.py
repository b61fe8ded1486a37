"""``nybble train``: what it writes, a run that is gone on with, and what it refuses."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.processes import start
from tests.tiny import WORDS, logits, save_tiny

import nybble
import nybble.optim
from nybble.checkpoint.account import inspect
from nybble.cli import main
from nybble.core.errors import DataError, FileError, LearningError, ModelError, NybbleError, SchemeError, UsageError
from nybble.core.progress import Silent
from nybble.pipelines.report import write_report
from nybble.pipelines.train import train
from nybble.training.settings import TrainSettings

peft = pytest.importorskip("peft", reason="needs PEFT, which nybble's extra 'train' brings")
adapters = pytest.importorskip("nybble.training.adapters")
loop = pytest.importorskip("nybble.training.loop", reason="needs accelerate, which nybble's extra 'train' brings")

# PEFT asks transformers in words that its newest release calls old; older ones know no others.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")

SETTINGS = TrainSettings(steps=6, batch=1, accumulate=2, seq_len=16, lr=0.02, save_every=2, dtype="float32")
SMALL = {"rank": 2, "dropout": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, eight examples to train on (four updates an epoch), and three that are held out."""
    made = tmp_path_factory.mktemp("train")
    save_tiny(made / "model", dtype=torch.float32)
    rng = random.Random(0)
    for name, count in (("data.jsonl", 8), ("held.jsonl", 3)):
        with (made / name).open("w") as file:
            for _ in range(count):
                words = rng.choices(WORDS[3:13], k=rng.randint(2, 5))
                file.write(json.dumps({"instruction": " ".join(words), "output": " ".join(words[::-1])}) + "\n")
    return made


def run(folder: Path, out: Path, settings: TrainSettings = SETTINGS, **more: Any) -> dict[str, Any]:
    given = {"model": folder / "model", "data": str(folder / "data.jsonl"), "options": SMALL, **more}
    return train("qlora", out=out, settings=settings, **given)


def weights(out: Path) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


class _Stops(Silent):
    """Ctrl-C in the middle of an update."""

    def __init__(self, behind: int) -> None:
        self.left = behind

    def start(self, total: int, what: str) -> None:
        self.what = what

    def advance(self, n: int = 1, note: str = "") -> None:
        self.left -= n * (self.what == "training")
        if self.left <= 0 and self.what == "training":
            raise KeyboardInterrupt


def test_gone_on_with_behind_a_kill_it_comes_to_the_same_weights(folder: Path, tmp_path: Path) -> None:
    """In the second epoch, with dropout, and with a checkpoint that the kill left in pieces."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    first = run(folder, whole)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, progress=_Stops(6))
    partial = tmp_path / "out.partial"
    broken = partial / "checkpoints" / "checkpoint-6"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(partial / "checkpoints" / "checkpoint-4", broken)
    (broken / "adapter_model.safetensors").write_bytes(b"")
    (broken / "trainer_state.json").write_text('{"epoch": ')
    again = replace(SETTINGS, resume=True)
    with pytest.raises(FileError, match=r"begun with settings.lr = 0.02; now it is 0.01"):
        run(folder, out, replace(again, lr=0.01))
    second = run(folder, out, again)
    assert weights(out) == weights(whole) and len(first["curve"]) == 6
    assert {**second, "out": "", "seconds": 0} == {**first, "out": "", "seconds": 0}
    assert not partial.exists() and not (out / "checkpoints").exists()
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "other", progress=_Stops(4), announce=said.append)
    assert not any("holds" in line for line in said)
    other = run(folder, tmp_path / "other", replace(SETTINGS, seed=1, steps=1), announce=said.append)
    line = f"{tmp_path / 'other.partial'} holds what an earlier run finished; starting anew clears it, --resume"
    assert [each.startswith(line) for each in said].count(True) == 1
    assert other["curve"][0] != first["curve"][0]


class _Breaks(torch.optim.SGD):
    """Its step ends in NaN, as that of a gradient which overflowed."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.data.fill_(float("nan"))


def test_a_last_update_that_breaks_is_noticed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "make_optimizer", lambda line, model, lr, rates: _Breaks(model.parameters(), lr=lr))
    with pytest.raises(LearningError, match=r"lora_A\..* holds NaN or Inf behind the last update"):
        run(folder, tmp_path / "out", replace(SETTINGS, steps=1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("warmup", "rates"), [(1.0, [0.0, 0.25, 0.5, 0.75]), (0.5, [0.0, 0.5, 1.0, 1.0])])
def test_the_rate_grows_over_a_share_of_the_updates(tmp_path: Path, warmup: float, rates: list[float]) -> None:
    arguments = loop._arguments(replace(SETTINGS, warmup=warmup, steps=4), tmp_path)
    steps = arguments.get_warmup_steps(4)
    assert [min(1.0, step / steps) for step in range(4)] == rates


KILLS = 3


def files(out: Path, whole: Path) -> dict[str, bytes]:
    """All that a run leaves but logs and times; paths of the folder itself become those of ``whole``."""
    kept = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    found = {n: b for n, b in kept.items() if n != "times.json" and not n.startswith("logs/")}
    return {name: data.replace(str(out).encode(), str(whole).encode()) for name, data in found.items()}


def test_killed_with_sigkill_at_random_updates(folder: Path, tmp_path: Path) -> None:
    """The command in processes of its own, killed a while after something new appeared on disk: the same bytes."""
    whole, out, errors = tmp_path / "whole", tmp_path / "out", tmp_path / "errors"
    sizes = ["--steps", "8", "--accumulate", "2", "--seq-len", "16", "--save-every", "2", "--dtype", "float32"]
    held = tmp_path / "held.jsonl"
    held.write_text((folder / "held.jsonl").read_text().splitlines(keepends=True)[0])  # its answer takes longest of all
    more = ["--data", str(folder / "data.jsonl"), "--eval", str(held), "--merge", "--set", "rank=2"]

    def command(place: Path) -> list[str]:
        return ["train", "qlora", str(folder / "model"), str(place), *sizes, *more, "--resume"]

    finished = start(command(whole), errors)
    finished.join()
    assert finished.exitcode == 0, errors.read_text()
    partial, rng, kills = out.with_name("out.partial"), random.Random(0), 0

    def seen() -> set[str]:
        marks = ("base", "checkpoints/checkpoint-*", "merged", "training.json")
        return {path.name for mark in marks for path in partial.glob(mark)}

    while not out.exists():
        before, run = seen(), start(command(out), errors)
        while run.is_alive() and (kills == KILLS or seen() <= before):
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        run.kill()
        run.join()
        kills += run.exitcode == -signal.SIGKILL
        assert run.exitcode in (0, -signal.SIGKILL), errors.read_text()
    assert kills >= KILLS // 2 and not partial.exists()
    assert files(out, whole) == files(whole, whole)
    assert {"adapter_model.safetensors", "merged/model.safetensors", "base/model.safetensors"} <= files(
        out, whole
    ).keys()


def test_logs_for_tensorboard(folder: Path, tmp_path: Path) -> None:
    """Each update once, with the loss of the curve, also where a killed run had logged what was done again."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", progress=_Stops(4))
    assert (tmp_path / "out.partial" / "checkpoints" / "checkpoint-2").is_dir()
    found = run(folder, tmp_path / "out", replace(SETTINGS, resume=True))
    log = reader.EventAccumulator(str(tmp_path / "out" / "logs"))
    log.Reload()
    assert {"train/loss", "train/learning_rate", "train/grad_norm"} <= set(log.Tags()["scalars"])
    losses = [(event.step, event.value) for event in log.Scalars("train/loss")]
    assert losses == [(step, pytest.approx(loss, abs=1e-4)) for step, loss in found["curve"]]


def test_what_is_missing_is_said_before_anything_is_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's cards and our page need Jinja2."""
    monkeypatch.setattr("nybble.training.methods.qlora.find_spec", lambda name: None if name == "jinja2" else True)
    with pytest.raises(UsageError, match=r"training needs jinja2: pip install 'nybble\[train\]'"):
        run(folder, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_what_it_writes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = replace(SETTINGS, steps=3, optimizer="AdamW state=state8 min_size=0")
    found = run(folder, out, settings, judged_on=str(folder / "held.jsonl"), merge=True)
    kept = json.loads((out / "training.json").read_text())
    seconds = json.loads((out / "times.json").read_text())["training"]
    assert {"out": str(out), "seconds": seconds[0], **kept} == found
    models = found["evaluation"]["models"]
    assert models["after"]["nll"] < models["before"]["nll"]

    base, _ = nybble.load(out / "base")
    plain = logits(base)
    adapted = adapters.load_adapter(base, out)
    assert not torch.equal(logits(adapted), plain)
    theirs = peft.PeftModel.from_pretrained(nybble.load(out / "base")[0], out)
    assert torch.equal(logits(theirs), logits(adapted))
    merged, tokenizer = nybble.load(out / "merged")
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-4, rtol=1e-4) and tokenizer is not None
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(out / "base")

    memory, trainable = found["memory"], found["trainable"]
    assert memory["adapters"] == memory["gradients"] == 4 * trainable
    assert 2 * trainable < memory["optimizer states"] < 4 * trainable + 8 * 28 * 8  # two bytes, scales, a count
    assert memory["kept for backward"] > 0
    page = (out / "report.html").read_text()
    for text in ("Before and after", "Memory by part", f"{trainable:,}", "<path d=", found["data"]["sha256"]):
        assert text in page
    assert "<script" not in page

    on = run(folder, tmp_path / "on", replace(settings, steps=1), adapter=out, model=out / "base")
    assert on["weights"] is None and not (tmp_path / "on" / "base").exists()
    assert on["curve"][0][1] < found["curve"][0][1]
    accounted(out, tmp_path / "on", found)
    reported(out)


def accounted(out: Path, on: Path, found: dict[str, Any]) -> None:
    """Every byte of both folders, one with its base and one without."""
    sizes, base = inspect(out), inspect(out / "base")
    assert (
        sum(sizes["bytes"].values()) == sizes["total"] == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    )
    assert sizes["bytes"]["adapters"] == 4 * found["trainable"] and sizes["bytes"]["codes"] == base["bytes"]["codes"]
    merged = sum(p.stat().st_size for p in (out / "merged").rglob("*") if p.is_file())
    assert sizes["bytes"]["merged model"] == merged and sizes["modules"] == base["modules"]
    assert sizes["parameters"] == base["parameters"] + found["trainable"]
    alone = inspect(on)
    assert sum(alone["bytes"].values()) == alone["total"] and "codes" not in alone["bytes"]
    assert alone["parameters"] == found["trainable"] and alone["bits_per_weight"] == 32
    assert alone["note"] == f"The base is in {out / 'base'}."


def reported(out: Path) -> None:
    """The page of the run, made again; a damaged record has none."""
    page, record = (out / "report.html").read_bytes(), (out / "training.json").read_text()
    made = write_report(out, out.with_name("page.html"))
    assert out.with_name("page.html").read_bytes() == page and made["updates"] == 3 and made["evaluated"]
    data = json.loads(record)
    broken: list[dict[str, Any]] = [
        {"curve": [[1]]},
        {"memory": {"adapters": -1}},
        {"data": {}},
        {"evaluation": {"models": {"before": {"nll": 1.0}, "after": {}}}},
        {"evaluation": {**data["evaluation"], "samples": [{"prompt": "a"}]}},
        {"versions": None},
    ]
    for change in broken:
        (out / "training.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(FileError, match=r"training.json.*run `nybble train` again|training.json.*damaged"):
            write_report(out, out.with_name("other.html"))
    (out / "training.json").write_text(record)
    assert not out.with_name("other.html").exists()


def test_with_the_papers_paged_adamw_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    outs = {name: tmp_path / name for name in ("AdamW state=none", "PagedAdamW32bit")}
    for line, out in outs.items():
        run(folder, out, replace(SETTINGS, steps=2, optimizer=line))
    assert len({weights(out) for out in outs.values()}) == 1


def test_checkpointing_keeps_less_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    still = {"options": {"rank": 2, "dropout": 0.0}}
    found = [
        run(folder, tmp_path / str(on), replace(SETTINGS, steps=1, checkpointing=on), **still) for on in (True, False)
    ]
    assert found[0]["memory"]["kept for backward"] < found[1]["memory"]["kept for backward"] / 2
    assert found[0]["curve"] == found[1]["curve"]


def test_the_loss_of_an_update_is_the_mean_over_its_targets(folder: Path, tmp_path: Path) -> None:
    """Not over examples: one has a target token and its end, the other five."""
    path = tmp_path / "two.jsonl"
    rows = [{"instruction": "ba be bi", "output": "bo"}, {"instruction": "ba", "output": "be bi bo bu"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    still = {"options": {"rank": 2, "dropout": 0.0}, "data": str(path), "judged_on": str(path)}
    found = run(folder, tmp_path / "out", replace(SETTINGS, steps=1), **still)
    assert found["data"]["targets"] == 7
    assert found["curve"][0][1] == pytest.approx(found["evaluation"]["models"]["before"]["nll"], abs=1e-4)


BAD: dict[str, tuple[dict[str, Any], type[NybbleError], str]] = {
    "no data": ({"data": "gone.jsonl"}, FileError, "'gone.jsonl' does not exist"),
    "empty targets": ({"data": "EMPTY"}, DataError, "line 1: 'output' is empty"),
    "no records": ({"data": "BLANK"}, DataError, "holds no record"),
    "a bad line": ({"data": "BROKEN"}, DataError, "line 2 is not JSON"),
    "too long": ({"settings": replace(SETTINGS, seq_len=65)}, UsageError, "seq_len is 65.*positions for 64"),
    "16 bits": ({"weights": "float16 channel"}, UsageError, "have 16 bits"),
    "no format": ({"weights": "gone4"}, UsageError, "gone4"),
    "no such option": ({"options": {"ranks": 2}}, SchemeError, "no option 'ranks'. Did you mean 'rank'"),
    "no such layer": ({"options": {"targets": ["gone"]}}, ModelError, "targets gone"),
    "no optimizer": ({"settings": replace(SETTINGS, optimizer="Adamw")}, UsageError, "Did you mean 'AdamW'"),
    "its option": ({"settings": replace(SETTINGS, optimizer="AdamW x=1")}, UsageError, "no option 'x'"),
    "its state": ({"settings": replace(SETTINGS, optimizer="AdamW state=gone4")}, UsageError, "gone4"),
    "no adapter": ({"adapter": "MODEL"}, FileError, "holds no adapter"),
    "inside": ({"out": "INSIDE"}, UsageError, "in the model's own folder"),
    "unlearnable": ({"settings": replace(SETTINGS, lr=1e30, steps=4, clip=1e30)}, LearningError, "use a smaller lr"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_error_and_nothing_half_written(folder: Path, tmp_path: Path, case: str) -> None:
    given, error, message = BAD[case]
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"instruction": "ba", "output": ""}\n')
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "ba"}\n{"text": \n')
    data = {name: str(tmp_path / f"{name.lower()}.jsonl") for name in ("EMPTY", "BLANK", "BROKEN")}
    places = {**data, "MODEL": folder / "model", "INSIDE": folder / "model" / "out"}
    asked: dict[str, Any] = {
        key: places.get(value, value) if isinstance(value, str) else value for key, value in given.items()
    }
    before = sorted(folder.rglob("*"))
    with pytest.raises(error, match=message):
        run(folder, asked.pop("out", tmp_path / "out"), asked.pop("settings", SETTINGS), **asked)
    begun = {"out.partial"} if case == "unlearnable" else set()  # its base is worth keeping
    assert {path.name for path in tmp_path.iterdir()} == {*(Path(path).name for path in data.values()), *begun}
    assert sorted(folder.rglob("*")) == before


def test_models_that_cannot_be_trained(folder: Path, tmp_path: Path) -> None:
    done = nybble.quantize(str(folder / "model"), out=tmp_path / "packed", weights="int4 group=16")[0]
    with pytest.raises(UsageError, match="packed already"):
        run(folder, tmp_path / "out", model=done, weights="nf4-dq")
    with pytest.raises(FileError, match="exists already"):
        run(folder, done)
    assert not (tmp_path / "out.partial").exists()


def test_a_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen ahead; or in a checkpoint, of which nothing is left, and the run goes on behind it."""
    monkeypatch.setattr("nybble.core.files.free_bytes", lambda path: 1000)
    with pytest.raises(FileError, match="1,000 are free"):
        run(folder, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    monkeypatch.undo()
    save = torch.save

    def full(*given: Any, **more: Any) -> None:
        save({}, given[1])
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    short = replace(SETTINGS, steps=2, save_every=1)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(FileError, match=r"checkpoint-1 can't be written.*--resume"):
        run(folder, tmp_path / "out", short)
    monkeypatch.undo()
    assert not any((tmp_path / "out.partial" / "checkpoints").glob("checkpoint-*"))
    run(folder, tmp_path / "out", replace(short, resume=True))
    run(folder, tmp_path / "again", short)
    assert weights(tmp_path / "out") == weights(tmp_path / "again")


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["nybble", "train", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out if not ended.value.code else said.err

    place, data = str(folder / "model"), str(folder / "data.jsonl")
    some = ["--data", data, "--steps", "1", "--accumulate", "2", "--seq-len", "16", "--set", "rank=2", "--json"]
    code, text = call("qlora", place, str(tmp_path / "out"), *some, "--weights", "int4 group=16")
    found = json.loads(text)
    assert code == 0 and found["options"]["rank"] == 2 and found["weights"] == "int4 group=16" and found["steps"] == 1
    for command, said in (("report", ["1 updates", "no held-out losses"]), ("inspect", ["adapters", "total on disk"])):
        monkeypatch.setattr(sys, "argv", ["nybble", command, str(tmp_path / "out")])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr().out
        assert not ended.value.code and all(words in shown for words in said)
    assert call("qlorra", place, str(tmp_path / "x"), "--data", data) == (
        2,
        "nybble: unknown training recipe 'qlorra'. Did you mean 'qlora'?\n",
    )
    code, text = call("qlora", place, str(tmp_path / "x"), "--data", data, "--set", "rank")
    assert code == 2 and "'rank' is not of the form NAME=VALUE" in text
