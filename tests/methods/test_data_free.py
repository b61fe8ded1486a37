"""Searches taught by a classifier (arXiv:2112.02086): SPOS, DARTS, ProxylessNAS, on its images or given ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.e2e.test_train import _Stops
from tests.patterns import CLASSES, SIDE, fresh, patterns, pixels, save_teacher, teacher
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import nybble
from nybble.core.errors import DataError, FileError, ModelError, NybbleError, SchemeError, UsageError
from nybble.models.operations import OPERATIONS, make_operation
from nybble.models.own.cells import edges
from nybble.pipelines.evaluate import run_eval
from nybble.pipelines.search_architecture import ArchitectureSettings, search_architecture
from nybble.search.architectures import darts, spos
from nybble.search.architectures.darts import Mixed, rows_of
from nybble.search.architectures.proxyless import Gated, expected, likeliest, rescaled, through_gates
from nybble.search.architectures.spos import Bins
from nybble.search.choices.blocks import Alphas, Choices, choices_of, choose
from nybble.search.choices.cell_space import CellSpace, kept
from nybble.search.choices.chain_space import ChainSpace
from nybble.search.choices.macs import Table
from nybble.search.choices.teaching import Pairs, Taught, error, measured_norms, paired, split
from nybble.training.norms import running_norms
from nybble.training.tasks import TASKS

pytest.importorskip("nybble.training.loop", reason="needs accelerate, which nybble's extra 'train' brings")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")

ABOUT: dict[str, Any] = {
    "num_channels": 1, "image_size": [SIDE, SIDE], "id2label": {i: str(i) for i in range(CLASSES)},
    "label2id": {str(i): i for i in range(CLASSES)},
}  # fmt: skip
SHUFFLES = ChainSpace(stem=4, stem_stride=1, head=12, stages=((8, 2, 2), (16, 1, 2)))
BOTTLENECKS = ChainSpace(
    stem=4, stem_stride=1, head=12, stages=((4, 2, 1), (6, 1, 2)), operations=("mb-3-3", "mb-3-5", "skip")
)
CELLS = CellSpace(channels=2, most=4, cells=3, found_cells=3, nodes=2, operations=("none", "skip", "sep-3", "max-pool"))
TAUGHT = Taught(TASKS.get("images"), nn.Identity(), 3.0, hard=True)


def batch(count: int = 12, seed: int = 0) -> dict[str, Tensor]:
    images, labels = patterns(count, seed)
    return {"pixel_values": pixels(images), "labels": torch.from_numpy(labels)}


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_give_what_their_shape_says(name: str) -> None:
    """A shuffle block is ShuffleNetV2's: even channels stay as they are, odd ones go through the branch."""
    x = torch.randn(2, 8, 6, 6)
    for out, stride in ((8, 1), (16, 2)):
        if out == 16 and name in ("skip", "none", "max-pool", "avg-pool"):
            out = 8
        made = make_operation(name, 8, out, stride)
        assert made(x).shape == (2, out, 6 // stride, 6 // stride)
    still = make_operation(name, 8, 8, 1).eval()
    if name.startswith(("shuffle", "xception")):
        assert torch.equal(still(x)[:, :4], x[:, ::2])
    if name.startswith("mb"):
        assert torch.equal(still(x) - x, still.main(x) + x - x)  # type: ignore[operator]


def test_published_networks_have_their_sizes() -> None:
    """DARTS (second order) on CIFAR-10: 3,349,342 parameters in its authors' log."""
    about = {**ABOUT, "num_channels": 3, "image_size": [32, 32], "id2label": {i: str(i) for i in range(10)}}
    a, m, s = "sep-3", "max-pool", "skip"
    normal = [[(0, a), (1, a)], [(0, a), (1, a)], [(0, s), (1, a)], [(0, s), (2, "dil-3")]]
    halving = [[(0, m), (1, m)], [(1, m), (2, s)], [(0, m), (2, s)], [(1, m), (2, s)]]
    with torch.device("meta"):
        made = CellSpace().network({**about, "label2id": {}}, [normal, halving], 36)
    assert sum(p.numel() for p in made.parameters()) == 3_349_342


def test_the_paths_of_spos_lie_in_its_bins() -> None:
    large = {**ABOUT, "num_channels": 3, "image_size": [224, 224], "id2label": {i: str(i) for i in range(1000)}}
    table = ChainSpace().table({**large, "label2id": {}})
    assert table.least < 290e6 < 360e6 < table.most and len(table.places) == 20


@pytest.mark.parametrize("space", [SHUFFLES, BOTTLENECKS], ids=["shuffles", "bottlenecks"])
def test_a_path_is_the_network_alone_and_costs_its_sum(space: ChainSpace) -> None:
    supernet: Any = space.supernet(ABOUT)
    x, table = batch()["pixel_values"], space.table(ABOUT)
    encoding = [len(names) - 1 for names in space.names()]
    choose(supernet.eval(), encoding)
    alone: Any = space.network(ABOUT, encoding)
    state = {}
    for name, value in supernet.state_dict().items():
        place = name.split(".")
        if "operations" in place:
            at = place.index("operations")
            if int(place[at + 1]) != encoding[int(place[at - 1])]:
                continue
            name = ".".join(place[:at] + place[at + 2 :])
        state[name] = value
    alone.load_state_dict(state)
    alone.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert torch.equal(supernet(x).logits, alone(x).logits)
    assert counter.get_total_flops() == 2 * 2 * len(x) * table.of(encoding)  # both networks, two of each product
    assert table.least <= table.of(encoding) <= table.most
    assert space.words(encoding) == [names[-1] for names in space.names()]


def test_norms_measured_anew_leave_weights_alone() -> None:
    supernet = SHUFFLES.supernet(ABOUT)
    before = {name: p.clone() for name, p in supernet.named_parameters()}
    choose(supernet, [1, 2, 0])
    rows = [{"images": patterns(24, 1)[0], "at": i, "label": 0, "wants": _wants()} for i in range(24)]
    measured_norms(supernet, TASKS.get("images"), rows, 8, 2)
    assert all(torch.equal(p, before[name]) for name, p in supernet.named_parameters())
    stem = running_norms(supernet)[0]
    x = pixels(patterns(24, 1)[0])[:16]
    mean = supernet.net.stem[0](x).mean((0, 2, 3))
    assert torch.allclose(stem.running_mean, mean, atol=1e-5)  # type: ignore[arg-type]


def _wants() -> Any:
    from tests.patterns import WANTS

    return WANTS


def test_one_operation_of_weight_one_is_that_operation() -> None:
    made, x = (
        Choices({name: make_operation(name, 4, 4, 1) for name in ("sep-3", "skip", "max-pool")}),
        torch.randn(2, 4, 5, 5),
    )
    made.eval()
    for number in range(3):
        made.weights = functional.one_hot(torch.tensor(number), 3).float()
        mixed = made(x)
        made.weights, made.chosen = None, number
        assert torch.equal(mixed, made(x))


def _mixed(xi: float) -> tuple[Any, Mixed]:
    """A supernet of DARTS in float64, whose BatchNorms don't look at the batch, and its objective."""
    model: Any = CELLS.supernet(ABOUT)
    model.double().eval()
    model.alphas = Alphas([4] * 10, lr=0.1, betas=(0.5, 0.999), decay=0.0)
    model.alphas.double().values.copy_(torch.randn(10, 4))
    return model, Mixed(TAUGHT, rows_of(model, 5), xi)


def test_the_gradient_of_alphas_is_that_of_finite_differences() -> None:
    model, objective = _mixed(0.0)
    first, second = ({**b, "pixel_values": b["pixel_values"].double()} for b in (batch(6, 1), batch(6, 2)))
    found = objective.gradient(model, model.alphas.values, first, second)
    values = model.alphas.values
    with torch.no_grad():
        for edge, number in ((0, 2), (3, 1), (9, 3)):
            step = torch.zeros_like(values)
            step[edge, number] = 1e-2
            change = objective.at(model, values + step, second) - objective.at(model, values - step, second)
            assert float(change) / 2e-2 == pytest.approx(float(found[edge, number]), rel=1e-2, abs=1e-5)
    assert found[4].abs().sum() > 0 and {*rows_of(model, 5)} == {*range(10)}


def test_the_second_order_is_the_gradient_through_a_step_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against autograd through w - xi dL/dw; weights are as before afterwards."""
    xi = 0.05
    monkeypatch.setattr(darts, "REACH", 1e-6)
    model, objective = _mixed(xi)
    first, second = ({**b, "pixel_values": b["pixel_values"].double()} for b in (batch(6, 1), batch(6, 2)))
    before = [p.clone() for p in model.parameters()]
    found = objective.gradient(model, model.alphas.values, first, second)
    assert all(torch.allclose(p, q, atol=1e-12) for p, q in zip(model.parameters(), before, strict=True))
    names = [name for name, p in model.named_parameters()]
    leaf = model.alphas.values.clone().requires_grad_(True)

    def loss(weights: dict[str, Tensor], given: dict[str, Tensor]) -> Tensor:
        chances = leaf.softmax(-1)
        for module, row in zip(choices_of(model), objective.rows, strict=True):
            module.weights = chances[row]
        logits = torch.func.functional_call(model, weights, (given["pixel_values"],)).logits
        return functional.cross_entropy(logits, given["labels"])

    weights = dict(model.named_parameters())
    down: Any = torch.autograd.grad(loss(weights, first), list(weights.values()), create_graph=True, allow_unused=True)
    stepped = {n: w if g is None else w - xi * g for n, w, g in zip(names, weights.values(), down, strict=True)}
    (exact,) = torch.autograd.grad(loss(stepped, second), leaf)
    plain = objective._by_alphas(model, model.alphas.values, second)
    assert (found - exact).norm() < 1e-3 * (plain - exact).norm()


def test_a_cell_keeps_the_two_largest_of_each_node() -> None:
    names = ("none", "skip", "sep-3")
    chances = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.2, 0.7], [0.2, 0.3, 0.5], [0.0, 0.6, 0.4], [0.3, 0.5, 0.2]])
    assert edges(2) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert kept(chances, names, 2) == [[(0, "skip"), (1, "sep-3")], [(0, "sep-3"), (1, "skip")]]


def test_cells_get_the_channels_that_a_budget_allows() -> None:
    cells: Any = [[[(0, "sep-3"), (1, "skip")], [(1, "sep-3"), (2, "max-pool")]]] * 2
    costs = {channels: CELLS.cost(ABOUT, cells, channels) for channels in (2, 4)}
    least, most = CELLS.ends(ABOUT)
    assert least < costs[2] < costs[4] < most
    for channels, cost in costs.items():
        assert CELLS.fitting(ABOUT, cells, cost) == CELLS.fitting(ABOUT, cells, cost + 1) == (channels, cost)
    with pytest.raises(UsageError, match="with 2 channels, above"):
        CELLS.fitting(ABOUT, cells, costs[2] - 1)


def test_adam_of_alphas_is_torchs() -> None:
    ours = Alphas([3, 3], lr=0.1, betas=(0.5, 0.999), decay=0.01)
    theirs = nn.Parameter(torch.zeros(2, 3))
    adam = torch.optim.Adam([theirs], 0.1, (0.5, 0.999), weight_decay=0.01)
    for seed in range(4):
        theirs.grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        ours.step(theirs.grad)
        adam.step()
    assert torch.allclose(ours.values, theirs, atol=1e-6)


def test_the_gradient_through_gates_is_the_exact_one_of_a_linear_loss() -> None:
    """All paths live: of sum_j p_j <c, o_j> by alpha; the expected cost is the sum over the table."""
    alpha = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    of_gates = torch.randn(4, 5, dtype=torch.float64)  # <dL/dy, o_j(x)>, whatever the gates are
    (exact,) = torch.autograd.grad((alpha.softmax(-1) * of_gates).sum(), alpha)
    alpha = alpha.detach()
    assert torch.allclose(through_gates(of_gates, alpha.softmax(-1)), exact, rtol=1e-12)
    costs = torch.randint(100, (4, 5)).double()
    total = sum(float(p) * float(c) for p, c in zip(alpha.softmax(-1).flatten(), costs.flatten(), strict=True))
    assert float(expected(alpha.softmax(-1), costs)) == pytest.approx(total)


def test_a_step_leaves_the_chances_of_others() -> None:
    model: Any = BOTTLENECKS.supernet(ABOUT)
    counts = [len(names) for names in BOTTLENECKS.names()]
    assert counts == [3, 3, 2]
    model.alphas = Alphas(counts, lr=0.3, betas=(0.0, 0.999), decay=0.0)
    objective = Gated(TAUGHT, torch.tensor([[2.0, 4, 0], [2, 4, 0], [2, 4, 0]]), 0.1, 0.0)
    for _ in range(4):
        before = model.alphas.chances()
        objective.move(model, batch())
        changed = ((model.alphas.chances() - before).abs() > 1e-4).sum(-1)
        assert changed.tolist() == [2, 2, 2] and model.alphas.chances()[2, 2] == 0
        assert torch.allclose(model.alphas.chances().sum(-1), torch.ones(3))
    assert all(p.grad is None for p in model.parameters())
    objective(model, {name: torch.cat((value, value)) for name, value in batch().items()}, 0.5).backward()  # type: ignore[no-untyped-call]
    places = choices_of(model)
    learned = [[any(p.grad is not None for p in op.parameters()) for op in place.operations] for place in places]
    assert all(sum(each) <= 1 for each in learned)  # one path
    values, moved = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[True, False, True]])
    again = rescaled(torch.tensor([[0.0, 2.0, 9.0]]), values, moved)
    assert again[0, 1] == 2 and torch.allclose(again.exp().sum(), values.exp().sum())


def test_costs_pull_towards_cheap_operations() -> None:
    """Where the loss says nothing, expected cost falls."""
    model: Any = BOTTLENECKS.supernet(ABOUT)
    model.alphas = Alphas([3, 3, 2], lr=0.1, betas=(0.0, 0.999), decay=0.0)
    costs = torch.tensor([[2.0, 4, 0], [2, 4, 0], [2, 4, 0]])
    objective = Gated(TAUGHT, costs, 100.0, 0.0)
    began = expected(model.alphas.chances(), costs)
    for _ in range(8):
        objective.move(model, batch(6))
    assert expected(model.alphas.chances(), costs) < 0.9 * began


def test_the_likeliest_network_within_a_limit() -> None:
    """Against all that there are."""
    import itertools

    table = Table(5, [[10, 20, 1], [7, 9], [30, 4, 2]])
    chances = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.8, 0.0], [0.9, 0.06, 0.04]], dtype=torch.float64)
    for limit in range(table.least, table.most + 2):
        every = [e for e in itertools.product(range(3), range(2), range(3)) if table.of(e) <= limit]
        best = max(every, key=lambda e: np.prod([float(chances[i, n]) for i, n in enumerate(e)]))
        assert tuple(likeliest(chances, table, limit)) == best, limit


def test_paths_are_drawn_in_bins() -> None:
    table = SHUFFLES.table(ABOUT)
    limit = (table.least + table.most) // 2
    bins = Bins(low=0.9, high=1.1, count=2)
    found = [table.of(bins.draw(table, limit)) / limit for _ in range(40)]
    assert all(0.9 <= share <= 1.1 for share in found) and min(found) < 1 < max(found)
    never = Bins(low=3.0, high=4.0, count=1, tries=5)
    assert len(never.draw(table, limit)) == 3  # no endless loop


def test_parts_of_each_class_and_pairs() -> None:
    labels = [0] * 10 + [1] * 6
    rows: list[Any] = [
        {"images": patterns(16, 0)[0], "at": i, "label": labels[i], "wants": _wants()} for i in range(16)
    ]
    first, second = split(rows, labels, 2, 0)
    assert sorted(first + second) == [*range(16)] and [labels[i] for i in second].count(0) == 2 == len(second) / 2
    halves = split(rows, labels, None, 0)
    assert [sum(labels[i] for i in part) for part in halves] == [3, 3]
    with pytest.raises(DataError, match="too few to be split"):
        split(rows[:1], [0], None, 0)
    both = Pairs(TASKS.get("images")).collate(paired([rows[i] for i in first], [rows[i] for i in second])[:3])
    assert both["pixel_values"].shape[0] == 6 and torch.equal(
        both["labels"][:3], torch.tensor([labels[i] for i in first[:3]])
    )


def test_students_are_told_softly() -> None:
    """The released code's loss: soft cross-entropy at temperature 3, without its square."""
    model, given = fresh().eval(), batch()
    told = Taught(TASKS.get("images"), teacher(), 3.0)
    with torch.no_grad():
        student, said = (
            model(given["pixel_values"]).logits / 3,
            (teacher()(given["pixel_values"]).logits / 3).softmax(-1),
        )
        assert torch.allclose(told.loss(model, given), functional.cross_entropy(student, said), atol=1e-6)


CHAIN = {"stem": 4, "stem_stride": 1, "head": 12, "stages": [[8, 2, 2], [16, 1, 2]]}
QUICK: dict[str, Any] = {
    "retrain.steps": 3, "retrain.batch": 8, "retrain.save_every": 1, "retrain.optimizer": "torch.SGD momentum=0.9",
    "norm_batches": 1, "synthesis.full_steps": 4, "synthesis.half_steps": 0, "synthesis.warmup": 2,
    "synthesis.batch": 24, "synthesis.count": 48, "synthesis.rounds": 2,
}  # fmt: skip
SUPERNET: dict[str, Any] = {
    "supernet.steps": 2, "supernet.epochs": 1, "supernet.batch": 8, "supernet.save_every": 1, "supernet.lr": 0.01,
}  # fmt: skip
SPOS = {
    **QUICK, **SUPERNET, **{f"space.{key}": value for key, value in CHAIN.items()}, "held": 2,
    "evolution.population": 4,
    "evolution.parents": 2, "evolution.mutations": 1, "evolution.crossovers": 1, "evolution.generations": 1,
}  # fmt: skip
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "spos": ("macs=0.85", SPOS),
    "proxyless": ("macs=0.5", {**QUICK, **SUPERNET, "begins": 0.0, "space.stem": 4, "space.stem_stride": 1,
                  "space.head": 12, "space.stages": [[4, 2, 1], [6, 1, 2]],
                  "space.operations": ["mb-3-3", "mb-3-5", "skip"]}),
    "darts": ("macs=0.5", {**QUICK, **SUPERNET, "space.channels": 2, "space.most": 4, "space.cells": 2,
              "space.found_cells": 2, "space.nodes": 2, "space.operations": ["none", "skip", "sep-3"]}),
    "alone": ("macs=0.85", {**QUICK, **{f"chain.{key}": value for key, value in CHAIN.items()}, "near": 0.5}),
}  # fmt: skip


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    images, labels = patterns(48, 1)
    np.savez(tmp_path / "real.npz", images=images, labels=labels)
    return {"model": save_teacher(tmp_path / "teacher"), "judged_on": str(tmp_path / "real.npz")}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_found_is_a_model_like_any_other(method: str, given: dict[str, Any], tmp_path: Path) -> None:
    budget, options = METHODS[method]
    real = str(tmp_path / "real.npz")
    found = search_architecture(
        out=tmp_path / "out", budget=budget, method=method, data=real, options={**options, "retrain_on": real}, **given
    )
    assert found["cost"] <= found["limit"] < found["full"]
    shown = run_eval({"it": str(tmp_path / "out")}, real)["models"]["it"]["top1"]
    assert shown == pytest.approx(found["measures"]["accuracy"])
    model, _ = nybble.load(tmp_path / "out", dtype="float32")
    norm, entered = running_norms(model)[0], list[Tensor]()
    with torch.no_grad(), norm.register_forward_pre_hook(lambda module, x: entered.append(x[0])):
        model(pixel_values=pixels(patterns(48, 1)[0]))
    assert torch.allclose(entered[0].mean((0, 2, 3)), norm.running_mean, atol=1e-4)  # type: ignore[arg-type]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixel_values=torch.zeros(1, 1, SIDE, SIDE))
    assert counter.get_total_flops() == 2 * found["cost"]
    nybble.quantize(tmp_path / "out", "rtn", real, weights="int8 channel", out=tmp_path / "small")
    assert (tmp_path / "small/model.safetensors").exists()


