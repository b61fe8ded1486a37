"""Number formats in a star cluster: what they do to forces, orbits and statistics of massless particles.

    python benchmarks/star_cluster.py                         the pages' rows, at the size of a processor; minutes
    python benchmarks/star_cluster.py --device cuda --stars 1024 --particles 2048 --until 4 --workers 14
    python benchmarks/star_cluster.py --only page             docs/star-cluster.png anew from the result

Each row is a file in ``--work`` when it is done, so a run that was ended goes on. Rows: ``formats`` (force error, drift
of particles' energy in a frozen field, radii and escapes in a moving one), ``directions`` (two densities, for longer),
and ``speed`` (one evaluation; and ``million``, a part of a run with so many particles).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
command = importlib.import_module("examples.star_cluster.__main__")

from examples.star_cluster import start  # noqa: E402
from examples.star_cluster.forces import Formats, exact, rounded  # noqa: E402

from nybble.core.files import atomic_write_json  # noqa: E402
from nybble.core.versions import versions  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "star_cluster.json"
FORMATS: dict[str, tuple[str, str, str]] = {  # differences and masses, products, sums
    "fp64": ("fp64", "fp64", "fp64"), "fp32 throughout": ("fp32", "fp32", "fp32"),
    "fp16, sums fp32": ("fp16", "fp16", "fp32"), "bf16, sums fp32": ("bf16", "bf16", "fp32"),
    "int8 blocks, fp32": ("int8", "fp32", "fp32"), "E4M3 blocks, fp32": ("e4m3", "fp32", "fp32"),
    "E5M2 blocks, fp32": ("e5m2", "fp32", "fp32"), "BFP16 blocks, fp32": ("bfp16", "fp32", "fp32"),
    "BFP16 blocks, near exact": ("bfp16", "fp32", "fp32"), "E2M1 blocks, fp32": ("e2m1", "fp32", "fp32"),
    "fp16 throughout": ("fp16", "fp16", "fp16"), "bf16 throughout": ("bf16", "bf16", "bf16"),
}  # fmt: skip


def of(name: str) -> dict[str, Any]:
    """The options of a row of formats."""
    operands, products, sums = FORMATS[name]
    mass = operands if operands in ("fp64", "fp32", "fp16", "bf16") else "fp32"
    return {
        "differences": operands, "masses": mass, "products": products, "sums": sums,
        "exact_within": 0.25 if "near" in name else 0.0,
    }  # fmt: skip


def asked(given: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run of the example."""
    same = {key: given[key] for key in ("stars", "particles", "until", "device")}
    return {**command.ASKED, **same, "spectrum": "equal", **changes}


def formats(given: dict[str, Any], name: str, seed: int) -> dict[str, Any]:
    """Forces, drift where stars are frozen, and statistics where they move."""
    request = asked(given, seed=seed, **of(name))
    frozen = command.build(request, frozen=True)
    true = exact(frozen.particles.x, frozen.particles.v, frozen.sources(), request["softening"])[:, :3]
    before = frozen.energies()[1]
    error = (frozen.particles.a - true).norm(dim=1) / true.norm(dim=1)
    ratio = frozen.particles.a.norm(dim=1) / true.norm(dim=1)
    found = {"force": float(error.square().mean().sqrt()), "strength": float(ratio.mean())}
    frozen.run(request["until"])
    drift = frozen.energies()[1] - before
    moving = command.build(request)
    first = command.row(moving)
    moving.run(request["until"])
    last = command.row(moving, first["far"])
    unbound = int((moving.energies()[1] > 0).sum())
    return found | {
        "drift": float(drift.square().mean().sqrt()), "radii": last["particles"][1:], "unbound": unbound,
        "escaped": len(last["speeds"]["particles"]), "energy": last["energy"] / first["energy"] - 1,
        "star_radii": last["stars"], "star_steps": last["evaluations"][0] / request["stars"],
    }  # fmt: skip


def directions(given: dict[str, Any], name: str, seed: int) -> dict[str, Any]:
    """A cluster with a spectrum of masses, for twice as long."""
    request = asked(given, seed=seed, spectrum="kroupa", scale=float(name.split()[-1]), until=2 * given["until"])
    request["step"] = request["step"] * request["scale"]
    cluster = command.build(request)
    rows = [command.row(cluster)]
    for k in range(1, int(request["until"] / request["every"]) + 1):
        cluster.run(k * request["every"])
        rows.append(command.row(cluster, rows[0]["far"]))
    return {"scale": request["scale"], "rows": rows}


def timed(given: dict[str, Any], call: Any) -> float:
    """Seconds of the best of three."""
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        call()
        if given["device"] == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return best


def speed(given: dict[str, Any], name: str, seed: int) -> dict[str, Any]:
    """Seconds of one evaluation, by particles; of fp64 also with every body massive."""
    stars = [
        x.to(given["device"]) for x in (*start.plummer(given["stars"], seed, "stars"), start.masses(given["stars"], 0))
    ]
    options, found = Formats(**of(name)), {}
    for count in given["counts"]:
        x, v = (each.to(given["device"]) for each in start.plummer(count, seed, "particles"))
        found[f"{count:,}"] = timed(given, lambda x=x, v=v: rounded(x, v, tuple(stars), 1 / 64, options))
        if name == "fp64" and count <= given["massive"]:
            everyone = tuple(torch.cat([a, b]) for a, b in zip(stars, (x, v, x[:, 0] * 0), strict=True))
            own = torch.arange(len(everyone[0]), device=x.device)
            both = lambda e=everyone, own=own: exact(e[0], e[1], e, 1 / 64, own)  # noqa: E731
            found[f"{count:,} massive"] = timed(given, both)
    return {"seconds": found, "emulated": name != "fp64"}


