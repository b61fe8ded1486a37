"""The example of massless particles in a star cluster: what its sheet asks, small; ``rebound`` judges orbits."""

from __future__ import annotations

import ast
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples.star_cluster import start
from examples.star_cluster.forces import Formats, exact, quantizer, rounded
from examples.star_cluster.hermite import Bodies, Cluster
from scipy import integrate
from torch import Tensor

from nybble.core.errors import DataError, FileError, NybbleError, UsageError
from nybble.core.progress import Silent

command = importlib.import_module("examples.star_cluster.__main__")
FOLDER = Path(start.__file__).parent
Pair = tuple[Tensor, Tensor]


def bodies(at: Pair, most: float = 2.0**-6, eta: float | None = None) -> Bodies:
    return Bodies(*at, most, eta)


def none() -> Bodies:
    return bodies((torch.zeros(0, 3).double(), torch.zeros(0, 3).double()))


def asked(**changes: Any) -> dict[str, Any]:
    small = {
        "stars": 16,
        "particles": 20,
        "until": 0.125,
        "every": 0.03125,
        "eta": 0.04,
        "most": 2.0**-5,
        "softening": 1 / 16,
        "step": 2.0**-5,
    }
    return {**command.ASKED, **small, **changes}


# ------------------------------------------------------------------------------------------------ the start
def test_a_plummer_sphere_in_units_of_n_bodies() -> None:
    """E = -1/4, virial ratio 1/2, half of the mass within 1.305 b; four deviations of 2,000 draws wide."""
    n = 2000
    mass, (x, v) = start.masses(n, 3), start.plummer(n, 3, "stars")
    phi = exact(x, v, (x, v, mass), 0.0, torch.arange(n))[:, 6]
    kinetic, pot = float((mass * v.square().sum(1)).sum() / 2), float((mass * phi).sum() / 2)
    assert kinetic == pytest.approx(0.25, abs=0.02) and pot == pytest.approx(-0.5, abs=0.04)
    assert kinetic / -pot == pytest.approx(0.5, abs=0.04)
    assert float(x.norm(dim=1).median()) == pytest.approx(1.305 * start.PLUMMER, abs=0.06)
    assert float(x.norm(dim=1).max()) < start.FARTHEST
    escape = math.sqrt(2) * (x.square().sum(1) + start.PLUMMER**2) ** -0.25
    q = torch.linspace(0, 1, 6).double()[1:-1]
    known = [integrate.quad(lambda s: s**2 * (1 - s**2) ** 3.5, 0, float(each))[0] for each in (*q, 1.0)]
    found = [float((v.norm(dim=1) / escape < each).double().mean()) for each in q]
    assert found == pytest.approx([each / known[-1] for each in known[:-1]], abs=0.045)
    dense = start.plummer(n, 3, "stars", 0.25)
    assert torch.equal(dense[0], x * 0.25) and torch.allclose(dense[1], v * 2)


def test_masses_have_two_slopes() -> None:
    mass = start.masses(20_000, 1, "kroupa")
    assert float(mass.sum()) == pytest.approx(1)
    solar = mass / mass.min() * start.LIGHT  # the least of so many is the limit, within a thousandth

    def density(m: float) -> float:
        return math.pow(m, -1.3) if m < start.BREAK else start.BREAK * math.pow(m, -2.3)

    whole = integrate.quad(density, start.LIGHT, start.HEAVY, points=[start.BREAK])[0]
    for limit in (0.2, 0.5, 1.0, 5.0):
        share = integrate.quad(density, start.LIGHT, limit, points=[start.BREAK])[0] / whole
        assert float((solar < limit).double().mean()) == pytest.approx(share, abs=0.015), limit


# ------------------------------------------------------------------------------------------------ the integrator
def kepler(e: float, t: float) -> list[float]:
    """Relative position on an orbit of G M = a = 1 that begins farthest out."""
    anomaly = math.pi + t
    for _ in range(60):
        anomaly -= (anomaly - e * math.sin(anomaly) - math.pi - t) / (1 - e * math.cos(anomaly))
    return [math.cos(anomaly) - e, math.sqrt(1 - e * e) * math.sin(anomaly), 0.0]


