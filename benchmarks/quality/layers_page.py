"""docs/layers.md and its plot from the numbers of layers.py; table.py writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HEAD = """# Where the loss is

Made by `python benchmarks/quality/table.py` from `benchmarks/results/layers.json`; the protocol is in
`benchmarks/quality/layers.py`. Loss is mean negative log likelihood, nats a token, over that of the float model, the
mean of the texts. "Lost alone": only these layers are quantized. "Recovered": all are quantized, and these are put back
to float. Errors are relative output errors as the solver saw them, SQNR is of the weights.

"""


def page(data: Mapping[str, Any], plot: str) -> str:
    """The page; ``plot`` is its picture's file name."""
    run, judged = data["run"], data["judged"]["float"]
    seen = data.get("calibration")
    calibration = f"{seen['samples']} x {seen['seq_len']} tokens of {Path(seen['source']).stem}" if seen else "none"
    machine = data["hardware"]["gpu"] or data["hardware"]["cpu"]
    counts = ", ".join(f"{found['predictions']:,} predictions of {text}" for text, found in judged.items())
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    effort = f", {run['effort']} search" if run["effort"] else ""
    about = f"{calibration} calibrate{effort}; {counts}; {machine}; {versions}.\n"
    away = (
        f"Putting all layers back, and quantizing all again, gave the same NLL within {max(data['checks'].values()):g}."
    )
    return (
        f"{HEAD}## {data['model']}, {data['row']}\n\n{_whole(data)}\n{about}\n{away}\n\n"
        f"## How far losses add up\n\n{_sums(data)}\n{_ranks(data)}\n\n"
        f"## By kind of layer\n\n{_kinds(data)}\n## The ten layers that recover most\n\n{_worst(data)}\n"
        f"## Every layer\n\n![loss of each layer]({plot})\n"
    )


def lost(data: Mapping[str, Any], nll: Mapping[str, float]) -> float:
    """Over the float model, the mean of the texts."""
    return float(np.mean([nll[text] - exact for text, exact in data["whole"]["float"].items()]))