def million(given: dict[str, Any], name: str, seed: int) -> dict[str, Any]:
    """A sixteenth of an N-body time with ``--many`` particles."""
    begun = time.perf_counter()
    cluster = command.build(asked(given, particles=given["many"], seed=seed, **of(name)))
    built, rows = time.perf_counter() - begun, [command.row(cluster)]
    begun = time.perf_counter()
    cluster.run(1 / 16)
    rows.append(command.row(cluster, rows[0]["far"]))
    return {"particles": given["many"], "setup": built, "seconds": time.perf_counter() - begun, "rows": rows}


KINDS = {"formats": formats, "directions": directions, "speed": speed, "million": million}


def work(given: dict[str, Any], kind: str, name: str, seed: int) -> None:
    """One row, into its file."""
    torch.set_num_threads(1 if given["workers"] > 1 else os.cpu_count() or 1)
    begun = time.perf_counter()
    try:
        found = {"formats": formats, "directions": directions, "speed": speed, "million": million}[kind](
            given, name, seed
        )
    except command.NybbleError as error:  # a format that can't: a row like any other
        found = {"error": str(error)}
    row = {"kind": kind, "name": name, "seed": seed, "took": round(time.perf_counter() - begun, 1), **found}
    atomic_write_json(file_of(given, kind, name, seed), row)
    print(kind, name, seed, f"{row['took']:.0f} s", found.get("error", ""), flush=True)


def file_of(given: dict[str, Any], kind: str, name: str, seed: int) -> Path:
    """Where a row is when it is done."""
    return Path(given["work"]) / f"{kind} {name} {seed}.json"


def main() -> None:
    """Run what is missing; write the result and the picture."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    ask.add_argument("--stars", type=int, default=128)
    ask.add_argument("--particles", type=int, default=256)
    ask.add_argument("--until", type=float, default=1.0, help="N-body times; directions: twice that")
    ask.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    ask.add_argument("--counts", type=int, nargs="*", default=[1000, 4000], help="particles whose forces are timed")
    ask.add_argument("--massive", type=int, default=4000, help="particles up to which all-massive forces are timed")
    ask.add_argument("--many", type=int, default=0, help="particles of the row of a million; 0: none")
    ask.add_argument("--only", nargs="*", default=["formats", "directions", "speed", "million"])
    ask.add_argument("--workers", type=int, default=1, help="rows at a time, but for those that are timed")
    ask.add_argument("--seconds", type=float, default=1e9, help="begin no row after that")
    ask.add_argument("--work", default=str(ROOT / "build" / "star_cluster"))
    ask.add_argument("--out", type=Path, default=OUT)
    given = vars(ask.parse_args())
    Path(given["work"]).mkdir(parents=True, exist_ok=True)
    each = [("directions", f"radii x {scale}") for scale in (1.0, 0.5)] + [("formats", name) for name in FORMATS]
    rows = [(kind, name, seed) for seed in given["seeds"] for kind, name in each]
    alone = [("speed", name, 0) for name in FORMATS]
    alone += [("million", name, 0) for name in ("fp64", "fp16, sums fp32") if given["many"]]
    run(given, rows, given["workers"])
    run(given, alone, 1)
    if "page" not in given["only"]:
        collect(given, rows + alone)
    told = json.loads(given["out"].read_text())["rows"]
    seed = min([row["seed"] for row in told if row["kind"] == "directions"], default=-1)
    runs = {r["name"]: r["rows"] for r in told if r["kind"] == "directions" and r["seed"] == seed and "rows" in r}
    if runs:
        command.draw(runs, given["out"].with_suffix(".png") if given["out"] != OUT else ROOT / "docs/star-cluster.png")


def run(given: dict[str, Any], rows: list[tuple[str, str, int]], workers: int) -> None:
    """Those that are wanted and have no file."""
    end, todo = time.monotonic() + given["seconds"], [row for row in rows if row[0] in given["only"]]
    todo = [row for row in todo if not file_of(given, *row).exists()]
    if workers == 1:
        for row in todo:
            if time.monotonic() < end:
                work(given, *row)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for each in [pool.submit(_within, end, given, row) for row in todo]:
            each.result()


def _within(end: float, given: dict[str, Any], row: tuple[str, str, int]) -> None:
    if time.monotonic() < end:
        work(given, *row)


def collect(given: dict[str, Any], rows: list[tuple[str, str, int]]) -> None:
    """One file of all rows that are done."""
    done = [json.loads(file_of(given, *row).read_text()) for row in rows if file_of(given, *row).exists()]
    size = {key: given[key] for key in ("stars", "particles", "until", "device")}
    where = torch.cuda.get_device_name() if given["device"] == "cuda" else f"{processor()}, 1 thread a row"
    atomic_write_json(
        given["out"], {"hardware": where, "versions": versions(), **size, "escape_speeds": speeds(done), "rows": done}
    )


def speeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of escaped stars and particles, all seeds together: counts, and whether they are of one distribution."""
    from scipy.stats import ks_2samp

    found = {}
    for name in dict.fromkeys(row["name"] for row in rows if row["kind"] == "directions"):
        last = [row["rows"][-1]["speeds"] for row in rows if row["name"] == name and "rows" in row]
        stars, particles = (sorted(v for each in last for v in each[who]) for who in ("stars", "particles"))
        found[name] = {"stars": len(stars), "particles": len(particles)}
        if stars and particles:
            test = ks_2samp(stars, particles)
            found[name] |= {"distance": float(test.statistic), "p": float(test.pvalue)}
    return found


def processor() -> str:
    """Its name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "a processor")


if __name__ == "__main__":
    main()
