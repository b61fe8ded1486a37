"""Drawing a format: its values on a line, and how far apart they are."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nybble.core.errors import UsageError
from nybble.core.files import atomic_write_bytes
from nybble.formats import NumberFormat

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDEST = 1e6
"""The largest value over the smallest, up to which a linear axis shows both."""


def plot_format(fmt: NumberFormat, path: Path) -> None:
    """Draw the values of ``fmt`` to ``path``.

    Raises:
        UsageError: matplotlib is missing, or it can't write this kind of file. FileError: the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("plots need matplotlib: pip install 'nybble[report]'") from error
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(1, 2), sharex=True)
    draw_values(fmt, top)
    draw_distances(fmt, bottom)
    kind = path.suffix.removeprefix(".").lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise UsageError(f"--plot {path}: give a name that ends in .png, .svg or .pdf.")
    picture = BytesIO()
    figure.savefig(picture, format=kind, dpi=150)
    atomic_write_bytes(path, picture.getvalue())


def draw_values(fmt: NumberFormat, axes: Axes) -> None:
    """A line for each value."""
    axes.eventplot(fmt.grid, colors="tab:blue", lineoffsets=0, linelengths=1, linewidths=0.8)
    axes.set_yticks([])
    width = f"{fmt.bits} bit{'s' if fmt.bits > 1 else ''}"
    axes.set_title(f"{fmt.name}: {len(fmt.grid)} values in {width}, {fmt.min:g} to {fmt.max:g}", wrap=True)


def draw_distances(fmt: NumberFormat, axes: Axes) -> None:
    """How far it is from each value to the next, over the whole way between the two."""
    axes.stairs(np.diff(fmt.grid), fmt.grid, baseline=None, color="tab:orange", linewidth=1.5)
    axes.set_yscale("log", base=2)
    if fmt.absmax > WIDEST * fmt.smallest:
        if fmt.min > 0:
            axes.set_xscale("log", base=2)
        else:  # around zero linear, with room for its label
            octaves = np.log2(fmt.absmax / fmt.smallest)
            axes.set_xscale("symlog", base=2, linthresh=fmt.smallest, linscale=octaves / 12)
            axes.set_xlim(2 * fmt.min - fmt.smallest / 4, 2 * fmt.max)
    axes.set_xlabel("value")
    axes.set_ylabel("distance to the next")
    axes.grid(alpha=0.3)
