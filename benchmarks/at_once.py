"""Studies of a recipe: a float model, then rows that train it in few bits, each a process of its own, several on a GPU.

A script says what its float model, its rows and its judge are (:class:`Study`); rows that are done stay done, and a
second call goes on with the others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.pipelines.train import train

TOLD = ("steps", "batch", "lr", "length", "layers", "width", "vocabulary", "float_steps", "float_lr", "held")
"""Options that a result names."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a row asks of :func:`nybble.pipelines.train.train`; of the study's updates it has one in ``stages``.

    ``settings``: its own, over the study's. ``make``: makes the folder in place of training, from the place where it
    should be and the settings, and says where it is.
    """

    recipe: str
    data: Path
    scheme: Any
    options: Mapping[str, Any]
    stages: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    make: Callable[[Path, Mapping[str, Any]], Path] | None = None


@dataclass(frozen=True, kw_only=True)
class Study:
    """One script.

    Attributes:
        script, doc: its file and docstring.
        rows: what is trained, by name: a request, once the command line is known.
        begin: writes the float model to ``work / "float"``.
        judged: metrics of a folder.
        shown: prints a result.
        optimizer: its words behind ``torch.AdamW``.
    """

    script: str
    doc: str
    rows: Mapping[str, Callable[[argparse.Namespace], Request]]
    begin: Callable[[argparse.Namespace], None]
    judged: Callable[[Path, argparse.Namespace], dict[str, Any]]
    shown: Callable[[dict[str, Any]], None]
    optimizer: str = ""

    def main(self, options: argparse.Namespace) -> None:
        """Train the float model, then the rows at once; print and write."""
        if options.row:
            self._one(options.row, options)
            return
        ends = time.monotonic() + options.seconds
        if not (options.work / "float" / "config.json").exists():
            began = time.monotonic()
            self.begin(options)
            print(f"float model: {time.monotonic() - began:.0f} s", flush=True)
        exact = file_of(options.work, "float")
        if not exact.exists():
            exact.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(exact, self.judged(options.work / "float", options))
        wanted = [name for name in self.rows if not options.rows or any(word in name for word in options.rows)]
        names = [f"{name} #{seed}" for seed in options.seeds for name in wanted]
        done = run(self.script, names, options.work, workers=options.workers, ends=ends, device=options.device)
        result = {
            "what": self.doc.split("\n")[0], "versions": versions(),
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
            "training": {key: getattr(options, key) for key in TOLD}, "float": json.loads(exact.read_text()),
            "rows": done,
        }  # fmt: skip
        self.shown(result)
        if options.out:
            atomic_write_json(options.out, result)

    def _one(self, name: str, options: argparse.Namespace) -> None:
        """A row, in a process of its own."""
        words, _, seed = name.rpartition(" #")
        asked, began, gpu = self.rows[words](options), time.monotonic(), options.device == "cuda"
        out = file_of(options.work, name).with_suffix("")
        settings = {
            "steps": options.steps // asked.stages, "batch": options.batch, "accumulate": 1, "lr": options.lr,
            "device": options.device, "dtype": "bfloat16" if gpu else "float32",
            "checkpointing": False, "save_every": 100, "seed": int(seed), "resume": True,
            "optimizer": f"torch.AdamW {self.optimizer}{' fused=true' * gpu}".strip(),
            **({} if options.length is None else {"seq_len": options.length}), **asked.settings,
        }  # fmt: skip
        if asked.make is not None:
            out = asked.make(out, settings)
        elif not out.exists():
            train(
                asked.recipe, options.work / "float", out, str(asked.data), scheme=asked.scheme, options=asked.options,
                settings=settings, form="native",
            )  # fmt: skip
        told = json.loads((out / "training.json").read_text())
        curve = told["curve"][:: max(1, len(told["curve"]) // 60)]
        found = {**self.judged(out, options), "steps": told["steps"], "curve": curve}
        atomic_write_json(file_of(options.work, name), {**found, "seconds": round(time.monotonic() - began, 1)})


def arguments(
    doc: str,
    name: str,
    data: str,
    more: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    **defaults: Any,
) -> argparse.Namespace:
    """The command line of a study.

    Args:
        doc: of the script.
        name: of its folder in ``build``.
        data: the module that makes its data.
        more: adds options.
        defaults: of the options.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(f"build/{name}/data"), help=f"of {data}")
    parser.add_argument("--work", type=Path, default=Path(f"build/{name}/work"), help="what is done, to go on from")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rows", nargs="*", default=[], help="words of the rows that are wanted")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--workers", type=int, default=14, help="rows at a time")
    parser.add_argument("--steps", type=int, help="updates of a row")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--length", type=int, help="tokens of a text")
    parser.add_argument("--layers", type=int, help="of the encoder, and of a decoder")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--float-steps", type=int)
    parser.add_argument("--float-lr", type=float)
    parser.add_argument("--held", type=int, help="examples that judge; none given: all")
    parser.add_argument("--seconds", type=float, default=1e9, help="end rows that aren't done by then")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    more(parser)
    parser.set_defaults(**defaults)
    return parser.parse_args()


def file_of(work: Path, row: str) -> Path:
    """Where a row's result is."""
    return work / "rows" / f"{re.sub('[^a-z0-9]+', '-', row.lower())}.json"


def run(script: str, rows: Sequence[str], work: Path, *, workers: int, ends: float, device: str) -> dict[str, Any]:
    """Run what isn't there yet, ``workers`` at a time.

    Args:
        script: file; it is called with this call's arguments, and ``--row NAME``.
        rows: names.
        work: folder of its files, and of what each printed.
        workers: rows at a time.
        ends: by ``time.monotonic``; what runs then is ended.
        device: cuda: rows are spread over the GPUs that there are.

    Returns:
        name -> result, of those that are done.
    """
    (work / "rows").mkdir(parents=True, exist_ok=True)
    gpus = torch.cuda.device_count() if device == "cuda" else 1
    waiting = [row for row in rows if not file_of(work, row).exists()]
    running: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}
    while (waiting or running) and time.monotonic() < ends:
        while waiting and len(running) < workers:
            busy = [gpu for gpu, _ in running.values()]
            gpu = min(range(gpus), key=busy.count)
            row = waiting.pop(0)
            running[row] = gpu, _start(script, row, work, gpu if device == "cuda" else None)
        time.sleep(0.2)
        for row in [row for row, (_, process) in running.items() if process.poll() is not None]:
            _, process = running.pop(row)
            print(f"{row}: {'done' if process.returncode == 0 else f'failed ({process.returncode})'}", flush=True)
    for row, (_, process) in running.items():
        process.terminate()
        process.wait()
        print(f"{row}: ended before it was done", flush=True)
    found = {row: file_of(work, row) for row in rows}
    return {row: json.loads(file.read_text()) for row, file in found.items() if file.exists()}


def _start(script: str, row: str, work: Path, gpu: int | None) -> subprocess.Popen[bytes]:
    more = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": _named(gpu)}
    with file_of(work, row).with_suffix(".txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, script, *sys.argv[1:], "--row", row], stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, **more, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def _named(gpu: int) -> str:
    """As the environment that we were started in calls it."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(gpu) if not given else given.split(",")[gpu]
