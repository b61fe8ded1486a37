"""Writes the tables of README.md and docs/ from the committed results: every number there comes from a file here.

Tables of what there is (formats, parts, options) come from the registries: see registries.py.

    python benchmarks/tables.py            rewrite them
    python benchmarks/tables.py --check    fail if one is out of date (a test runs this)

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import registries
from registries import table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def main() -> None:
    """Rewrite or check all pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", _fill, old, flags=re.DOTALL)
        if new != old:
            stale.append(page.name)
            if not check:
                page.write_text(new, encoding="utf-8")
    if check and stale:
        sys.exit(f"out of date: {', '.join(stale)}. Run python benchmarks/tables.py")


def _fill(match: re.Match[str]) -> str:
    return f"{match[1]}{TABLES[match[2]]()}{match[3]}"


def _load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def demo() -> str:
    """The main job's table."""
    data = _load("demo")
    rows = [
        [
            r["name"],
            f"{r['ppl']:.2f}" if r["ppl"] < 1000 else f"{r['ppl']:.1e}",
            f"{r['kl']:.3f}",
            f"{r['bits']:.2f}",
            f"{r['layer_bits']:.2f}",
            f"{r['bytes'] / 1e6:.0f}",
        ]
        for r in data["rows"]
    ]
    columns = (
        "SmolLM2-135M-Instruct",
        "perplexity",
        "KL to float",
        "bits/weight, all stored",
        "in quantized layers",
        "MB",
    )
    versions = ", ".join(f"{name} {data['versions'][name]}" for name in ("python", "torch", "transformers"))
    note = f" {data['note']}." if data.get("note") else ""
    return table(columns, rows) + f"\n{data['text']}; {data['cpu']}; {versions}.{note}\n"