def test_paths_are_scored_behind_statistics_of_their_own(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every BatchNorm of a path has the mean of what enters it; the supernet's own is of all paths."""
    seen = list[float]()

    def looked(model: Any, task: Any, rows: Any, labels: Tensor, batch: int) -> float:
        norm, entered = running_norms(model)[-1], list[Tensor]()
        hook = norm.register_forward_pre_hook(lambda module, x: entered.append(x[0]))
        found = error(model, task, rows, labels, batch)
        hook.remove()
        mean = torch.cat(entered).mean((0, *range(2, entered[0].dim())))
        kept: Any = norm.running_mean
        seen.append(float((mean - kept).norm() / mean.norm()))
        return found

    monkeypatch.setattr(spos, "error", looked)
    real = {"data": given["judged_on"], "options": SPOS}
    search_architecture(out=tmp_path / "out", budget="macs=0.85", method="spos", **real, **given)
    assert len(seen) > 4 and max(seen) < 1


def test_data_free_killed_and_gone_on_with(given: dict[str, Any], tmp_path: Path) -> None:
    """No data is named; of one seed the same bytes, however often the run was killed."""
    start = {"start": [["shuffle-3", "xception", "shuffle-5"]]}
    asked = {"budget": "macs=0.85", "method": "data-free", "options": {**SPOS, **start}, **given}
    found = search_architecture(out=tmp_path / "a", **asked)
    assert found["request"]["data"] is None and found["seconds"].keys() == {"supernet", "retrain"}
    costs = [point["cost"] for point in found["front"]]
    assert "0 3 1" in {point["name"] for point in found["front"]}
    assert max(costs) <= found["limit"] and len({point["name"] for point in found["front"]}) == len(costs) > 4
    again = ArchitectureSettings(resume=True)
    with pytest.raises(KeyboardInterrupt):
        search_architecture(out=tmp_path / "b", settings=again, progress=_Stops(5), **asked)
    assert [path.name for path in (tmp_path / "b.partial/work/images").glob("images.npz")]
    search_architecture(out=tmp_path / "b", settings=again, **asked)
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.name != "times.json"} for n in "ab"]
    assert files[0] == files[1] and "images" not in files[0]