def two(e: float, h: float) -> tuple[float, float]:
    """Largest position error and energy error within an orbit at constant steps."""
    far, speed = -(1 + e), -math.sqrt((1 - e) / (1 + e))
    x, v = (torch.tensor([first, [0.0] * 3], dtype=torch.float64) for first in ([far, 0, 0], [0, speed, 0]))
    mass = torch.tensor([0.5, 0.5]).double()
    pair = bodies((x - x.mean(0), v - v.mean(0)), h)
    cluster = Cluster(mass, pair, none(), 0.0, Formats())
    wrong = [0.0, 0.0]
    for k in range(1, 25):
        cluster.run(k / 4)
        known = torch.tensor(kepler(e, k / 4), dtype=torch.float64)
        wrong[0] = max(wrong[0], float((pair.x[0] - pair.x[1] - known).norm()))
        energy = 0.5 * float((mass * (cluster.energies()[0] + pair.v.square().sum(1) / 2)).sum())
        wrong[1] = max(wrong[1], abs(energy + 0.125))
    return wrong[0], wrong[1]


@pytest.mark.parametrize(("e", "h"), [(0.0, 2.0**-4), (0.5, 2.0**-6)])
def test_errors_fall_sixteenfold_when_steps_are_halved(e: float, h: float) -> None:
    coarse, fine = two(e, h), two(e, h / 2)
    assert 15 < coarse[0] / fine[0] < 19
    assert e == 0 or 15 < coarse[1] / fine[1] < 19


def test_stars_keep_their_energy() -> None:
    wrong = []
    for eta in (0.02, 0.005):
        cluster = command.build(asked(stars=64, particles=0, eta=eta))
        before = command.row(cluster)["energy"]
        cluster.run(1.0)
        wrong.append(abs(command.row(cluster)["energy"] / before - 1))
        assert len(set(cluster.stars.h.tolist())) > 1 and torch.equal(cluster.stars.t, torch.ones(64).double())
    assert wrong[0] < 1e-6 and wrong[1] < wrong[0] / 4


def test_orbits_are_those_of_rebound() -> None:
    """IAS15's; ours come 16-fold nearer with a quarter of eta."""
    stars, particles = 24, 40
    rebound = pytest.importorskip("rebound", reason="the peer of the star cluster: pip install rebound")
    mass = start.masses(stars, 0, "kroupa")
    at = [start.plummer(n, 0, who) for n, who in ((stars, "stars"), (particles, "particles"))]
    sim = rebound.Simulation()
    sim.integrator, sim.softening, sim.testparticle_type = "ias15", 1 / 16, 0
    for m, (x, v) in ((mass, at[0]), (torch.zeros(particles), at[1])):
        for one, place, speed in zip(m.tolist(), x.tolist(), v.tolist(), strict=True):
            sim.add(m=one, x=place[0], y=place[1], z=place[2], vx=speed[0], vy=speed[1], vz=speed[2])
    sim.N_active = stars
    sim.integrate(1.0)
    known = torch.tensor([[p.x, p.y, p.z] for p in sim.particles], dtype=torch.float64)
    wrong = []
    for eta in (0.02, 0.005):
        ours = Cluster(mass, bodies(at[0], 2.0**-4, eta), bodies(at[1], 2.0**-4, eta), 1 / 16, Formats())
        ours.run(1.0)
        apart = (torch.cat([ours.stars.x, ours.particles.x]) - known).norm(dim=1)
        wrong.append(float(apart.square().mean().sqrt()))
    assert wrong[0] < 5e-7 and wrong[1] < 4e-8  # the sheet's: 1.7e-7 and 1.1e-8, of 64 stars
    assert 8 < wrong[0] / wrong[1] < 32


# ------------------------------------------------------------------------------------------------ particles
def test_stars_do_not_know_of_particles() -> None:
    """Bit for bit: without particles, with some, with other formats and steps."""
    alone = command.build(asked(particles=0))
    alone.run(0.125)
    for changes in ({}, {"particles": 77, "step": 2.0**-4}, {"differences": "e5m2", "sums": "bf16", "block": 5}):
        beside = command.build(asked(**changes))
        beside.run(0.125)
        for part in ("x", "v", "a", "h"):
            assert torch.equal(getattr(alone.stars, part), getattr(beside.stars, part)), (changes, part)


