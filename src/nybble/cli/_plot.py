"""Drawing a format: its values on a line, and how far apart they are."""

from __future__ import annotations

from pathlib import Path

from nybble.core.errors import UsageError
from nybble.formats import NumberFormat


def plot_format(fmt: NumberFormat, path: Path) -> None:
    """Draw the values of ``fmt`` to ``path``.

    Raises:
        UsageError: matplotlib is missing, or it can't write this kind of file.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("plots need matplotlib: pip install 'nybble[report]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    grid = fmt.grid
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(9, 4.5), height_ratios=(1, 2), layout="constrained")
    top.eventplot(grid, colors="tab:blue", lineoffsets=0, linelengths=1, linewidths=0.8)
    top.set_yticks([])
    top.set_title(f"{fmt.name}: {len(grid)} values in {fmt.bits} bits, {fmt.min:g} to {fmt.max:g}")
    bottom.step(grid[:-1], grid[1:] - grid[:-1], where="post", color="tab:orange")
    bottom.set_yscale("log", base=2)
    bottom.set_xlabel("value")
    bottom.set_ylabel("distance to the next")
    bottom.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise UsageError(f"--plot {path}: {error}") from error
    finally:
        pyplot.close(figure)