def test_what_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    def refused(match: str, kind: type[NybbleError], method: str = "spos", budget: str = "", **changes: Any) -> None:
        usual, options = METHODS[method]
        model, data = changes.pop("model", given["model"]), changes.pop("data", None)
        changed = {name.replace("__", "."): value for name, value in changes.items()}
        with pytest.raises(kind, match=match):
            search_architecture(
                model,
                tmp_path / "out",
                budget=budget or usual,
                method=method,
                data=data,
                options={**options, **changed},
            )
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()

    for method in METHODS:
        refused("infeasible in this space; the least is", UsageError, method, "macs=9")
    refused("no network of the space has 5 to 6 times", UsageError, bins__low=5.0, bins__high=6.0)
    refused("from low to high", UsageError, bins__low=2.0)
    for method in METHODS:  # before anything is trained
        refused("'/nowhere' does not exist", FileError, method, data=given["judged_on"], retrain_on="/nowhere")
    refused("canvas is 8, and the model sees windows of 12", UsageError, synthesis__canvas=8)
    refused("no operation 'shuffle-4'", UsageError, space__operations=["shuffle-4"])
    refused("no operation goes from 4 to 8 channels", SchemeError, space__operations=["skip"])
    refused("halves them", UsageError, space__stages=[[9, 1, 2]])
    refused("block 0 can't be 'skip'; it is one of shuffle-3", UsageError, "alone", operations=["skip"] * 3)
    refused("has 3 blocks, and 2 operations are named", UsageError, start=[["shuffle-3"] * 2])
    refused("none of 20,000 networks drawn", UsageError, "alone", near=0.99999)
    refused("name one space", UsageError, "alone", cells={})
    fresh("instance").save_pretrained(tmp_path / "plain")
    refused("without BatchNorms, so no images", ModelError, model=tmp_path / "plain")
    assert json.loads((tmp_path / "teacher/config.json").read_text())["model_type"] == "nybble-microcontroller"
