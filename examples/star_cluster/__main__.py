"""Massless particles in a star cluster: stars in float64, their pull on particles in any number format of nybble.

    python -m examples.star_cluster OUT --particles 10000 --differences fp16 --products fp16 --sums fp32

OUT/state.safetensors is the whole run after its last snapshot: the same command goes on from there. OUT/record.json and
OUT/cluster.png are made of it. Not NBODY6++: binaries aren't regularised, stars don't age, there is no tide.
"""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch
from examples.star_cluster.forces import Formats
from examples.star_cluster.hermite import Bodies, Cluster
from examples.star_cluster.start import masses, plummer
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from nybble.core.errors import FileError, NybbleError, UsageError
from nybble.core.files import atomic_write_bytes, atomic_write_json, disk_errors
from nybble.core.progress import Bars, Progress, task

ASKED: dict[str, Any] = {
    "stars": 1024, "particles": 10_000, "spectrum": "kroupa", "scale": 1.0, "seed": 0, "until": 10.0, "every": 0.25,
    "softening": 1 / 64, "eta": 0.01, "most": 2.0**-4, "step": 2.0**-8, "differences": "fp64", "masses": "fp64",
    "products": "fp64", "sums": "fp64", "block": 32, "exact_within": 0.0, "device": "cpu",
}  # fmt: skip
COLOURS = {"stars": "#0072b2", "particles": "#d55e00", "heaviest": "#009e73"}
SHARES = torch.tensor((0.05, 0.1, 0.5, 0.9), dtype=torch.float64)


def build(asked: dict[str, Any], frozen: bool = False) -> Cluster:
    """The cluster at its start; UsageError: what there can't be."""
    if not asked["scale"] > 0 or asked["particles"] < 0 or not asked["every"] > 0:
        raise UsageError("scale and every are above 0, and particles 0 or more.")
    mass = masses(asked["stars"], asked["seed"], asked["spectrum"])
    stars, free = (plummer(asked[who], asked["seed"], who, asked["scale"]) for who in ("stars", "particles"))
    there = [x.to(asked["device"]) for x in (mass, *(x - mass @ x for x in stars), *free)]
    formats = {key: asked[key] for key in ("differences", "masses", "products", "sums", "block", "exact_within")}
    bodies = Bodies(*there[1:3], asked["most"], asked["eta"]), Bodies(*there[3:], asked["step"], None)
    return Cluster(there[0], *bodies, asked["softening"], Formats(**formats), frozen)


def radii(r: Tensor, mass: Tensor) -> list[float]:
    """Within which SHARES of the mass are."""
    order = r.argsort()
    at = torch.searchsorted(mass[order].cumsum(0) / mass.sum(), SHARES.to(r.device)).clamp(max=len(r) - 1)
    return r[order][at].tolist() if len(r) else []


