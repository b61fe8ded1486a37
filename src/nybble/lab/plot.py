"""Curves as a picture."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from io import BytesIO
from pathlib import Path

from nybble.core.errors import UsageError
from nybble.core.files import atomic_write_bytes, check_new_file
from nybble.lab.curves import Curve

MARKS = "osD^v<>P*X"


def plot(found: Sequence[Curve], path: Path, *, x: str, y: str, title: str, log: Collection[str] = ()) -> None:
    """Draw curves with their intervals.

    Args:
        found: to draw.
        path: PNG, SVG or PDF by its name's end.
        x: what the axis is called.
        y: likewise.
        title: above.
        log: ``x``, ``y`` or both: which axes are logarithmic.

    Raises:
        UsageError: matplotlib is missing or can't write such a file, or a logarithmic axis of values that aren't
            above 0. FileError: it can't be written.
    """
    check_new_file(path)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("plots need matplotlib: pip install 'nybble[report]'") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    kind = path.suffix.removeprefix(".").lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise UsageError(f"{path}: give a name that ends in .png, .svg or .pdf.")
    _check_log(found, log)
    axes = figure.subplots()
    for number, curve in enumerate(found):
        places, means = [p.x for p in curve.points], [p.mean for p in curve.points]
        colour, sure = f"C{number % 10}", [p for p in curve.points if p.count > 1]
        axes.plot(places, means, marker=MARKS[number % len(MARKS)], color=colour, label=curve.name, markersize=4)
        axes.vlines([p.x for p in sure], [p.low for p in sure], [p.high for p in sure], color=colour, alpha=0.6)
    axes.set(xlabel=x, ylabel=y, title=title)
    for name in log:
        getattr(axes, f"set_{name}scale")("log")
    axes.grid(alpha=0.3)
    if len(found) > 1:
        axes.legend(fontsize="small", ncols=1 + len(found) // 20)
    picture = BytesIO()
    figure.savefig(picture, format=kind, dpi=150)
    atomic_write_bytes(path, picture.getvalue())


def _check_log(found: Sequence[Curve], log: Collection[str]) -> None:
    for name in log:
        if name not in ("x", "y"):
            raise UsageError(f"a logarithmic axis is x, y or x,y; got {name!r}.")
        values = [p.x if name == "x" else p.mean for curve in found for p in curve.points]
        if min(values) <= 0:
            raise UsageError(f"the {name} axis has {min(values):g}, which no logarithmic axis shows; leave it linear.")
