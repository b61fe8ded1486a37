"""``nybble report``: read the folder of a quantized model or of a run, make its page, write it whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nybble.checkpoint.account import inspect
from nybble.checkpoint.load import described
from nybble.checkpoint.marked import MANIFEST
from nybble.checkpoint.parts import EVALUATION, TIMES
from nybble.checkpoint.trained import TRAINING, is_trained
from nybble.core.errors import FileError, UsageError
from nybble.core.files import atomic_write_text, check_folder
from nybble.core.guard import reading
from nybble.models.build.config_file import read_json
from nybble.report.checks import check_evaluation, check_manifest, check_times, check_training
from nybble.report.page import render
from nybble.report.record import described_rows
from nybble.report.training import render_training

PAGE = "report.html"


def write_report(folder: str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """Write the page about a quantized model, or about a training run.

    Args:
        folder: what nybble wrote; without the record of a run (nybble.json) the page shows what the weights say. What
            ``nybble train`` wrote has its own page: losses, answers and memory.
        out: the file to make or replace, .html or .htm; by default report.html in ``folder``.

    Returns:
        ``report``, ``bytes`` (of the page), ``evaluated``; of a model ``layers``, ``bits_per_weight``, of training
        ``updates``.

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
        return _write_training(folder, target)
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


def _write_training(folder: Path, target: Path) -> dict[str, Any]:
    data = read_json(folder / TRAINING)
    check_training(data, folder / TRAINING)
    page = render_training(data)
    atomic_write_text(target, page)
    found = {"report": str(target), "bytes": len(page.encode()), "updates": data["steps"]}
    return found | {"evaluated": data["evaluation"] is not None}


def collect(folder: Path) -> dict[str, Any]:
    """What the page shows: ``title``, ``manifest``, ``config``, ``sizes``; ``evaluation`` and ``times``, or None.

    Raises:
        FileError: see :func:`write_report`.
    """
    check_folder(folder)
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    if not manifest.get("recipe") and not manifest.get("layers"):
        manifest = _read_from_weights(folder, manifest)
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
        "title": folder.resolve().name or str(folder),
        "manifest": manifest,
        "config": read_json(folder / "config.json"),
        "sizes": _without_page(inspect(folder)),
        "evaluation": evaluation,
        "times": times,
    }


def _read_from_weights(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What can be said of a model that nobody kept a record of: trained and converted, or saved by transformers."""
    told = "The rows were read from the weights, so no error is known."
    recipe = {"name": "no record of a run", "summary": told, "source": ""}
    return {"recipe": recipe, **manifest, "layers": [row.to_dict() for row in described_rows(described(folder))]}


def _without_page(sizes: dict[str, Any]) -> dict[str, Any]:
    """Sizes less an earlier report page: a page can't count itself, and a second run should say the same."""
    page = sizes["files"].get(PAGE, 0)
    roles = sizes["bytes"] | {"report": sizes["bytes"].get("report", 0) - page}
    return sizes | {"bytes": roles, "total": sizes["total"] - page}
