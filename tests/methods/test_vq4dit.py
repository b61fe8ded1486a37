"""VQ4DiT: candidates and ratios by brute force, gradients by hand, decisions that stay; better than its own parts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import logits, save_text, save_tiny
from tests.waiting import NeverWaits
from torch import Tensor

import nybble
from nybble.core.errors import SchemeError
from nybble.learned import make_part
from nybble.learned.vector_candidates import FROZEN, Candidates, VectorCandidates, near
from nybble.nn.packed import Packed
from nybble.pipelines.request import build_recipe
from nybble.qtensor.vector import VectorQTensor
from nybble.quantizer import Quantizer
from nybble.recipe import parse_recipe
from nybble.reconstruction.moves import moves
from nybble.solvers import Stats, Weight
from nybble.solvers.k_means import KMeans

BASE = Quantizer("binary channel scale=mean")
ROWS, COLUMNS, ENTRIES, WIDTH = 32, 48, 16, 4


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def matrix(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.05


def clustered(x: Tensor, **options: Any) -> VectorQTensor:
    solver = KMeans(**{"entries": ENTRIES, "width": WIDTH, "weighted": False, **options})
    found = solver.solve([Weight(name="w", matrix=x, quantizer=BASE)], Stats())[0].weight
    assert isinstance(found, VectorQTensor)
    return found


def made(x: Tensor, start: VectorQTensor | None = None, **options: Any) -> Candidates:
    found = VectorCandidates(**options).make_vectors(BASE, x, clustered(x) if start is None else start)
    assert isinstance(found, Candidates)
    return found.train()


def packed(learned: Candidates, x: Tensor) -> VectorQTensor:
    found = learned.settle(x)
    assert isinstance(found, VectorQTensor)
    return found


def frozen(learned: Candidates) -> Tensor:
    return learned.logits.detach().amax(1) > FROZEN / 2


def test_candidates_are_the_nearest_by_brute_force() -> None:
    x = matrix()
    start = clustered(x)
    runs, book = x.reshape(-1, WIDTH).double(), start.codebook.double()
    distance = (runs[:, None] - book).square().sum(-1).sqrt()
    wanted = distance.sort(1)
    found, apart = near(x.reshape(-1, WIDTH), start.codebook.float(), start.index(), 3)
    assert torch.equal(found.long(), wanted.indices[:, :3])
    torch.testing.assert_close(apart.double(), wanted.values[:, :3])
    assert torch.equal(found[:, 0].long(), start.index())  # the hard assignment
    assert bool((apart.diff(dim=1) >= 0).all())
    other = (start.index() + 1) % ENTRIES  # as a solver chooses that weighs the inputs
    found, apart = near(x.reshape(-1, WIDTH), start.codebook.float(), other, 2)
    assert torch.equal(found[:, 0].long(), other) and bool((apart.diff(dim=1) >= 0).all())
    assert not bool((found[:, 0] == found[:, 1]).any())


def test_ratios_begin_by_distance_or_equal() -> None:
    x = matrix()
    for n in (2, 3):
        learned = made(x, candidates=n)
        apart = near(x.reshape(-1, WIDTH), learned.codebook.detach(), learned.codes(), n)[1]
        r = learned.ratios()
        torch.testing.assert_close(r, (1 / apart) / (1 / apart).sum(1, keepdim=True), rtol=1e-3, atol=1e-4)
        assert bool((r > 0).all()) and torch.allclose(r.sum(1), torch.ones(len(r)))
        equal = made(x, candidates=n, ratios="equal")
        assert torch.allclose(equal.ratios(), torch.full_like(r, 1 / n))
        assert torch.equal(packed(equal, x).index(), clustered(x).index())  # of equal ones the nearest
        nearest = (clustered(x).dequantize() - x).square().sum()
        errors = [(part(x) - x).square().sum() for part in (learned, equal)]
        assert errors[0] < errors[1]
        assert errors[0] < nearest  # between its neighbours a run is nearer than at either
    steep = matrix() * torch.logspace(-2, 2, ROWS)[:, None]  # row scales divide first
    start = clustered(steep, channel=True)
    assert start.scale is not None
    found = [(w - steep).square().sum(1) for w in (made(steep, start)(steep), start.dequantize())]
    assert (found[0] / found[1]).mean() < 1
    exact = made(clustered(x).dequantize())  # runs that are code words
    assert bool(exact.ratios().isfinite().all()) and torch.equal(exact(x), exact.eval()(x))


def test_the_weight_is_the_weighted_sum_and_gradients_by_hand() -> None:
    x, upstream = matrix(), matrix(1)
    learned = made(x, clustered(x, channel=True), candidates=3)
    start = clustered(x, channel=True)
    assert isinstance(start.scale, Tensor)
    r, at, book = (t.detach() for t in (learned.ratios().double(), learned.candidates.long(), start.codebook.double()))
    out = learned(x)
    values = (r[..., None] * book[at]).sum(1).view(ROWS, COLUMNS) * start.scale.double()
    torch.testing.assert_close(out.double(), values, rtol=1e-5, atol=1e-7)
    (out * upstream).sum().backward()
    assert learned.codebook.grad is not None and learned.logits.grad is not None
    g = (upstream.double() * start.scale.double()).view(-1, 1, WIDTH)
    to_book = torch.zeros(ENTRIES, WIDTH, dtype=torch.float64)
    to_book.index_add_(0, at.flatten(), (r[..., None] * g).view(-1, WIDTH))
    torch.testing.assert_close(learned.codebook.grad.double(), to_book, rtol=1e-4, atol=1e-6)
    to_r = (g * book[at]).sum(-1)
    torch.testing.assert_close(
        learned.logits.grad.double(), r * (to_r - (r * to_r).sum(1, keepdim=True)), rtol=1e-3, atol=1e-6
    )


def test_one_candidate_is_plain_vector_quantization() -> None:
    x = matrix()
    start = clustered(x)
    learned = made(x, candidates=1)
    assert torch.equal(learned(x), start.dequantize())
    learned(x).square().sum().backward()
    assert learned.logits.grad is not None and not learned.logits.grad.any()
    assert torch.equal(packed(learned, x).indices, start.indices)
    two = made(x)
    two.logits.data = torch.tensor([FROZEN, 0.0]).repeat(len(two.logits), 1)  # one-hot
    assert torch.equal(two(x), start.dequantize()) and torch.equal(two.eval()(x), start.dequantize())


@pytest.mark.parametrize("term", ["absolute", "product"])
def test_the_penalty_closes_ratios(term: Any) -> None:
    x = matrix()

    def penalty(part: Candidates, t: float | Tensor = 0.0) -> float:
        return float(part.penalty(t).detach())

    learned = made(x, term=term, warmup=0.3)
    r = learned.ratios().detach().double()
    runs = len(r)
    by_hand = (1 - (2 * r - 1).abs()).sum() / runs if term == "absolute" else 2 * (r * (1 - r)).sum() / (2 * runs)
    assert penalty(learned, 0.3) / x.numel() == pytest.approx(float(by_hand), rel=1e-5)
    assert penalty(learned, torch.tensor(0.3)) == penalty(learned, 0.3)
    assert penalty(learned, 0.29) == penalty(learned, torch.tensor(0.29)) == 0
    half = made(x, term=term, ratios="equal")
    assert penalty(half, 0.0) / x.numel() == pytest.approx({"absolute": 2, "product": 0.5}[term])
    assert penalty(half, 0.0) > penalty(made(x, term=term)) > 0  # most at 1/2
    half.logits.data = torch.tensor([FROZEN, 0.0]).repeat(runs, 1)
    assert penalty(half, 0.0) == 0
    half.logits.data[3] = torch.tensor([0.0, 3.0])  # one run that isn't decided
    assert penalty(half, 0.0) > 0


@pytest.mark.parametrize("rule", ["rmsprop", "adamw"])
def test_what_is_decided_stays(rule: str) -> None:
    """The share that is frozen never falls, whatever momentum or decay an optimizer has, and its choice is kept."""
    x = matrix()
    learned, target = made(x, confident=0.9), matrix(2)
    optimizer: torch.optim.Optimizer = (
        torch.optim.RMSprop([learned.logits], lr=0.1, alpha=0.9)
        if rule == "rmsprop"
        else torch.optim.AdamW([learned.logits], lr=0.1, weight_decay=0.1)
    )
    shares, before, codes = list[float](), torch.zeros(len(learned.logits), dtype=torch.bool), learned.codes()
    for step in range(60):
        optimizer.zero_grad()
        loss = (learned(target) - (target if step < 30 else -target)).square().sum()  # the aim turns round
        now, chosen = frozen(learned), learned.codes()
        assert bool((now | ~before).all()) and torch.equal(chosen[before], codes[before])
        before, codes = now, chosen
        shares.append(float(now.float().mean()))
        loss.backward()
        assert learned.logits.grad is not None and not learned.logits.grad[now].any()
        optimizer.step()
    assert shares[0] < 0.2 < shares[20] <= shares[-1] and shares == sorted(shares)


def test_a_step_never_waits() -> None:
    """A GPU can record it, what is decided included."""
    x = matrix()
    learned, t = made(x).train(), torch.tensor(0.3)

    def step() -> None:
        for parameter in learned.parameters():
            parameter.grad = None
        ((learned(x) - x * 0.9).square().mean() + learned.penalty(t)).backward()

    with NeverWaits(warm=True):
        step()
    with NeverWaits():
        step()


def test_a_layer_is_hardened_once_most_of_it_is() -> None:
    x = matrix()
    learned = made(x, candidates=3)
    order = torch.arange(len(learned.logits))
    few = len(order) // 100  # 1 % of 384 is 3.84: with 3 open the frozen share is above 0.99
    for undecided, done in ((few + 1, False), (few, True)):
        learned.logits.data = torch.where((order < undecided)[:, None], 0.0, torch.tensor([0.0, 9.0, 0.0]))
        learned(x)
        assert bool(frozen(learned).all()) == done and int((~frozen(learned)).sum()) == (0 if done else undecided)
    assert torch.equal(learned(x), learned.eval()(x))
    assert torch.equal(learned.codes()[few:], learned.candidates[few:, 1].long())
    assert torch.equal(learned.codes()[:few], learned.candidates[:few, 0].long())


def test_the_book_of_release_order_waits_until_its_layer_is_hard() -> None:
    x = matrix()
    for order, hard in itertools.product(("joint", "release"), (False, True)):
        learned = made(x, order=order)
        if hard:
            learned.logits.data = torch.tensor([FROZEN, 0.0]).repeat(len(learned.logits), 1)
        (learned(x) * matrix(1)).sum().backward()
        assert learned.codebook.grad is not None
        assert bool(learned.codebook.grad.any()) == (order == "joint" or hard)
        assert bool(learned.logits.grad is not None and learned.logits.grad.any()) == (not hard)


def test_stored_as_it_was_trained_and_restored() -> None:
    """Eval is the stored tensor in any dtype; another made alike goes on from the state; casts leave it float32."""
    x = matrix()
    learned = made(x)
    optimizer = torch.optim.RMSprop(learned.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        (learned(x) - x.roll(1, 0)).square().sum().backward()
        optimizer.step()
    stored = packed(learned, x)
    stored.validate()
    assert stored.codebook.dtype == torch.float16 and not torch.equal(stored.codebook, clustered(x).codebook)
    assert 0 < float((stored.index() != clustered(x).index()).float().mean()) < 1
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(learned.eval()(x.to(dtype)), stored.dequantize(dtype))
    other = made(x)
    other.load_state_dict(learned.state_dict())
    assert torch.equal(other.train()(x), learned.train()(x)) and torch.equal(other.eval()(x), learned.eval()(x))
    learned.to(torch.bfloat16)
    assert learned.codebook.dtype == learned.logits.dtype == torch.float32
    other.logits.data = torch.tensor([0.0, FROZEN]).repeat(len(other.logits), 1)
    assert torch.equal(other.train()(x), other.eval()(x))  # once decided, training has what is stored
    again = made(x, stored)  # a second reconstruction goes on from what isn't nearest
    assert torch.equal(again.eval()(x), stored.dequantize())


def test_rows_of_the_manifest_say_what_moved() -> None:
    x = matrix()
    layers = []
    for index in (clustered(x).index(), clustered(x).index().roll(1)):
        tensor = VectorQTensor.make((ROWS, COLUMNS), clustered(x).codebook, index)
        layers.append(nybble.nn.linear.QuantLinear(tensor, None, None))
    wanted = float((clustered(x).index() != clustered(x).index().roll(1)).float().mean())
    assert isinstance(layers[0].weight, Packed)
    assert moves(x, BASE, layers[0], layers[1])["left_nearest"] == pytest.approx(wanted, rel=1e-2)


def recipe(steps: int = 30, book: dict[str, Any] | None = None, **part: Any) -> Any:
    """vq4dit in little; ``steps`` 0: plain k-means."""
    found: Any = build_recipe("vq4dit", weights=str(BASE)).to_dict()
    _, solver, learning = found["steps"]
    solver |= {"entries": ENTRIES, "iterations": 20, **(book or {})}
    learning |= {"steps": max(1, steps), "weights": {"vector-candidates": part}}
    found["steps"] = [solver, learning][: 2 if steps else 1]
    return parse_recipe(found)


SETTINGS: dict[str, Any] = {"samples": 8, "seq_len": 16, "batch": 4, "dtype": "float32"}


def test_better_than_its_parts_and_loads(tmp_path: Path) -> None:
    """Of each block: assignments and book < book alone < plain k-means, and joint < release; codes are in the book."""
    model, text = str(save_tiny(tmp_path / "m")), str(save_text(tmp_path / "text.txt"))
    errors: dict[str, list[dict[str, Any]]] = {}
    for name, options in (
        ("joint", {}), ("release", {"order": "release"}), ("book", {"candidates": 1})
    ):  # fmt: skip
        _, report = nybble.quantize(model, recipe(**options), text, out=tmp_path / name, settings=SETTINGS)
        windows = [w for row in report.layers for w in (row.learned or {}).get("windows", ()) if "curve" in w]
        assert len(windows) == 2
        errors[name] = windows
        for row in report.layers:
            assert str(row.weights).startswith("vector k=")
    for both, book in zip(errors["joint"], errors["book"], strict=True):
        assert both["after"] < book["after"] < book["before"]
    assert errors["joint"][0]["before"] == errors["book"][0]["before"] == errors["release"][0]["before"]
    for joint, release in zip(errors["joint"], errors["release"], strict=True):
        assert joint["after"] < release["after"] < release["before"]
    loaded: Any = nybble.load(tmp_path / "joint")[0]
    assert bool(logits(loaded).isfinite().all())
    layer = loaded.model.layers[0].mlp.up_proj.weight.qtensor()
    layer.validate()
    count = layer.shape[0] * layer.shape[1]
    assert layer.bits_per_element() == pytest.approx(4 / WIDTH + ENTRIES * WIDTH * 16 / count)
    assert isinstance(layer, VectorQTensor) and int(layer.index().max()) < ENTRIES


def test_bad_input(tmp_path: Path) -> None:
    model, text = str(save_tiny(tmp_path / "m")), str(save_text(tmp_path / "text.txt"))
    rtn: Any = recipe().to_dict()
    rtn["steps"][0] = {"solver": "rtn"}
    for asked, message in (
        (recipe(candidates=17), r"candidates=17 code words of a book of 16; take 16 or fewer"),
        (
            parse_recipe(rtn),
            r"vector-candidates goes on from a code book of vectors, and solver 'rtn' leaves none",
        ),
        (recipe(book={"width": 5}), r"can't be cut into runs of 5"),
    ):
        with pytest.raises(nybble.core.errors.NybbleError, match=message):
            nybble.quantize(model, asked, text, out=tmp_path / "out", settings=SETTINGS)
        assert not (tmp_path / "out").exists()
    for wrong in ({"candidates": 0}, {"confident": 1.0}, {"hardened": 0.4}, {"warmup": 1.0}):
        with pytest.raises(SchemeError, match=f"vector-candidates: .*{next(iter(wrong))}"):
            make_part("vector-candidates", wrong)
    small = made(matrix()[:8, :16], candidates=16)  # a matrix whose book is smaller has fewer candidates
    assert small.logits.shape == (32, 8)