def drawn(stars: int = 70, particles: int = 9) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    return (
        *start.plummer(particles, 1, "particles"),
        (*start.plummer(stars, 1, "stars"), start.masses(stars, 1, "kroupa")),
    )


def gravity(x: Tensor, v: Tensor, stars: tuple[Tensor, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Acceleration and its derivative in time, by numpy, in 80 bits."""
    sx, sv, mass = (each.numpy().astype(np.longdouble) for each in stars)
    d, u = sx - x.numpy()[:, None], sv - v.numpy()[:, None]
    square = (d**2).sum(2, keepdims=True) + np.longdouble(1) / 64**2
    pull = mass[:, None] * d / square**1.5
    jerk = mass[:, None] * u / square**1.5 - 3 * (d * u).sum(2, keepdims=True) * pull / square
    return np.concatenate([pull.sum(1), jerk.sum(1)], 1).astype(np.float64)


@pytest.mark.parametrize("block", [1, 32, 100])
def test_float64_is_the_sum_in_the_order_of_stars(block: int) -> None:
    """Bit for bit what one star after another adds up to; and within a wide radius, whatever the format.

    Not by numpy: the square roots of torch's library differ from IEEE's in the last bit.
    """
    x, v, stars = drawn()
    total = torch.zeros(len(x), 6).double()
    for place, speed, mass in zip(*stars, strict=True):
        d, u = place - x, speed - v
        square = d[:, 0] * d[:, 0] + d[:, 1] * d[:, 1] + d[:, 2] * d[:, 2] + 1 / 64**2
        by = (mass / (square * square.sqrt()))[:, None]
        along = ((d[:, 0] * u[:, 0] + d[:, 1] * u[:, 1] + d[:, 2] * u[:, 2]) / square)[:, None]
        total += torch.cat([d * by, (u - 3 * along * d) * by], 1)
    near = Formats(differences="e2m1", masses="int4", products="bf16", exact_within=1e9)
    for formats in (Formats(block=block), near):
        assert torch.equal(rounded(x, v, stars, 1 / 64, formats), total)
    true = gravity(x, v, stars)
    assert np.allclose(exact(x, v, stars, 1 / 64)[:, :6].numpy(), true, rtol=1e-12)
    assert np.allclose(total.numpy(), true, rtol=1e-12)


@pytest.mark.parametrize(
    ("line", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_sums_round_after_every_addition(line: str, dtype: torch.dtype) -> None:
    """As torch adds numbers of that dtype."""
    x, v, stars = drawn()
    formats = Formats(products=line, sums=line)
    total = torch.zeros(len(x), 3, dtype=dtype)
    for k in range(len(stars[2])):
        d = stars[0][k] - x
        square = d[:, 0] * d[:, 0] + d[:, 1] * d[:, 1] + d[:, 2] * d[:, 2] + 1 / 16**2
        total = total + (d * (stars[2][k] / (square * square.sqrt()))[:, None]).to(dtype)
    assert torch.equal(rounded(x, v, stars, 1 / 16, formats)[:, :3], total.double())


def test_a_block_shares_a_scale_with_all_its_components() -> None:
    """One far star costs the near ones of its block their bits, and no other block's."""
    x, v = torch.zeros(1, 3).double(), torch.zeros(1, 3).double()
    near = torch.tensor([[0.3, 0.2, 0.1]]).double()
    sx = torch.cat([near, near, near + 1000])
    stars = (sx, torch.zeros(3, 3).double(), torch.tensor([1.0, 0, 0]).double())
    found = {block: rounded(x, v, stars, 0.1, Formats(differences="int8", block=block))[0, :3] for block in (1, 2, 3)}
    assert torch.equal(found[1], found[2]) and float(found[1].norm()) > 1
    assert torch.equal(found[3], torch.zeros(3).double())  # 0.3 is less than half of 8, the step of 1000 in 8 bits


def test_lines_have_the_scales_they_name() -> None:
    """Those of a preset, those a line says, none for 16-bit floats; and one a row, whatever the preset's groups."""
    found = [str(quantizer(line)) for line in ("bf16", "e4m3", "bfp16", "int8 scale=absmax")]
    assert [line.split(" scale_format")[0] for line in found] == [
        "float16_e8m7 token scale=one", "float8_e4m3fn token scale=pow2(mode=rceil)", "int8 token scale=pow2",
        "int8 token",
    ]  # fmt: skip


FORCE = {  # rms relative errors of the sheet's own float64 prototype: other draws, so within a factor
    ("fp32", "fp32", "fp32"): 4.9e-7, ("fp16", "fp16", "fp32"): 1.2e-4, ("bf16", "bf16", "fp32"): 9.9e-4,
    ("e4m3", "fp32", "fp32"): 1.2e-2, ("e5m2", "fp32", "fp32"): 3.1e-2, ("fp16", "fp16", "fp16"): 5.0e-3,
    ("bf16", "bf16", "bf16"): 2.4e-1,
}  # fmt: skip


@pytest.mark.parametrize(("formats", "known"), FORCE.items(), ids=map("/".join, FORCE))
def test_force_errors(formats: tuple[str, str, str], known: float) -> None:
    x, v = start.plummer(150, 0, "particles")
    stars = (*start.plummer(1024, 0, "stars"), start.masses(1024, 0))
    true = exact(x, v, stars, 1 / 64)[:, :3]
    found = rounded(x, v, stars, 1 / 64, Formats(differences=formats[0], products=formats[1], sums=formats[2]))[:, :3]
    error = float(((found - true).norm(dim=1) / true.norm(dim=1)).square().mean().sqrt())
    assert known / 1.8 < error < known * 1.8
    if formats[2] == "bf16":
        assert float((found.norm(dim=1) / true.norm(dim=1)).mean()) < 0.9  # what is small is lost: always too weak


def test_positions_are_not_what_is_rounded() -> None:
    """Differences of rounded positions lose ten times as much."""
    x, v = start.plummer(100, 0, "particles")
    stars = (*start.plummer(512, 0, "stars"), start.masses(512, 0))
    true = exact(x, v, stars, 1 / 64)[:, :3]
    late = rounded(x, v, stars, 1 / 64, Formats(differences="fp16"))[:, :3]
    early = exact(x.half().double(), v, (stars[0].half().double(), *stars[1:]), 1 / 64)[:, :3]
    lost = [float(((each - true).norm(dim=1) / true.norm(dim=1)).square().mean().sqrt()) for each in (early, late)]
    assert lost[0] > 5 * lost[1]


def test_energy_in_a_frozen_field() -> None:
    """Each particle's is conserved, 16-fold better at half the step; formats that lose force lose it."""
    drift = {}
    cases: dict[str, dict[str, Any]] = {
        "coarse": {"step": 2.0**-5}, "fine": {}, "fp16": {"differences": "fp16", "products": "fp16", "sums": "fp32"},
        "bf16": dict.fromkeys(("differences", "products", "sums"), "bf16"),
    }  # fmt: skip
    for name, changes in cases.items():
        cluster = command.build(asked(**{"softening": 1 / 4, "step": 2.0**-6, **changes}), frozen=True)
        x, before = cluster.stars.x.clone(), cluster.energies()[1]
        cluster.run(1.0)
        assert torch.equal(cluster.stars.x, x)
        drift[name] = float((cluster.energies()[1] - before).square().mean().sqrt())
    assert drift["fine"] < drift["coarse"] / 10
    assert drift["fine"] < drift["fp16"] < drift["bf16"] / 5


# ------------------------------------------------------------------------------------------------ the run
def test_figures_of_a_snapshot() -> None:
    """Radii by numpy's own order; who is far and fast has escaped."""
    cluster = command.build(asked(particles=40))
    cluster.particles.x[0], cluster.particles.v[0] = torch.tensor([50.0, 0, 0]), torch.tensor([3.0, 4, 0])
    cluster.particles.x[1], cluster.particles.v[1] = torch.tensor([50.0, 0, 0]), torch.zeros(3)
    found = command.row(cluster, 20.0)
    r = np.sort((cluster.particles.x - cluster.stars.x.median(0).values).norm(dim=1).numpy())
    assert found["particles"] == [r[1], r[3], r[19], r[35]]
    assert found["speeds"] == {"stars": [], "particles": [5.0]}
    equal = command.row(command.build(asked(spectrum="equal", particles=0)))
    assert equal["heaviest"] == equal["stars"] and equal["particles"] == []


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same bytes as one that wasn't, and the same picture."""
    wanted = asked(differences="fp16", sums="fp32")
    whole = command.follow(wanted, tmp_path / "whole", Silent())
    saved = command.save_state

    def killed(cluster: Cluster, told: dict[str, Any], path: Path) -> None:
        if len(told["rows"]) > 3:
            raise KeyboardInterrupt
        saved(cluster, told, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(command, "save_state", killed)
        command.follow(wanted, tmp_path / "killed", Silent())
    assert not (tmp_path / "killed" / "record.json").exists()
    assert command.follow(wanted, tmp_path / "killed", Silent()) == whole
    for name in ("record.json", "cluster.png", "state.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert [row["t"] for row in json.loads((tmp_path / "whole/record.json").read_text())["rows"]][-1] == 0.125
    with pytest.raises(UsageError, match="another run"):
        command.follow(asked(seed=1), tmp_path / "whole", Silent())
    (tmp_path / "whole" / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(FileError, match="can't be read"):
        command.follow(wanted, tmp_path / "whole", Silent())


def test_the_command_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["star_cluster", str(tmp_path / "out"), "--sums", "e4m3"])
    with pytest.raises(SystemExit, match=r"^error: sums in 'e4m3' would share a scale; take fp32"):
        command.main()
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"stars": 0}, UsageError, "0 stars"),
        ({"softening": -0.1}, UsageError, "softening -0.1"),
        ({"softening": math.nan}, UsageError, "softening nan"),
        ({"spectrum": "salpeter"}, UsageError, "'salpeter' masses"),
        ({"differences": "fp17"}, UsageError, "fp17"),
        ({"block": 0}, UsageError, "blocks of 0"),
        ({"step": 0.3}, UsageError, "powers of two"),
        ({"eta": 0.0}, UsageError, "eta 0.0"),
        ({"scale": 0.0}, UsageError, "scale"),
        ({"particles": -1}, UsageError, "particles"),
    ],
)
def test_refused_requests(changes: dict[str, Any], kind: type[NybbleError], says: str) -> None:
    with pytest.raises(kind, match=says):
        command.build(asked(**changes))