def row(cluster: Cluster, far: float = 0.0) -> dict[str, Any]:
    """A snapshot's figures. Unbound ones farther out than ``far`` (0: ten half-mass radii now) have escaped."""
    both, mass, energies = (cluster.stars, cluster.particles), cluster.mass, cluster.energies()
    r = [(each.x - cluster.stars.x.median(0).values).norm(dim=1) for each in both]  # ejected stars move a mean
    far = far or 10 * radii(r[0], mass)[2]
    gone = [b.v[(e > 0) & (at > far)].norm(dim=1).tolist() for b, e, at in zip(both, energies, r, strict=True)]
    heavy = mass >= mass.topk(max(1, len(mass) // 10)).values[-1]
    total = float((mass * (energies[0] + cluster.stars.v.square().sum(1) / 2)).sum() / 2)
    return {
        "t": cluster.t, "energy": total, "far": far, "stars": radii(r[0], mass), "particles": radii(r[1], r[1] * 0 + 1),
        "heaviest": radii(r[0][heavy], mass[heavy]), "speeds": {"stars": gone[0], "particles": gone[1]},
        "evaluations": [int(b.count[0]) for b in both], "at_the_floor": sum(int(b.count[1]) for b in both),
    }  # fmt: skip


def load_state(cluster: Cluster, asked: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """Put a cluster where a run was; its rows. FileError: not such a file; UsageError: it is of another run."""
    try:
        with disk_errors(path):
            found = load(path.read_bytes())
        told = json.loads(bytes(found.pop("told").tolist()))
    except (SafetensorError, KeyError, ValueError) as error:
        raise FileError(f"{path} can't be read ({error}). Remove it to start again.") from error
    if told["asked"] != asked:
        raise UsageError(f"{path} is of another run, {told['asked']}. Take another folder.")
    for name, tensor in found.items():
        setattr(getattr(cluster, name.split(".")[0]), name.split(".")[1], tensor.to(asked["device"]))
    cluster.t = told["rows"][-1]["t"]
    return told["rows"]


def save_state(cluster: Cluster, told: dict[str, Any], path: Path) -> None:
    """All that a run needs to go on, whole or not at all."""
    tensors = {"told": torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)}
    for who, each in (("stars", cluster.stars), ("particles", cluster.particles)):
        tensors |= {f"{who}.{name}": getattr(each, name).cpu().contiguous() for name in (*"xvajth", "count")}
    atomic_write_bytes(path, save(tensors))


def follow(asked: dict[str, Any], out: Path, progress: Progress) -> list[dict[str, Any]]:
    """Run to the end, from where an earlier run was."""
    cluster, state, count = build(asked), out / "state.safetensors", int(asked["until"] / asked["every"])
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    rows = load_state(cluster, asked, state) if state.exists() else [row(cluster)]
    with task(progress, count, "snapshots"):
        progress.advance(len(rows) - 1)
        for k in range(len(rows), count + 1):
            cluster.run(k * asked["every"])
            rows.append(row(cluster, rows[0]["far"]))
            save_state(cluster, {"asked": asked, "rows": rows}, state)
            progress.advance(1, f"energy {rows[-1]['energy'] / rows[0]['energy'] - 1:+.1e}")
    atomic_write_json(out / "record.json", {"asked": asked, "rows": rows})
    draw({"": rows}, out / "cluster.png")
    return rows


def draw(runs: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Lagrangian radii, mass segregation and escapes of runs, by their names, against time; a PNG."""
    figure, image = Figure(figsize=(13, 4), layout="constrained"), io.BytesIO()
    axes = figure.subplots(1, 3)
    for style, (name, rows) in zip(("-", "--", ":", "-.", "-"), runs.items(), strict=False):
        t = [each["t"] for each in rows]
        for who, colour in COLOURS.items() if rows[0]["particles"] else [("stars", COLOURS["stars"])]:
            look = {"color": colour, "ls": style, "label": f"{who} {name}"}
            axes[0].semilogy(t, [each[who][1:] for each in rows], color=colour, ls=style)
            axes[1].plot(t, [each[who][2] / rows[0][who][2] for each in rows], **look)
            axes[2].step(t, [len(each["speeds"].get(who, ())) for each in rows], **look)
    for each, name in zip(axes, ("radii of 10, 50, 90 %", "half-mass radius / first", "have escaped"), strict=True):
        each.set(xlabel="N-body times", title=name)
    axes[1].legend()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
    atomic_write_bytes(out, image.getvalue())


def main() -> None:
    """Read what is asked, run, and say where things are."""
    parser = argparse.ArgumentParser("star_cluster", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, value in ASKED.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"({value})")
    asked = vars(parser.parse_args())
    out = asked.pop("out")
    try:
        rows = follow(asked, out, Bars())
    except NybbleError as error:
        sys.exit(f"error: {error}")
    print(f"{out / 'cluster.png'}; steps at the floor: {rows[-1]['at_the_floor']}")


if __name__ == "__main__":
    main()
