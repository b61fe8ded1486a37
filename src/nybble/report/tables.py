"""What the page shows, as plain tables: rows of layers, bytes by role, counts of formats, metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from nybble.formats import get_format
from nybble.report.names import depth_of, kinds_of
from nybble.report.words import METRICS, MODELS, ROLES, number, percent, size

Row = dict[str, Any]


def layer_facts(rows: Sequence[Row]) -> list[Row]:
    """Rows with what follows from them: kind, depth, ratio of the errors, share of shifted columns."""
    facts = []
    kinds = kinds_of(row["name"] for row in rows)
    for row in rows:
        rtn, error, shifts = row["rtn_error"], row["error"], row.get("input_shifts")
        facts.append(
            row
            | {
                "kind": kinds[row["name"]],
                "depth": depth_of(row["name"]),
                "ratio": error / rtn if rtn and error is not None else None,
                "shifted": None if not shifts or not sum(shifts) else 1 - shifts[0] / sum(shifts),
                "notes": row.get("notes", []),
            }
        )
    return facts


COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("name", "Layer", "Full name of the weight."),
    ("shape", "Shape", "Outputs × inputs; sorts by the number of elements."),
    ("weights", "Weights", "Quantizer of the weight: number format, what shares a scale, how scales are found."),
    ("inputs", "Inputs", "Quantizer that the layer's input gets while the model runs; float if none."),
    ("bits", "Bits", "Stored bits a weight, scales included."),
    ("sqnr", "SQNR dB", "Signal to quantization noise of the weight, in dB; higher is better."),
    ("error", "Error", "Share of the output's power that is lost; of the weight's own without calibration."),
    ("rtn_error", "RTN error", "The same, had the weight been rounded to nearest."),
    ("ratio", "Ratio", "Error over RTN error; below 1 the solver gained."),
    ("clip_low", "Clip low", "Smallest clip value of the rows, over the row's largest magnitude."),
    ("clip_mid", "Clip median", "The same, median of the rows."),
    ("clip_high", "Clip high", "The same, largest of the rows."),
    ("moved", "Left nearest", "Share of weights that learning took to another value than the nearest one."),
    ("codes", "Other codes", "Share of weights whose code training made another than it was."),
    ("scale_low", "Scale low", "Smallest ratio of a scale to what it was before learning."),
    ("scale_mid", "Scale median", "The same, median of the scales."),
    ("scale_high", "Scale high", "The same, largest of the scales."),
    ("input_low", "Input scale low", "Smallest ratio of a static input's scale to what it was before learning."),
    ("input_mid", "Input scale median", "The same, median of the scales."),
    ("input_high", "Input scale high", "The same, largest of the scales."),
    ("shifted", "Shifted", "Share of input columns whose exponent bias is shifted."),
    ("notes", "Notes", "Fallbacks and other remarks."),
)


def layer_table(facts: Sequence[Row]) -> tuple[list[tuple[str, str, str, bool]], list[list[tuple[str, Any]]]]:
    """The table of layers.

    Returns:
        Its columns (key, title, meaning, whether numeric), less those that no layer has a value for; its rows, each a
        list of (text, what to sort by).
    """
    cells = [_cells(row) for row in facts]
    kept = [c for c in COLUMNS if any(row[c[0]][0] for row in cells)]
    words = ("name", "weights", "inputs", "notes")
    return [(*c, c[0] not in words) for c in kept], [[row[c[0]] for c in kept] for row in cells]


def _cells(row: Row) -> dict[str, tuple[str, Any]]:
    low, middle, high = row.get("clip") or (None, None, None)
    learned = row.get("learned") or {}
    scales, inputs = (learned.get(key) or (None, None, None) for key in ("scales", "input_scales"))
    texts = {"name": row["name"], "notes": "; ".join(row["notes"])}
    texts |= {"weights": row["weights"] or "float", "inputs": row["inputs"] or "float"}
    cells: dict[str, tuple[str, Any]] = {key: (text, text) for key, text in texts.items()}
    cells["shape"] = (" × ".join(map(str, row["shape"])), math.prod(row["shape"]))
    numbers = {"bits": row["bits"], "sqnr": row["sqnr"], "ratio": row["ratio"]}
    numbers |= {"clip_low": low, "clip_mid": middle, "clip_high": high}
    numbers |= dict(zip(("scale_low", "scale_mid", "scale_high"), scales, strict=True))
    numbers |= dict(zip(("input_low", "input_mid", "input_high"), inputs, strict=True))
    digits = {"bits": 3, "sqnr": 2}
    for key, value in numbers.items():
        cells[key] = ("" if value is None else f"{value:.{digits.get(key, 3)}f}", value)
    for key in ("error", "rtn_error", "shifted"):
        cells[key] = (percent(row[key]), row[key])
    shares = {"moved": learned.get("left_nearest"), "codes": learned.get("codes")}
    return cells | {key: (percent(share), share) for key, share in shares.items()}


def byte_table(sizes: Row) -> list[Row]:
    """Bytes by role, the largest first: name, meaning, bytes, share and texts."""
    total = sum(sizes["bytes"].values()) or 1
    found = sorted(sizes["bytes"].items(), key=lambda item: -item[1])
    return [
        {
            "role": role,
            "meaning": ROLES.get(role, ""),
            "share": count / total,
            "bytes": f"{count:,}",
            "percent": f"{100 * count / total:.2f} %",
        }
        for role, count in found
        if count
    ]


def metric_table(evaluation: Row) -> tuple[list[str], list[tuple[str, list[str], str]]]:
    """Metrics: titles of the models; and (title, a text for each model, change from float to quantized)."""
    models: dict[str, Row] = evaluation.get("models", {})
    names = sorted(models, key=lambda name: (name != "float", name != "quantized"))
    rows = []
    for key in dict.fromkeys(key for name in names for key in models[name]):
        values = [models[name].get(key) for name in names]
        before, after = (models.get(name, {}).get(key) for name in ("float", "quantized"))
        rows.append((METRICS.get(key, key), [number(value) for value in values], change(before, after)))
    return [MODELS.get(name, name) for name in names], rows


def change(before: Any, after: Any) -> str:
    """The difference of two numbers, and as a share of the first; empty where one is none."""
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in (before, after)):
        return ""
    difference = number(abs(float(after - before)), 3)
    sign = "+" if after >= before else "−"
    return f"{sign}{difference}" + (f" ({100 * (after - before) / before:+.2f} %)" if before else "")


def tiles(sizes: Row, facts: Sequence[Row], evaluation: Row | None) -> list[tuple[str, str, str]]:
    """The numbers at the top: (what, value, a line below)."""
    bits, inside = sizes["bits_per_weight"], sizes["bits_per_quantized_weight"]
    smaller = f"{16 / bits:.1f}× smaller than 16-bit weights" if bits else ""
    share = f"{percent(sizes['quantized_parameters'] / max(1, sizes['parameters']))} of all parameters quantized"
    found = [
        ("bits a weight, everything stored", f"{bits:.2f}", f"{inside:.2f} in quantized layers"),
        ("on disk", size(sizes["total"]), smaller),
        ("layer" if len(facts) == 1 else "layers", f"{len(facts):,}", share),
    ]
    models = (evaluation or {}).get("models", {})
    before, after = (models.get(name, {}).get("ppl") for name in ("float", "quantized"))
    known = [row["sqnr"] for row in facts if row["sqnr"] is not None]
    if all(isinstance(v, int | float) for v in (before, after)):
        found.append(("perplexity", number(after), f"{number(before)} before, in float"))
    elif known:
        found.append(("dB median SQNR", f"{median(known):.1f}", f"of the weights; lowest {min(known):.1f} dB"))
    return found


def drawing_data(facts: Sequence[Row]) -> Row:
    """What the page's script draws: layers, and the grids of the formats in their pictures."""
    keys = ("name", "shape", "kind", "depth", "weights", "inputs", "outputs", "sqnr", "error", "rtn_error", "bits")
    more = ("input_scale", "input_shifts", "clip", "notes", "weight_picture", "input_picture")
    formats = set()
    for row in facts:
        for picture in (row.get("weight_picture"), (row.get("input_picture") or {}).get("histogram")):
            formats |= {picture["format"]} if picture and "format" in picture else set()
    return {
        "kinds": list(dict.fromkeys(row["kind"] for row in facts)),
        "grids": {name: [float(f"{v:.6g}") for v in get_format(name).grid] for name in sorted(formats)},
        "layers": [{key: row.get(key) for key in (*keys, *more) if row.get(key) not in (None, [])} for row in facts],
    }


