"""Curves, pictures and the page of a sweep."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.parts.lab.drawn import done, filled

from nybble.core.errors import UsageError
from nybble.lab.curves import curves
from nybble.lab.plot import plot
from nybble.lab.report import write_report

ROWS: list[dict[str, Any]] = [
    {"bits": bits, "format": name, "loss": loss}
    for name, bits, loss in (
        ("int", 4, 1.0), ("int", 4, 2.0), ("int", 4, 6.0), ("int", 2, 9.0),
        ("nf", 4, 0.5), ("nf", 8, math.inf), ("nf", None, 1.0),
    )
]  # fmt: skip


def test_repeats_become_a_mean_with_its_bootstrap_interval() -> None:
    """scipy's percentile bootstrap, of as many other draws, is the ruler."""
    stats = pytest.importorskip("scipy.stats", reason="scipy isn't installed: pip install 'nybble[search]'")
    found = {curve.name: curve.points for curve in curves(ROWS, "bits", "loss", ["format"])}
    assert [(p.x, p.mean, p.count) for p in found["format int"]] == [(2.0, 9.0, 1), (4.0, 3.0, 3)]
    assert [(p.x, p.mean) for p in found["format nf"]] == [(4.0, 0.5)] and math.isnan(found["format int"][0].low)
    values = np.random.default_rng(3).normal(size=40)
    (curve,) = curves([{"a": 0, "b": float(v)} for v in values] + [{"a": 1, "b": 0.0}], "a", "b")
    other = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    error = float(values.std()) / math.sqrt(40)
    assert abs(curve.points[0].low - other.low) < 0.15 * error and abs(curve.points[0].high - other.high) < 0.15 * error


def test_what_has_nothing_to_draw_is_refused() -> None:
    with pytest.raises(UsageError, match="no two places"):
        curves(ROWS, "format", "loss")
    with pytest.raises(UsageError, match="no column 'los'"):
        curves(ROWS, "bits", "los")


def test_a_picture_is_whole_or_not_there(tmp_path: Path) -> None:
    found = curves(ROWS, "bits", "loss", ["format"])
    plot(found, tmp_path / "a.png", x="bits", y="loss", title="t", log=["y"])
    data = (tmp_path / "a.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (1200, 750)
    svg = tmp_path / "a.svg"
    plot(found, svg, x="bits", y="loss", title="t")
    assert all(f"<!-- {name} -->" in svg.read_text() for name in ("bits", "loss", "format int", "format nf"))
    with pytest.raises(UsageError, match=r"ends in \.png"):
        plot(found, tmp_path / "a.txt", x="bits", y="loss", title="t")
    with pytest.raises(UsageError, match="leave it linear"):
        plot(curves([{"a": 0, "b": 1}, {"a": 1, "b": 2}], "a", "b"), svg, x="a", y="b", title="t", log=["x"])
    assert not (tmp_path / "a.txt").exists()


def test_a_page_says_how_it_stands_and_carries_its_numbers(tmp_path: Path) -> None:
    with filled(
        str(tmp_path / "lab.sqlite"), bits=[2, 3, 4, 5], weights="int{bits} group={group}", group=[16, 24]
    ) as store:
        while (claim := store.claim("w")) is not None:
            store.finish(claim, done(sqnr=float(claim.number), name="<b>"))
        assert (
            write_report(store, "drawn", tmp_path / "a.html", x="bits", y="sqnr", by=["group"], where=["bits<5"]) == 6
        )
        with pytest.raises(UsageError, match="no sweep 'drown'"):
            write_report(store, "drown", tmp_path / "b.html", x="", y="")
    page = (tmp_path / "a.html").read_text()
    drawing = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)[0])
    points = drawing["curves"][0]["points"]
    assert [(p["x"], p["mean"], p["low"]) for p in points] == [(2, 1.0, None), (3, 3.0, None), (4, 5.0, None)]
    assert (
        "<b>" not in page.replace("<body>", "")
        and "does not divide them" in page
        and "Only runs with bits&lt;5" in page
    )
    assert re.findall(r"<dt>(\w+)</dt><dd>(\d+)</dd>", page)[0] == ("Done", "4")
