"""``nybble report``: read the folder of a quantized model or of a run, make its page, write it whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nybble.checkpoint.account import inspect
from nybble.checkpoint.load import described
from nybble.checkpoint.marked import MANIFEST
from nybble.checkpoint.parts import EVALUATION, REQUEST, TIMES
from nybble.checkpoint.trained import TRAINING, is_adapter, is_trained
from nybble.core.errors import FileError, UsageError
from nybble.core.files import atomic_write_text, check_folder
from nybble.core.guard import reading
from nybble.models.build.config_file import read_json
from nybble.report.checks import check_evaluation, check_manifest, check_times, check_training
from nybble.report.page import render
from nybble.report.record import described_rows
from nybble.report.training import render_training

PAGE, LAYERS = "report.html", "layers.html"
PASSING = {PAGE: "report", LAYERS: "report", TIMES: "report", REQUEST: "config"}
"""What a page doesn't count, with its role: pages, and what two runs of a request don't have alike."""


def write_report(folder: str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """Write the page about a quantized model, or about a training run.

    Args:
        folder: what nybble wrote; without the record of a run (nybble.json) the page shows what the weights say. What
            ``nybble train`` wrote has its own page: losses, answers and memory; of a model that it made, layers.html
            beside it is what other models have.
        out: the file to make or replace, .html or .htm, of training its own page alone; by default report.html in
            ``folder``.

    Returns:
        ``report``, ``bytes`` (of the page), ``evaluated``; of a model ``layers``, ``bits_per_weight``; of training
        ``updates``, and of a model that it made ``layers_report``.

    Raises:
        UsageError: ``out`` is not a name for a page, or Jinja2 is missing.
        FileError: the folder is not nybble's, a file in it is broken, or the page can't be written.
    """
    folder = Path(folder)
    target = folder / PAGE if out is None else Path(out)
    if target.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {target}: the report is a page; give a name that ends in .html.")
    if target.is_dir():
        raise FileError(f"{target} is a folder. Give --out another name.")
    if is_trained(folder):
        return _write_training(folder, target, alone=out is not None)
    return _write_layers(folder, target)


def _write_layers(folder: Path, target: Path) -> dict[str, Any]:
    data = collect(folder)
    with reading(folder / MANIFEST):  # JSON nested deeper than Python follows
        page = render(data)
    atomic_write_text(target, page)
    return {
        "report": str(target),
        "bytes": len(page.encode()),
        "layers": len(data["manifest"]["layers"]),
        "bits_per_weight": data["sizes"]["bits_per_weight"],
        "evaluated": data["evaluation"] is not None,
    }


def _write_training(folder: Path, target: Path, alone: bool) -> dict[str, Any]:
    """The page of a run; not ``alone``, and where the run made a model, also that one's."""
    data = read_json(folder / TRAINING)
    check_training(data, folder / TRAINING)
    rows, more = [], {}
    if not is_adapter(folder):
        manifest = _manifest(folder)
        rows = manifest["layers"]
        if rows:  # none, where attention or its cache alone is rounded
            check_manifest(manifest, folder / MANIFEST)
            more = {} if alone else _write_layers(folder, folder / LAYERS)
    page = render_training(data, rows, LAYERS if more else "")
    atomic_write_text(target, page)
    found = {"report": str(target), "bytes": len(page.encode()), "updates": data["steps"]}
    found["evaluated"] = data["evaluation"] is not None
    if more:
        found |= {"layers_report": more["report"], "layers": more["layers"], "bits_per_weight": more["bits_per_weight"]}
    return found


def collect(folder: Path) -> dict[str, Any]:
    """What the page shows: ``title``, ``manifest``, ``config``, ``sizes``; ``evaluation`` and ``times``, or None.

    ``training``: the page about it, of a model that ``nybble train`` made; else empty.

    Raises:
        FileError: see :func:`write_report`.
    """
    check_folder(folder)
    manifest, trained = _manifest(folder), is_trained(folder)
    check_manifest(manifest, folder / MANIFEST)
    evaluation = None
    if (folder / EVALUATION).exists():
        evaluation = read_json(folder / EVALUATION)
        check_evaluation(evaluation, folder / EVALUATION)
    times = None
    if (folder / TIMES).exists():
        times = read_json(folder / TIMES)
        check_times(times, folder / TIMES)
    return {
        "title": manifest.get("name") if trained else folder.resolve().name or str(folder),
        "manifest": manifest,
        "config": read_json(folder / "config.json"),
        "training": PAGE if trained else "",
        "sizes": _lasting(inspect(folder)),
        "evaluation": evaluation,
        "times": times,
    }


def _manifest(folder: Path) -> dict[str, Any]:
    """nybble.json; where it says nothing of layers, what the weights say."""
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    if not manifest.get("recipe") and not manifest.get("layers"):
        manifest = _read_from_weights(folder, manifest)
    return {"layers": None, **manifest}


def _read_from_weights(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What can be said of a model that nobody kept a record of: trained and converted, or saved by transformers."""
    told = "The rows were read from the weights, so no error is known."
    recipe = {"name": "no record of a run", "summary": told, "source": ""}
    return {"recipe": recipe, **manifest, "layers": [row.to_dict() for row in described_rows(described(folder))]}


def _lasting(sizes: dict[str, Any]) -> dict[str, Any]:
    """Sizes less what passes: a page can't count itself, and a second run should say the same."""
    roles, files = dict(sizes["bytes"]), sizes["files"]
    for name, role in PASSING.items():
        roles[role] = roles.get(role, 0) - files.get(name, 0)
    total = sizes["total"] - sum(files.get(name, 0) for name in PASSING) - roles.pop("logs", 0)
    return sizes | {"bytes": roles, "total": total}