def findings(facts: Sequence[Row]) -> dict[str, str]:
    """A sentence for each chart: what it shows, for those who can't see it too."""
    ratios = [row["ratio"] for row in facts if row["ratio"] is not None]
    known = [row for row in facts if row["error"] is not None]
    quality = [row for row in facts if row["sqnr"] is not None]
    spread = [(p["inter"], p["intra"]) for p in (row.get("input_picture") for row in facts) if p]
    found = {"error": "No layer has an error.", "sqnr": "No layer has an SQNR.", "spread": ""}
    if known:
        worst = max(known, key=lambda row: row["error"])
        found["error"] = f"The largest error is {percent(worst['error'])}, in {worst['name']}."
        if ratios and any(abs(ratio - 1) > 1e-6 for ratio in ratios):
            found["error"] += (
                f" In the median layer the solver leaves {median(ratios):.2f} of round-to-nearest's error."
            )
        elif ratios:
            found["error"] += " Every layer is rounded to nearest, so both curves are one."
    if quality:
        worst = min(quality, key=lambda row: row["sqnr"])
        found["sqnr"] = f"The lowest SQNR is {worst['sqnr']:.1f} dB, in {worst['name']}."
    if spread:
        above = sum(inter > intra for inter, intra in spread)
        times = [inter / intra for inter, intra in spread if intra > 0]
        found["spread"] = f"Variance between channels exceeds variance within them in {above} of {len(spread)} layers"
        found["spread"] += f" (median ratio {median(times):.2f})." if times else "."
    return found
