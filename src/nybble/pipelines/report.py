"""``nybble report``: read a quantized model's folder, make its page, write it whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nybble.checkpoint.account import inspect
from nybble.checkpoint.parts import EVALUATION, MANIFEST
from nybble.core.errors import FileError, UsageError
from nybble.core.files import atomic_write_text, check_folder
from nybble.core.guard import reading
from nybble.models.build.config_file import read_json
from nybble.report.checks import check_evaluation, check_manifest
from nybble.report.page import render

PAGE = "report.html"


def write_report(folder: str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """Write the page about a quantized model.

    Args:
        folder: what ``nybble quantize`` wrote.
        out: the file to make or replace, .html or .htm; by default report.html in ``folder``.

    Returns:
        ``report``, ``bytes`` (of the page), ``layers``, ``bits_per_weight``, ``evaluated``.

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


def collect(folder: Path) -> dict[str, Any]:
    """What the page shows: ``title``, ``manifest``, ``config``, ``sizes``, ``evaluation`` (None without one).

    Raises:
        FileError: see :func:`write_report`.
    """
    check_folder(folder)
    if not (folder / MANIFEST).is_file():
        raise FileError(f"{folder} has no {MANIFEST}, so nybble did not write it. Give a folder of `nybble quantize`.")
    manifest = read_json(folder / MANIFEST)
    check_manifest(manifest, folder / MANIFEST)
    evaluation = None
    if (folder / EVALUATION).exists():
        evaluation = read_json(folder / EVALUATION)
        check_evaluation(evaluation, folder / EVALUATION)
    return {
        "title": folder.resolve().name or str(folder),
        "manifest": manifest,
        "config": read_json(folder / "config.json"),
        "sizes": _without_page(inspect(folder)),
        "evaluation": evaluation,
    }


def _without_page(sizes: dict[str, Any]) -> dict[str, Any]:
    """Sizes less an earlier report page: a page can't count itself, and a second run should say the same."""
    page = sizes["files"].get(PAGE, 0)
    roles = sizes["bytes"] | {"report": sizes["bytes"].get("report", 0) - page}
    return sizes | {"bytes": roles, "total": sizes["total"] - page}
