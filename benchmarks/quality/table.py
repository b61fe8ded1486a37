"""The tables and the plots of the quality benchmark, from its results alone.

    python benchmarks/quality/table.py [--check]

benchmarks/results/quality.jsonl -> docs/quality.md and docs/quality.png; benchmarks/results/layers.json, if it exists,
-> docs/layers.md and docs/layers.png. ``--check`` says whether the pages are what the results say, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import layers_page

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality.jsonl"
PAGE, PLOT = ROOT / "docs" / "quality.md", ROOT / "docs" / "quality.png"
LAYERS = ROOT / "benchmarks" / "results" / "layers.json"
LAYERS_PAGE, LAYERS_PLOT = ROOT / "docs" / "layers.md", ROOT / "docs" / "layers.png"
HEAD = """# Quality

Made by `python benchmarks/quality/table.py` from `benchmarks/results/quality.jsonl`; the protocol is in
`benchmarks/quality/run.py`. Bits are embeddings/weights/activations; "layer bits" are stored bits a quantized weight,
scales included. Mean negative log likelihood in nats a token; "lost" is the difference to the float model. Seconds in
parentheses were taken while other rows ran on the same machine, and mean little.

"""


def main() -> None:
    """Write the pages and the plots, or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    page = HEAD + "\n".join(table(group) for group in groups(rows)) + f"\n![quality against bits]({PLOT.name})\n"
    pages, layers = {PAGE: page}, None
    if LAYERS.exists():
        layers = json.loads(LAYERS.read_text(encoding="utf-8"))
        pages[LAYERS_PAGE] = layers_page.page(layers, LAYERS_PLOT.name)
    else:
        print(f"no {LAYERS.relative_to(ROOT)} (quality/layers.py writes it): no {LAYERS_PAGE.relative_to(ROOT)}")
    if args.check:
        stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
        if stale:
            names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
            sys.exit(f"not what the results say: {names}; run benchmarks/quality/table.py")
        return
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    plot(rows)
    if layers is not None:
        layers_page.plot(layers, LAYERS_PLOT)


def groups(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of one model, machine and calibration together, the float model first.

    What isn't calibrated stands with the largest group of its machine.
    """
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: "calibration" not in row):
        if row["name"] != "float":
            machine, tokens = (
                (row["model"], row["hardware"]["gpu"]),
                (row.get("calibration") or {}).get("tokens_sha256"),
            )
            beside = [key for key in found if key[:2] == machine]
            key = (*machine, tokens) if tokens or not beside else max(beside, key=lambda key: len(found[key]))
            found.setdefault(key, []).append(row)
    result = []
    for (model, gpu, _), members in found.items():
        reference = [r for r in rows if r["name"] == "float" and (r["model"], r["hardware"]["gpu"]) == (model, gpu)]
        result.append([*reference[:1], *members])
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """One group as Markdown."""
    reference, texts = rows[0], list(rows[0]["texts"])
    about = rows[-1]
    calibration = next((row["calibration"] for row in rows if row.get("calibration")), None)
    threads = about["hardware"]["threads"]
    machine = about["hardware"]["gpu"] or f"{about['hardware']['cpu']}, {threads} thread{'s' * (threads > 1)}"
    head = [
        "method",
        "bits",
        "effort",
        "layer bits",
        *(c for t in texts for c in (f"NLL {t}", "lost", "KL")),
        "seconds",
    ]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- | --- |" + " ---: |" * (len(head) - 3)]
    for row in rows:
        name = row["name"] if row["tool"] == "nybble" else f"{row['name']} ({row['version']})"
        cells = [name, row["bits"], row.get("effort") or "", f"{row['layer_bits']:.2f}"]
        for text in texts:
            found, exact = row["texts"].get(text), reference["texts"][text]
            if found is None:
                cells += ["", "", ""]
                continue
            kl = f"{found['kl']:.3f}" if "kl" in found else ""
            cells += [f"{found['nll']:.3f}", f"{found['nll'] - exact['nll']:.3f}", kl]
        seconds = f"({row['seconds']:.0f})" if row.get("beside") else f"{row['seconds']:.0f}"
        lines.append("| " + " | ".join([*cells, seconds]) + " |")
    samples = "no calibration"
    if calibration is not None:
        source = Path(calibration["source"]).stem
        samples = f"{calibration['samples']} x {calibration['seq_len']} tokens of {source}"
    counts = ", ".join(f"{reference['texts'][text]['predictions']:,} predictions of {text}" for text in texts)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"## {about['model']}, {machine}\n\n" + "\n".join(lines) + f"\n\n{samples}; {counts}; {versions}.\n"


def plot(rows: list[dict[str, Any]]) -> None:
    """Lost NLL on the first text, one line for each choice of bits, of the group with the most rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    group = max(groups(rows), key=len)
    text = next(iter(group[0]["texts"]))
    exact = group[0]["texts"][text]["nll"]
    lines = sorted({row["bits"] for row in group[1:]}, key=lambda bits: [int(n) for n in reversed(bits.split("/"))])
    methods = list(dict.fromkeys(method(row) for row in group[1:]))
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    colours = [*pyplot.get_cmap("tab10").colors, "black", "gold"]
    for number, name in enumerate(methods):
        found = [row for row in group[1:] if method(row) == name]
        lost = [max(row["texts"][text]["nll"] - exact, 1e-3) for row in found]
        places = [lines.index(row["bits"]) for row in found]
        look = {"marker": "osD^vP*X"[number % 8], "color": colours[number % len(colours)]}
        axes.scatter(lost, places, s=70, alpha=0.85, label=name, zorder=3, **look)
    axes.set(
        xscale="log", xlabel=f"NLL lost on {text}, nats a token (less is better)",
        ylabel="bits of embeddings / weights / activations", yticks=range(len(lines)), yticklabels=lines,
        title=f"{group[0]['model']}: quality against bits",
    )  # fmt: skip
    axes.grid(True, alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(PLOT, dpi=120, metadata={"Software": None})


def method(row: dict[str, Any]) -> str:
    """A row's name without its bits."""
    return " ".join(row["name"].replace(row["bits"], "").split())


if __name__ == "__main__":
    main()