def gptq() -> str:
    """GPTQ beside llm-compressor, on whatever hardware there are results for."""
    rows, notes = [], []
    for path in sorted(RESULTS.glob("gptq_vs_llm_compressor*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        machine = data["hardware"]["gpu"] or data["hardware"]["cpu"]
        notes += [f"{machine}: {data['note']}."] if "note" in data else []
        for ours, peer in zip(data["rows"][::2], data["rows"][1::2], strict=True):
            sequences = "{} x {}".format(*ours.get("calibration", (128, 1024)))
            quality = (f"{ours['ppl_float']:.2f}", f"{ours['ppl']:.2f}", f"{peer['ppl']:.2f}")
            ratios = (f"{ours['ppl'] / peer['ppl']:.4f}", f"{ours['seconds'] / peer['seconds']:.2f}")
            rows.append([f"{ours['scheme']}, {machine}", sequences, *quality, *ratios])
    columns = (
        "scheme and machine",
        "calibration",
        "float",
        "nybble",
        "llm-compressor",
        "perplexity ratio",
        "time ratio",
    )
    return table(columns, rows) + "".join(f"\n{note}\n" for note in notes)


def fake_quantize() -> str:
    """Fake quantization beside torch's own."""
    data = _load("fake_quantize")
    rows = [[f"`{name}`", f"{row['ratio']:.2f}"] for name, row in data["results"].items()]
    columns = ("4096 x 4096 float32 on the CPU, scales included", "time over torch's fake_quantize_per_channel_affine")
    return table(columns, rows) + f"\n{data['threads']} threads, {data['processor']}; torch {data['torch']}.\n"


def speed() -> str:
    """Packed models beside the float one."""
    data = _load("speed")
    rows = [
        [
            f"`{r['name']}`" if r["name"] != "float" else "float (bfloat16)",
            f"{r['bytes'] / 1e6:.0f}",
            f"{r['read']:.2f}",
            f"{r['write']:.2f}",
        ]
        for r in data["rows"]
    ]
    columns = (
        "SmolLM2, weights only or (capitals) inputs too",
        "MB in memory",
        f"time for {data['read']} tokens at once, float = 1",
        f"for {data['written']} one by one",
    )
    machine = data["machine"]
    said = f"{machine['cpu']}, {machine['threads']} threads; torch {data['versions']['torch']}"
    return table(columns, rows) + f"\n{said}.\n"


def memory() -> str:
    """Peak memory beside its estimate."""
    data = _load("memory")
    rows = [
        [
            ", ".join(part for part in (r["model"], r["recipe"], r["note"]) if part),
            f"{r['samples']} x {r['seq_len']}",
            f"{r['measured'] / 1e9:.2f}",
            f"{r['estimate'] / 1e9:.2f}",
            f"{r['ratio']:.2f}",
        ]
        for r in data["rows"]
    ]
    count = data["machine"]["threads"]
    about = f"\n{data['machine']['cpu']}, {count} thread{'s' * (count > 1)}; torch {data['versions']['torch']}.\n"
    return table(("run", "calibration", "measured, GB", "estimate, GB", "ratio"), rows) + about


def minilm() -> str:
    """LLM-FP4 on a sentence encoder."""
    data = _load("minilm")
    methods = list(dict.fromkeys(row["method"] for row in data["rows"][1:]))
    every = list(dict.fromkeys(row["bits"] for row in data["rows"][1:]))
    found = {(row["bits"], row["method"]): row["cosine"] for row in data["rows"]}
    rows = [[bits, *(f"{found[bits, method]:.4f}" for method in methods)] for bits in every]
    sentences = f"{data['calibration']['samples']} sentences calibrate, {data['text']['samples']} of another text judge"
    quick = ", ".join(f"{name}={value}" for name, value in data["quick"].items())
    about = (
        f"\nbfloat16 alone: {data['rows'][0]['cosine']:.5f}. {sentences}; quick search ({quick}); "
        f"torch {data['versions']['torch']}.\n"
    )
    return table(("embeddings/weights/activations", *methods), rows) + about


def vit() -> str:
    """LLM-FP4 on a vision transformer."""
    data = _load("vit")
    methods = list(dict.fromkeys(row["method"] for row in data["rows"][1:]))
    every = list(dict.fromkeys(row["bits"] for row in data["rows"][1:]))
    found = {(row["bits"], row["method"]): row["top1"] for row in data["rows"]}
    rows = [[bits, *(f"{found[bits, method]:.4f}" for method in methods)] for bits in every]
    gpu, machine = data["training"]["hardware"]["gpu"], data["hardware"]["gpu"] or data["hardware"]["cpu"]
    where = f"trained for {data['training']['epochs']} epochs" + (f" on one {gpu}" if gpu else "")
    about = (
        f"\nFloat: {data['rows'][0]['top1']:.4f}, {where}. {data['calibration']['samples']} training images calibrate, "
        f"{data['effort']} search; {machine}, torch {data['versions']['torch']}. A forward with shifts took "
        f"{data['shift_time_ratio']:.2f} times that of one without them.\n"
    )
    return table(("weights/activations", *methods), rows) + about


def cnn() -> str:
    """Convolutional networks on photographs."""
    data = _load("cnn")
    rows, notes = [], []
    for name, entry in data.items():
        for row in entry["rows"]:
            shares = (f"{row['agreement']:.3f}", f"{row['agreement_where_sure']:.3f}")
            rows.append([entry["network"], str(entry["folds"]), row["bits"], row["method"], *shares])
        machine = entry["hardware"]["gpu"] or entry["hardware"]["cpu"]
        notes.append(
            f"{name}: {entry['judged']} crops, {entry['sure']} of which the float network is sure (at least one half); "
            f"folding BatchNorms changes a logit by {entry['folding_error']:.1e} of the largest at most; {machine}."
        )
    head = ("network", "folds", "weights/activations", "method", "agreement", "where it is sure")
    return table(head, rows) + "\n" + "\n\n".join(notes) + "\n"


def composition() -> str:
    """Recipes with formats and granularities: pairs that were looked at, are legal, and ran without a fault."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in _load("composition")["rows"]:
        rows.setdefault(row["recipe"], []).append(row)
    found = []
    for name, tried in sorted(rows.items()):
        legal = [row for row in tried if not row["reason"]]
        faults = [f"`{row['format']} {row['granularity']}`" for row in legal if row["fault"]]
        right = len(legal) - len(faults)
        found.append([f"`{name}`", str(len(tried)), str(len(legal)), str(right), ", ".join(faults)])
    return table(("recipe", "pairs", "legal", "right", "a fault"), found)


def onnx_layers() -> str:
    """ONNX files in onnxruntime: whole outputs, layer by layer, seconds."""
    data = _load("onnx_runs")
    rows = []
    for name, lines in data["networks"].items():
        for line, row in lines.items():
            judged = row.get("layerwise")
            apart = f"{judged['unequal']:.1e}" if judged and judged["codes"] else ""
            off = f"{max(judged['largest'], judged['end']):.1e}" if judged else ""
            times = f"{row['seconds'] / lines['float32']['seconds']:.2f}" if "seconds" in row else "not measured"
            rows.append([name, f"`{line}`", f"{row['cosine']:.6f}", apart, off, f"{row['bytes'] / 1e6:.1f}", times])
    columns = (
        "network", "weights and inputs", "cosine of the whole", "codes one step off", "most that a layer is off", "MB",
        "time, float32 = 1",
    )  # fmt: skip
    versions = ", ".join(f"{name} {data['versions'][name]}" for name in ("onnxruntime", "torch", "transformers"))
    return table(columns, rows) + f"\n{data['cpu']}, one thread, one image or one sentence of 128 tokens; {versions}.\n"


def qlora() -> str:
    """LoRA over bases of several formats, and over a peer's."""
    if not (RESULTS / "qlora.json").exists():
        return "\nNo result is committed yet: `benchmarks/qlora.py` writes it.\n"
    data = _load("qlora")
    rows = [
        [
            r["variant"], f"`{r['line']}`" if r["line"] else "", f"{r['bits']:.3f}", f"{r['before']:.4f}",
            f"{r['after']:.4f}", "" if r["ratio"] is None else f"{r['ratio']:.4f}",
            " ".join(f"{ratio:.4f}" for ratio in r["by_seed"]),
        ]
        for r in data["summary"]
    ]  # fmt: skip
    columns = (
        "base under LoRA on all linear layers", "line", "bits a weight", "held-out loss before", "after",
        "over 16-bit LoRA", "by seed",
    )  # fmt: skip
    settings, versions = data["settings"], data["versions"]
    said = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes")
                     if name in versions)  # fmt: skip
    updates = f"{settings['steps']} updates of {settings['batch'] * settings['accumulate']} examples"
    left = "".join(f" {variant} was left out: {why}." for variant, why in data["left_out"].items())
    return (
        table(columns, rows)
        + f"\n{data['model']}, {updates}, {data['judged']} held-out examples, nats a target token; "
        f"{data['device']}; {said}.{left}\n"
    )


def optimizer_speed() -> str:
    """A step of low-bit optimizers beside others'."""
    data = _load("optimizers")
    sizes = list(dict.fromkeys(row["size"] for row in data["rows"]))
    found = {(row["optimizer"], row["size"]): row for row in data["rows"]}
    rows = []
    for name in dict.fromkeys(row["optimizer"] for row in data["rows"]):
        each = [found.get((name, size)) for size in sizes]
        kept = next(row["bytes"] for row in each if row is not None)
        rows.append([name, f"{kept:.2f}", *("" if row is None else f"{row['ms']:.2f}" for row in each)])
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if name != "nybble")
    columns = ("optimizer", "bytes of state a parameter", *(f"ms: {size}" for size in sizes))
    return table(columns, rows) + f"\n{data['hardware']['gpu']}, {versions}.\n"


