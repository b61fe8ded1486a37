"""k-means code books: the algorithm against float64 and brute force, and what VQ4DiT's sheet asks of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_text, save_tiny
from torch import Tensor

import nybble
from nybble.calibration.error import relative_error
from nybble.core.errors import GranularityError, SchemeError
from nybble.pipelines.request import build_recipe
from nybble.qtensor.vector import VectorQTensor, VectorQuantizer, nearest
from nybble.quantizer import Quantizer
from nybble.recipe import parse_recipe
from nybble.solvers import Solved, Stats, Weight
from nybble.solvers.k_means import KMeans, lloyd, row_scale, seeds

BASE = Quantizer("int2 channel scale_format=float16")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def data(rows: int = 64, columns: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(256, columns, generator=generator) * torch.linspace(0.1, 5, columns)
    return matrix, inputs.T @ inputs / 256


def solve(solver: KMeans, matrix: Tensor, second: Tensor | None = None, quantizer: Quantizer = BASE) -> Solved:
    return solver.solve([Weight(name="w", matrix=matrix, quantizer=quantizer)], Stats(second_moment=second))[0]


def brute(runs: Tensor, weights: Tensor, book: Tensor) -> tuple[Tensor, float]:
    """Nearest entries and the error, by all distances in float64."""
    all_of_them = (weights.double()[:, None] * (runs.double()[:, None] - book.double()) ** 2).sum(-1)
    least, index = all_of_them.min(1)
    return index, float(least.sum())


@pytest.mark.parametrize("weighted", [True, False])
def test_nearest_is_brute_force(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    runs, book = torch.randn(3000, 3, generator=generator), torch.randn(70, 3, generator=generator)
    weights = torch.rand(3000, 3, generator=generator) if weighted else torch.ones(3000, 3)
    assert torch.equal(nearest(runs, book, weights if weighted else None), brute(runs, weights, book)[0])
    twice = torch.cat([book, book])  # of equal entries the first
    assert int(nearest(runs, twice, weights if weighted else None).max()) < 70
    assert nearest(runs[:0], book).shape == (0,)


def test_lloyd_step_by_step() -> None:
    """Errors as brute force has them and never rising; each entry the weighted mean of those that chose it."""
    generator = torch.Generator().manual_seed(2)
    runs, weights = torch.randn(2000, 2, generator=generator), torch.rand(2000, 2, generator=generator) + 0.1
    book = runs[:16].clone()
    mine = book
    for steps in range(1, 6):
        index, error = brute(runs, weights, mine)
        found, errors = lloyd(runs, weights, book, steps, 0.0)
        assert errors[-1] == pytest.approx(error, rel=1e-5)  # float32's rounding of two thousand terms
        chose = torch.nn.functional.one_hot(index, 16).double().T
        mine = ((chose @ (weights * runs).double()) / (chose @ weights.double())).float()
        assert torch.allclose(found, mine, atol=1e-5)
    errors = lloyd(runs, weights, book, 100, 0.0)[1]
    assert len(errors) > 10 and all(later <= earlier for earlier, later in itertools.pairwise(errors))
    assert len(lloyd(runs, weights, book, 100, 0.05)[1]) < len(errors)


def test_entries_that_nothing_chose_move_to_the_worst_runs() -> None:
    runs = torch.tensor([[0.0], [0.1], [5.0], [9.0]])
    book = torch.tensor([[0.0], [100.0], [200.0]])
    found, errors = lloyd(runs, torch.ones(4, 1), book, 10, 0.0)
    assert sorted(found[:, 0].tolist()) == pytest.approx([0.05, 5.0, 9.0])
    assert errors[-1] == pytest.approx(0.005, rel=1e-4)


def test_seeds_are_runs_spread_by_distance() -> None:
    """Of eight clusters one each: by chance alone that is 1 in 416."""
    centres = torch.tensor([[10.0 * i, 100.0 - i * i] for i in range(8)])
    runs = (centres[:, None] + 0.01 * torch.randn(8, 50, 2)).reshape(-1, 2)
    draws = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    book = seeds(runs, torch.ones_like(runs), draws)
    assert sorted(nearest(book, centres).tolist()) == list(range(8))
    assert all((runs == entry).all(1).any() for entry in book)
    few = torch.tensor([[1.0], [2.0], [3.0]])
    assert set(seeds(few, torch.ones(3, 1), torch.rand(5, dtype=torch.float64))[:, 0].tolist()) == {1.0, 2.0, 3.0}
    # A run whose weight is nothing is never drawn.
    assert float(seeds(few, torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([0.0], dtype=torch.float64))[0]) == 3.0


def test_what_is_stored() -> None:
    """The nearest entries of the stored book; log2(k) / d bits and the book; the line says k and d."""
    matrix, second = data()
    found = solve(KMeans(entries=64, width=2), matrix, second)
    tensor = found.weight
    assert isinstance(tensor, VectorQTensor) and tensor.codebook.dtype == torch.float16
    importance = second.diagonal().expand_as(matrix).reshape(-1, 2)
    index = brute(matrix.reshape(-1, 2), importance, tensor.codebook)[0]
    assert torch.equal(tensor.index(), index)
    assert str(found.stored) == "vector k=64 d=2"
    assert VectorQuantizer.parse(str(found.stored)) == found.stored
    assert tensor.bits_per_element() == 6 / 2 + 64 * 2 * 16 / matrix.numel()
    assert found.error == relative_error(matrix, tensor.dequantize(), second) < found.rtn_error


def test_weighted_by_the_inputs() -> None:
    """On its own objective better than a book that ignores the inputs, which is better without them."""
    matrix, second = data()
    second[::2] *= 100  # of the two in a run the first speaks louder
    diagonal = second.diagonal().diag()
    seen, blind = (solve(KMeans(entries=32), matrix, h).weight.dequantize() for h in (diagonal, None))
    assert relative_error(matrix, seen, diagonal) < 0.95 * relative_error(matrix, blind, diagonal)
    assert relative_error(matrix, blind, None) < 0.95 * relative_error(matrix, seen, None)
    plain = KMeans(entries=32, weighted=False)
    assert torch.equal(solve(plain, matrix, diagonal).weight.dequantize(), blind) and not plain.needs(None)


def test_dead_inputs_change_nothing_for_the_others() -> None:
    matrix, second = data()
    second[:8] = second[:, :8] = 0
    found = solve(KMeans(entries=32), matrix, second).weight.dequantize()
    assert torch.isfinite(found).all()
    assert relative_error(matrix[:, :8], found[:, :8], None) < 0.3  # their weights still get their nearest entries
    assert solve(KMeans(entries=32), matrix, torch.zeros_like(second)).error == 0


def test_groups_of_a_convolution_have_their_own_inputs() -> None:
    matrix, second = data(columns=8)
    moments = torch.stack([second, second.flip(0, 1)])
    tensor = solve(KMeans(entries=64), matrix, moments).weight
    assert isinstance(tensor, VectorQTensor)
    importance = torch.cat([moments[g].diagonal().expand(32, 8) for g in (0, 1)]).reshape(-1, 2)
    wanted = brute(matrix.reshape(-1, 2), importance, tensor.codebook)[0]
    assert torch.equal(tensor.index(), wanted)
    flipped = brute(matrix.reshape(-1, 2), importance.flip(0), tensor.codebook)[0]
    assert not torch.equal(flipped, wanted)


def test_channel_scales() -> None:
    matrix, _ = data()
    matrix *= torch.logspace(-3, 1, 64)[:, None]
    matrix[5] = 0
    one, scaled = (solve(KMeans(entries=64, channel=channel), matrix, quantizer=BASE) for channel in (False, True))
    assert isinstance(scaled.weight, VectorQTensor) and isinstance(scaled.weight.scale, Tensor)
    assert str(scaled.stored) == "vector k=64 d=2 channel"
    assert torch.equal(scaled.weight.scale, row_scale(matrix))
    assert not scaled.weight.dequantize()[5].any()
    small = slice(0, 16)  # rows that one book for all has no entries for
    lost = [(matrix - x.weight.dequantize())[small].square().sum() for x in (one, scaled)]
    assert lost[1] < 0.2 * lost[0]


def test_large_rows_weigh_more_under_channel_scales() -> None:
    """The error of a row is that of its normalised runs times its scale squared."""
    generator = torch.Generator().manual_seed(4)
    loud, quiet = 10 * torch.randn(8, 48, generator=generator), torch.rand(120, 48, generator=generator) + 1
    matrix = torch.cat([loud, quiet])
    tensor = solve(KMeans(entries=16, channel=True), matrix).weight
    assert isinstance(tensor, VectorQTensor)
    scale = row_scale(matrix).float()
    runs, weights = (matrix / scale).reshape(-1, 2), scale.square().expand_as(matrix).reshape(-1, 2)
    for given, settled in ((weights, True), (torch.ones_like(weights), False)):
        before, after = lloyd(runs, given, tensor.codebook.float(), 2, 0.0)[1]
        assert (before - after <= 2e-3 * before) == settled  # twice the tolerance, for the rounding of the book


def test_small_weights_keep_a_float32_book() -> None:
    matrix, second = data()
    found = solve(KMeans(entries=64), matrix * 1e-6, second)
    assert isinstance(found.weight, VectorQTensor) and found.weight.codebook.dtype == torch.float32
    assert found.error == pytest.approx(solve(KMeans(entries=64), matrix, second).error, rel=0.05)


def test_repeats_and_leaves_the_random_state() -> None:
    matrix, second = data()
    before = torch.get_rng_state()
    first, again, other = (solve(KMeans(entries=16, seed=seed), matrix, second).weight for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    tensors = [x.tensors() for x in (first, again, other)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert not torch.equal(tensors[0]["codebook"], tensors[2]["codebook"])


def test_falls_back_where_the_scheme_is_better() -> None:
    matrix, second = data()
    found = solve(KMeans(entries=16), matrix, second, Quantizer("int8 channel"))
    assert not found.stored and found.error == found.rtn_error
    assert torch.equal(found.weight.dequantize(), Quantizer("int8 channel").quantize(matrix).dequantize())
    assert found.notes[0].startswith("worse than int8 channel (") and "kept the latter" in found.notes[0]


def test_few_runs_get_a_small_book() -> None:
    found = solve(KMeans(entries=256), data(4, 8)[0])
    assert str(found.stored or "vector k=4 d=2") == "vector k=4 d=2"  # 16 runs
    assert solve(KMeans(entries=256), torch.tensor([[1.0, 1.0, -0.4, 0.2]])).error <= 1


def test_more_iterations_lose_less() -> None:
    matrix, second = data()
    few, many = (solve(KMeans(entries=64, iterations=n, tolerance=0.0), matrix, second).error for n in (1, 50))
    assert many < 0.95 * few


def test_bad_input(tmp_path: Path) -> None:
    for options, message in (
        ({"entries": 1}, "2 to 65536 entries"),
        ({"width": 0}, "one element or more"),
        ({"iterations": 0}, "iterations=0"),
        ({"tolerance": 1.0}, "tolerance=1"),
    ):
        with pytest.raises(SchemeError, match=message):
            KMeans(**options)
    with pytest.raises(SchemeError, match=r"'vector k=2' is no code book of vectors"):
        VectorQuantizer.parse("vector k=2")
    recipe: Any = build_recipe("k-means").to_dict()
    recipe["steps"][0]["width"] = 5
    folder, text = save_tiny(tmp_path / "m"), save_text(tmp_path / "text.txt")
    with pytest.raises(GranularityError, match=r"32 columns can't be cut into runs of 5; widths that fit: 2, 4, 8, 16"):
        nybble.quantize(str(folder), parse_recipe(recipe), str(text), out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