def stars_of(mass: list[float], x: list[list[float]]) -> Cluster:
    at = torch.tensor(x).double()
    return Cluster(torch.tensor(mass).double(), bodies((at, at * 0)), bodies((at[:1] * 0, at[:1] * 0)), 0.0, Formats())


@pytest.mark.parametrize(
    ("mass", "x", "says"),
    [
        ([1, -1], [[1, 0, 0], [2, 0, 0]], "star 1 has the mass -1"),
        ([1, math.nan], [[1, 0, 0], [2, 0, 0]], "mass 1 is not"),
        ([1, 1], [[1, 0, 0], [2, 0, math.inf]], "star 1 is not"),
        ([1, 1], [[1, 0, 0], [1, 0, 0]], "at one place, and softening is 0"),
        ([1, 1], [[0, 0, 0], [1, 0, 0]], "a particle and a star are at one place"),
    ],
)
def test_refused_clusters(mass: list[float], x: list[list[float]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        stars_of(mass, x)


def test_sums_that_overflow_and_times_between_steps() -> None:
    x, v, stars = drawn()
    with pytest.raises(DataError, match=r"of 9 force sums are beyond e3m2 scale=one \(28\); take a wider format"):
        rounded(x, v, (stars[0], stars[1], stars[2] * 1e4), 1 / 64, Formats(sums="e3m2 scale=one"))
    with pytest.raises(UsageError, match="no multiple"):
        command.build(asked()).run(0.01)


def test_steps_at_the_floor_are_counted() -> None:
    """A close pair without softening asks for steps below it."""
    cluster = stars_of([1, 1], [[1, 0, 0], [1 + 1e-5, 0, 0]])
    cluster.stars.eta = 0.01
    cluster.stars.h = cluster.stars._power(torch.tensor([1e-12, 1e-3]).double())
    assert cluster.stars.h.tolist() == [2.0**-24, 2.0**-10] and int(cluster.stars.count[1]) == 1


def test_only_what_is_public_is_used() -> None:
    names = []
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nybble"):
                names += [f"{node.module}.{each.name}" for each in node.names]
    assert names and not [name for name in names if "._" in name]