def training_memory() -> str:
    """Gigabytes of a step by part, behind the update, beside what torch's allocator says."""
    data = _load("training_memory")
    steps = {f"all weights, {name}": step for name, step in data["all weights"].items()}
    steps[f"LoRA over {data['qlora']['parameters'] / 1e9:.0f}B in NF4 + DQ, paged AdamW"] = data["qlora"]
    parts = ("packed", "frozen", "trained", "gradients", "states")
    rows = []
    for name, step in steps.items():
        moments = {moment["name"]: moment for moment in step["moments"]}
        told = moments["step"]
        numbers = (*(told["parts"][part] for part in parts), moments["forward"]["parts"]["activations"])
        numbers = (*numbers, told["host"], told["other"], told["requested"], step["peak"])
        rows.append([name, *(f"{number / 1e9:.3f}" for number in numbers)])
    columns = ("step", *parts, "activations, behind forward", "states on the host", "in no part", "all", "peak")
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if name != "nybble")
    said = f"GB; one sequence of {data['tokens']} tokens, bfloat16; {data['machine']['gpu']}, {versions}."
    return f"{table(columns, rows)}\n{said}\n"


def optimizer_quality() -> str:
    """Held-out losses of low-bit optimizers beside 32-bit ones."""
    sys.path.insert(0, str(ROOT))  # run as a script, which finds its own folder alone
    from benchmarks.optimizer_quality import summary

    runs = _load("optimizer_quality")["runs"]
    head, rows = summary.rows(runs)
    seeds = sorted({run["seed"] for run in runs})
    machines = sorted({run["hardware"]["gpu"] or run["hardware"]["cpu"] for run in runs})
    versions = {name: version for run in runs for name, version in run["versions"].items()}
    said = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "nybble")
    about = f"{len(runs)} runs, seeds {', '.join(map(str, seeds))}; {', '.join(machines)}; {said}."
    return f"{table(tuple(head), rows)}\n{summary.sentence(runs)}\n\n{about}\n"