def recovered(data: Mapping[str, Any], nll: Mapping[str, float]) -> float:
    """Under the quantized model, the mean of the texts."""
    return lost(data, data["whole"]["quantized"]) - lost(data, nll)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    ruler = ["---", *("---:" for _ in columns[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in (columns, ruler, *rows))


def _whole(data: Mapping[str, Any]) -> str:
    names = {"weights": "only weights quantized", "inputs": "only activations quantized"}
    texts = list(data["whole"]["float"])
    rows = [
        [names.get(form, form), *(f"{nll[text]:z.3f}" for text in texts), f"{lost(data, nll):z.3f}"]
        for form, nll in data["whole"].items()
    ]
    return _table(("model", *(f"NLL {text}" for text in texts), "lost"), rows)


def _sums(data: Mapping[str, Any]) -> str:
    whole = lost(data, data["whole"]["quantized"])
    rows = []
    for group in ("kinds", "blocks", "layers"):
        found = list(data[group].values())
        sums = (sum(lost(data, x["only"]) for x in found), sum(recovered(data, x["without"]) for x in found))
        rows.append([f"{len(found)} {group}", *(f"{x:z.3f}" for x in sums), *(f"{x / whole:z.2f}" for x in sums)])
    columns = ("sum over", "lost alone", "recovered", "lost alone / whole loss", "recovered / whole loss")
    return _table(columns, rows)


def _ranks(data: Mapping[str, Any]) -> str:
    """Rank correlations over single layers: with the solver's error, and between texts (how much is noise)."""
    layers = list(data["layers"].values())
    alone = [lost(data, x["only"]) for x in layers]
    back = [recovered(data, x["without"]) for x in layers]
    said = f"Rank correlations over {len(layers)} single layers: lost alone with recovered {_rank(alone, back):z.2f}"
    errors = [x["error"] for x in layers]
    if None not in errors:
        solver = [_rank(errors, losses) for losses in (alone, back)]
        said += f"; the solver's error with lost alone {solver[0]:z.2f}, with recovered {solver[1]:z.2f}"
    texts = list(data["whole"]["float"])
    if len(texts) > 1:
        between = [_rank(*([x[side][text] for x in layers] for text in texts[:2])) for side in ("only", "without")]
        said += f"; between two texts, lost alone {between[0]:z.2f}, recovered {between[1]:z.2f}"
    return said + "."


def _rank(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's; equal numbers, which are rare here, keep their order."""
    places = [np.argsort(np.argsort(values, kind="stable")) for values in (left, right)]
    return float(np.corrcoef(places[0], places[1])[0, 1])


def _kinds(data: Mapping[str, Any]) -> str:
    rows = []
    for kind, found in data["kinds"].items():
        members = [x for name, x in data["layers"].items() if name.endswith(f".{kind}")]
        losses = (lost(data, found["only"]), recovered(data, found["without"]))
        parts = (lost(data, found["weights"]), lost(data, found["inputs"]))
        rows.append([f"`{kind}`", *(f"{x:z.3f}" for x in (*losses, *parts)), *_means(members)])
    columns = ("kind", "lost alone", "recovered", "only weights", "only activations", "mean error", "mean SQNR, dB")
    return _table(columns, rows)


def _worst(data: Mapping[str, Any]) -> str:
    order = sorted(data["layers"].items(), key=lambda item: -recovered(data, item[1]["without"]))
    rows = []
    for name, x in order[:10]:
        losses = (recovered(data, x["without"]), lost(data, x["only"]))
        formats = " x ".join((x[side] or "float").split()[0] for side in ("weights", "inputs"))
        rows.append([f"`{name.removeprefix('model.')}`", *(f"{v:z.3f}" for v in losses), *_means([x]), formats])
    return _table(("layer", "recovered", "lost alone", "error", "SQNR, dB", "weights x activations"), rows)


def _means(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Error and SQNR, where they are known."""
    cells = []
    for fact, digits in (("error", 4), ("sqnr", 1)):
        known = [x[fact] for x in layers if x[fact] is not None]
        cells.append(f"{np.mean(known):.{digits}f}" if known else "")
    return cells


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Two heat maps of kinds by blocks in thousandths of a nat, whole blocks below: recovered, and lost alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds, blocks = list(data["kinds"]), list(data["blocks"])
    figure, panels = pyplot.subplots(2, 1, figsize=(13, 6.2), layout="constrained")
    ways = (("recovered by putting it back to float", recovered, "without"), ("lost by it alone", lost, "only"))
    for axes, (title, measure, side) in zip(panels, ways, strict=True):
        values = np.full((len(kinds) + 1, len(blocks)), np.nan)
        for name, found in data["layers"].items():
            *_, block, _, kind = name.split(".")
            values[kinds.index(kind), blocks.index(block)] = 1e3 * measure(data, found[side])
        values[-1] = [1e3 * measure(data, found[side]) for found in data["blocks"].values()]
        # A few layers hold most of the loss: colours saturate, the numbers do not.
        top = max(float(np.nanpercentile(np.abs(values[:-1]), 95)), 1e-3)
        image = axes.imshow(values, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if abs(value) > 0.6 * top else "black"
            axes.text(column, row, f"{value:z.0f}", ha="center", va="center", fontsize=7, color=colour)
        names = [*(kind.removesuffix("_proj") for kind in kinds), "whole block"]
        axes.set(title=f"{title}, thousandths of a nat", xlabel="block", yticks=range(len(names)), yticklabels=names)
        axes.set_xticks(range(len(blocks)), blocks)
        axes.axhline(len(kinds) - 0.5, color="black", linewidth=1)
        figure.colorbar(image, ax=axes, extend="both", pad=0.01)
    figure.suptitle(f"{data['model']}, {data['row']}: NLL of single layers")
    figure.savefig(path, dpi=120, metadata={"Software": None})