def c_train() -> str:
    """Multiply-adds per clock of exported training steps: one row a type and kernel, one column a network and cores."""
    data = _load("c_train")
    results, cores = data["results"], data["cores"]
    columns = [(network, count) for network in ("resnet8", "ds-cnn") for count in (1, cores)]
    found = {(r["type"], r["lanes"], r["unroll"], r["network"], r["cores"]): r for r in results}
    rows = []
    for type_, lanes, unroll in dict.fromkeys((r["type"], r["lanes"], r["unroll"]) for r in results):
        kernel = ("scalar" if lanes == 1 else f"{lanes} lanes") + (f", unrolled {unroll}" if unroll > 1 else "")
        cells = [found.get((type_, lanes, unroll, *column)) for column in columns]
        rows.append([type_, kernel, *("" if c is None else f"{c['mac_per_clock']:.2f}" for c in cells)])
    head = ("type", "kernel", *(f"{network}, {count} core{'s' * (count > 1)}" for network, count in columns))
    load = data["load_average"]
    about = (
        f"{data['processor']}, {cores} cores, gcc {data['gcc']} {data['flags']}; clocks of the {results[0]['clock']}; "
        f"AVX512-FP16: {'yes' if data['avx512_fp16'] else 'no'}; load {load['least']:.1f} to {load['most']:.1f}."
    )
    return f"{table(head, rows)}\n{about}\n"


def _spread(found: list[float], digits: str = ".2g") -> str:
    """Mean of the seeds, and half their range where there are several."""
    mean = f"{sum(found) / len(found):{digits}}"
    return mean if len(found) == 1 else f"{mean} ± {(max(found) - min(found)) / 2:.1g}"


def _cluster(kind: str) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The study's result, and the rows of a kind by their names."""
    data, found = _load("star_cluster"), dict[str, list[dict[str, Any]]]()
    for row in data["rows"]:
        if row["kind"] == kind:
            found.setdefault(row["name"], []).append(row)
    return data, found


def star_formats() -> str:
    """What formats do to particles in a star cluster."""
    data, found = _cluster("formats")
    rows = []
    for name, all_seeds in found.items():
        seeds = [row for row in all_seeds if "error" not in row]
        if not seeds:
            rows.append([name, *[""] * 5, all_seeds[0]["error"].split(";")[0]])
            continue
        radii = [_spread([row["radii"][k] for row in seeds], ".2f") for k in range(3)]
        many = _spread([row["unbound"] for row in seeds], ".1f")
        rows.append([name, *(_spread([row[key] for row in seeds]) for key in ("force", "drift")), *radii, many])
    head = ("differences, products; sums", "force error", "energy drift", "10 %", "50 %", "90 %", "unbound")
    seeds = max(map(len, found.values()))
    about = (
        f"{data['stars']:,} stars, {data['particles']:,} particles, {data['until']:g} N-body times, seeds: {seeds}; "
        f"{data['hardware']}, torch {data['versions']['torch']}. Stars' own energy: "
        f"{max(abs(row['energy']) for row in found['fp64']):.1g} at most."
    )
    return f"{table(head, rows)}\n{about}\n"


def star_directions() -> str:
    """Who sinks and who doesn't, by how dense a cluster begins."""
    data, found = _cluster("directions")
    rows = []
    for name, seeds in found.items():
        ends = [(row["rows"][0], row["rows"][-1]) for row in seeds]
        half = [_spread([b[who][2] / a[who][2] for a, b in ends], ".2f") for who in ("heaviest", "stars", "particles")]
        core = [_spread([b[who][0] / a[who][0] for a, b in ends], ".2f") for who in ("stars", "particles")]
        gone = data["escape_speeds"][name]
        same = f"p = {gone['p']:.2g}" if "p" in gone else "too few"
        rows.append([name, *half, *core, f"{gone['stars']} / {gone['particles']}, {same}"])
    head = (
        "start",
        "heaviest tenth, 50 %",
        "stars, 50 %",
        "particles, 50 %",
        "stars, 5 %",
        "particles, 5 %",
        "escaped",
    )
    return f"{table(head, rows)}\n"


def star_speed() -> str:
    """Seconds of one evaluation of forces."""
    data, found = _cluster("speed")
    if data["device"] == "cpu":
        return "This result is of a processor that others used at the time, so it has no seconds to show.\n"
    timed, plain = {name: rows[0]["seconds"] for name, rows in found.items()}, found["fp64"][0]["seconds"]
    counts = [count for count in plain if "massive" not in count]
    rows = [
        [name + (", emulated" if found[name][0]["emulated"] else ""), *(f"{times[count]:.2g}" for count in counts)]
        for name, times in timed.items()
    ]
    massive = [f"{plain[f'{n} massive']:.2g}" if f"{n} massive" in plain else "" for n in counts]
    rows.append(["fp64, all bodies massive", *massive])
    return f"{table(('seconds for so many particles', *counts), rows)}\n"


TABLES: dict[str, Callable[[], str]] = {
    **{
        f.__name__: f
        for f in (demo, gptq, fake_quantize, speed, memory, minilm, vit, cnn, composition, onnx_layers, qlora)
    },
    **{f.__name__: f for f in (star_formats, star_directions, star_speed)},
    **{f.__name__: f for f in (optimizer_quality, optimizer_speed, training_memory, c_train)},
    **registries.TABLES,
}

if __name__ == "__main__":
    main()
