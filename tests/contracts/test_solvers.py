"""Solvers: on the grid, never worse than round-to-nearest, and GPTQ against the algorithm written out in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.calibration.error import relative_error
from nybble.core.errors import NybbleError, SchemeError, UsageError
from nybble.formats import format_names, get_format
from nybble.ops.rounding import round_to, round_to_codes
from nybble.qtensor import Inverse, QTensor, block_view, dense
from nybble.qtensor.block import BlockQTensor
from nybble.qtensor.split import SplitQTensor
from nybble.qtensor.vector import VectorQTensor
from nybble.quantizer import Quantizer
from nybble.solvers import REGISTRY, Solved, Stats, Weight, make_solver
from nybble.solvers._grid import Grid, stack
from nybble.solvers.gptq import Gptq
from nybble.solvers.rtn import Rtn

ROWS, COLUMNS = 24, 32
GRANULARITIES = ("tensor", "channel", "group=8", "group=12 pad=true", "block=4x16", "flat=40", "rank1")
LINES = (
    "int4 group=8", "int4 group=8 symmetric=false", "int3 channel symmetric=false rounding=nearest-even-code",
    "int8 tensor", "int2 group=8 symmetric=false", "nvfp4", "mxfp4", "float4_e2m1fn group=16 scale_format=float16",
    "nf4 flat=64 scale_format=(dynamic8 flat=8 center=mean)", "float4_e2m1fn channel rounding=half-away",
    "nf4 group=8 rounding=native", "float8_e4m3fn tensor reciprocal=true", "uint4 group=8 symmetric=false",
    "float3_e2m0_finite group=16 scale=minmax(offset=true)", "ternary channel", "binary group=8",
    "float4_e2m1fn group=8 scale=mse", "dybit4 channel", "int4 rank1", "float16_e8m7 tensor scale=one",
)  # fmt: skip
TAKE_ALL = ("rtn", "gptq", "gptq order", "k-means", "outlier-columns")
"""Solvers that must refuse none of these lines; others may."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def weight(line: str, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator) * torch.linspace(0.2, 2, columns)
    return Weight(name=f"w{seed}", matrix=matrix, quantizer=Quantizer(line))


def inputs(columns: int = COLUMNS, tokens: int = 200, seed: int = 9) -> Tensor:
    """Correlated, with a few strong channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.4 * torch.randn(columns, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    x[:, ::7] *= 4
    return x


def moment(columns: int = COLUMNS, tokens: int = 200, seed: int = 9) -> Tensor:
    """Of such inputs."""
    x = inputs(columns, tokens, seed)
    return x.T @ x / tokens


def solvers() -> dict[str, Any]:
    made = {name: make_solver(name, {}) for name in REGISTRY.names()}
    made["mse weighted"] = Rtn(scale="mse", weighted=True)
    return made | {"mse": Rtn(scale="mse"), "absmax": Rtn(scale="absmax"), "gptq order": Gptq(activation_order=True)}


def on_grid(solved: Solved, quantizer: Quantizer, searched: bool = False) -> bool:
    """Every stored value is one of the format asked for, once scale, offset and zero point are undone in float64.

    A value comes from ``scale * (grid - zero_point)`` or ``scale * grid + offset`` in float32, so undoing it is off by
    a few units of 2^-24 of the largest term; a value between two grid points is off by far more. Padding isn't judged.
    ``searched``: the solver may have taken another format of as many bits. Vectors are entries of their code book;
    columns that are kept whole are 16-bit values, the others lie on the grid by themselves.
    """
    return tensor_on_grid(solved.weight, quantizer, searched)


def tensor_on_grid(stored: QTensor | Tensor, quantizer: Quantizer, searched: bool) -> bool:
    """:func:`on_grid` of one tensor: parts each by itself (plain ones of 16 bits), runs of a code book as entries."""
    if isinstance(stored, Tensor):
        return stored.dtype in (torch.float16, torch.bfloat16) and bool(torch.isfinite(stored).all())
    if isinstance(stored, SplitQTensor):
        whole = torch.cat([dense(part) for part in stored.parts], stored.dim)
        placed = torch.equal(stored.dequantize().index_select(stored.dim, stored.order()), whole)
        return placed and all(tensor_on_grid(part, quantizer, searched) for part in stored.parts)
    if isinstance(stored, VectorQTensor):
        runs = stored.dequantize().reshape(-1, stored.codebook.shape[1])
        entries = stored.codebook.float()
        return stored.scale is None and bool((runs[:, None] == entries).all(-1).any(1).all())
    assert isinstance(stored, BlockQTensor)
    if stored.format.bits != quantizer.format.bits or not (searched or stored.format == quantizer.format):
        return False
    view, shape, params = stored.granularity, stored.shape, stored.params
    x, there = view.to_blocks(stored.dequantize()).double(), view.to_blocks(torch.ones(shape)) > 0
    zero = torch.zeros(1, 1, dtype=torch.float64)
    offset = zero if params.offset is None else block_view(params.offset, view, shape).double()
    shift = zero if params.zero_point is None else block_view(params.zero_point, view, shape).double()
    scale = scale_of(stored).double()
    value = (x - offset) / scale + shift
    grid = torch.from_numpy(stored.format.grid).double()
    grid = grid[torch.isfinite(grid)]
    above = torch.searchsorted(grid, value.contiguous()).clamp(max=len(grid) - 1)
    off = torch.minimum((grid[above] - value).abs(), (grid[(above - 1).clamp(min=0)] - value).abs())
    slack = 2.0**-21 * torch.maximum(torch.maximum(value.abs(), shift.abs()), (offset / scale).abs())
    return bool(torch.isfinite(value[there]).all()) and bool((off <= slack)[there].all())


def scale_of(stored: BlockQTensor) -> Tensor:
    """What a block's values are multiplied with."""
    if stored.params.scale is None:
        return torch.ones(1, 1)
    found = block_view(stored.params.scale, stored.granularity, stored.shape)
    return 1 / found if isinstance(stored.params.scale, Inverse) else found


class Shaken(BlockQTensor):
    """Its first value is 0.3 of its scale beside the grid."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        found = super().dequantize()
        found[0, 0] += 0.3 * scale_of(self)[0, 0]
        return found.to(dtype)


@pytest.mark.parametrize("line", LINES)
def test_on_grid_can_say_no(line: str) -> None:
    quantizer = Quantizer(line)
    packed = quantizer.quantize(weight(line).matrix)
    shaken = Shaken(packed.format, packed.granularity, packed.shape, packed.codes, packed.params, packed.layout)
    solved = Solved(weight=packed, error=0.0, rtn_error=0.0)
    assert on_grid(solved, quantizer) and not on_grid(solved, Quantizer("int5 channel"))
    assert not on_grid(replace(solved, weight=shaken), quantizer)
    for part, right in ((solved.weight, True), (shaken, False)):
        split = SplitQTensor(part.shape, 1, torch.arange(part.shape[1]).int(), (part,))
        assert on_grid(replace(solved, weight=split), quantizer) == right


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("name", solvers())
def test_on_the_grid_and_never_worse(name: str, line: str) -> None:
    solver, given = solvers()[name], weight(line)
    try:
        chosen = solver.quantizer_for(given.quantizer)
    except SchemeError as error:  # a method may refuse a line, though not the plainest, and says which
        assert name not in TAKE_ALL and line != LINES[0]
        assert given.quantizer.format.name in str(error) or str(given.quantizer.granularity) in str(error)
        return
    needs = solver.needs(None)
    second, x = (moment(), inputs()) if needs else (None, None)
    found = solver.solve([given], Stats(second_moment=second, inputs=x if "inputs" in needs else None))[0]
    assert on_grid(found, chosen, searched=found.quantizer is not None)
    assert found.weight.shape == (ROWS, COLUMNS)
    slack = 1e-4 if "inputs" in needs else 0.0  # it may have measured on the inputs themselves
    wanted = relative_error(given.matrix, found.weight.dequantize(), second)
    assert found.error == pytest.approx(wanted, rel=slack, abs=0)
    plain = given.quantizer.quantize(given.matrix)
    assert found.rtn_error == pytest.approx(relative_error(given.matrix, plain.dequantize(), second), rel=slack, abs=0)
    if name != "absmax":  # that recipe asks for another scale than the scheme's, better or not
        assert found.error <= found.rtn_error
    if chosen == given.quantizer and isinstance(solver, Rtn) and not needs:
        assert torch.equal(found.weight.dequantize(), plain.dequantize())


@pytest.mark.parametrize("name", format_names())
def test_gptq_takes_every_scalar_format(name: str) -> None:
    """On every granularity; what the file stores is exactly what the error that was fed back was measured against."""
    fmt = get_format(name)
    extra = "" if fmt.signed else " symmetric=false" if fmt.is_integer else " scale=minmax(offset=true)"
    for granularity in GRANULARITIES:
        try:
            given = weight(f"{name} {granularity}{extra}")
        except NybbleError as error:
            assert "rank1" in str(error)
            continue
        searched = Gptq(activation_order=False).solve([given], Stats(second_moment=moment()))[0]
        assert searched.error <= searched.rtn_error and on_grid(searched, given.quantizer)
        found = Gptq(activation_order=False, clip=False).solve([given], Stats(second_moment=moment()))[0]
        assert found.error <= found.rtn_error and on_grid(found, given.quantizer)
        kept = any("kept the latter" in note for note in found.notes)
        expected = by_hand(given, moment())
        if not kept:
            assert relative_error(given.matrix, expected.float(), moment()) == pytest.approx(found.error, rel=0.05)


def by_hand(given: Weight, second: Tensor, damping: float = 0.01, order: bool = False) -> Tensor:
    """Optimal brain quantization in a fixed order, written plainly: float64, whole inverse, one column at a time.

    After column j is rounded, the others take its error and its row and column leave the inverse (eq. 2 and 3 of the
    GPTQ paper). Only the rounding of one number to the grid is the project's, with the scales of the original weights.
    """
    matrix, quantizer = given.matrix, given.quantizer
    params = quantizer.fit(matrix)
    shape, granularity = tuple(matrix.shape), quantizer.granularity
    blocks = granularity.to_blocks(matrix)

    def spread(value: Any) -> Tensor | None:
        if value is None:
            return None
        return granularity.from_blocks(block_view(value, granularity, shape).expand_as(blocks), shape)

    scale, zero, offset = (spread(v) for v in (params.scale, params.zero_point, params.offset))
    fmt, rounding = quantizer.format, quantizer.rounding

    def rounded(column: Tensor, j: int) -> Tensor:
        y = column.float() if offset is None else column.float() - offset[:, j]
        y = y if scale is None else y * (1 / scale[:, j]) if quantizer.reciprocal else y / scale[:, j]
        if zero is None:
            y = round_to(y.contiguous(), fmt.name, rounding)
        else:
            y = round_to_codes(y, zero[:, j], fmt.min, fmt.max, rounding) - zero[:, j]
        y = y if scale is None else y * scale[:, j]
        return (y if offset is None else y + offset[:, j]).double()

    h = second.double()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    h = h + damping * h.diagonal().mean() * torch.eye(len(h))
    inverse = torch.linalg.inv(h)
    w, result = matrix.double().clone(), torch.zeros(shape, dtype=torch.float64)
    visit = second.diagonal().argsort(descending=True, stable=True).tolist() if order else range(shape[1])
    for j in visit:
        result[:, j] = rounded(w[:, j], j)
        error = (w[:, j] - result[:, j]) / inverse[j, j]
        w -= torch.outer(error, inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("block", [5, 128])
def test_gptq_is_the_algorithm(line: str, order: bool, block: int) -> None:
    """Float32 sums differ in the last bits, so a value on a tie may fall to the other side: few do."""
    given = weight(line)
    found = Gptq(activation_order=order, block=block, clip=False).solve([given], Stats(second_moment=moment()))[0]
    assert not any("kept the latter" in note for note in found.notes) or found.error == found.rtn_error
    expected = by_hand(given, moment(), order=order).float()
    if found.error == found.rtn_error:
        assert relative_error(given.matrix, expected, moment()) >= found.rtn_error * 0.99
        return
    same = torch.isclose(found.weight.dequantize(), expected, rtol=1e-5, atol=1e-6)
    assert same.double().mean() > 0.97


def test_another_scale_rule_is_taken_as_it_is_asked_for() -> None:
    """Absmax is a baseline, better or not; a zero point stays one."""
    given = weight("int3 group=8 scale=mse")
    found = Rtn(scale="absmax").solve([given], Stats())[0]
    assert torch.equal(found.weight.dequantize(), Quantizer("int3 group=8").quantize(given.matrix).dequantize())
    assert found.error > found.rtn_error and not found.notes
    asymmetric = Quantizer("int4 group=8 symmetric=false")
    assert Rtn(scale="absmax").quantizer_for(asymmetric) == asymmetric
    wanted = Quantizer("int4 group=8 scale=mse(asymmetric=true)")
    assert Rtn(scale="mse").quantizer_for(asymmetric) == wanted


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("block", [50, 128])
def test_gptq_is_the_algorithm_over_several_runs(order: bool, block: int) -> None:
    """Columns are visited in runs of 32 inside a block, and errors go from each run into the next."""
    given, second = weight("int4 channel", columns=80), moment(80)
    found = Gptq(activation_order=order, block=block, clip=False).solve([given], Stats(second_moment=second))[0]
    same = torch.isclose(found.weight.dequantize(), by_hand(given, second, order=order).float(), rtol=1e-5, atol=1e-6)
    assert same.double().mean() > 0.97 and found.error < 0.8 * found.rtn_error


def test_weights_that_round_alike_share_a_span() -> None:
    """Neighbours in another granularity do; where one word of how they round differs, they don't."""
    lines = (
        "int4 channel", "int4 group=8", "int4 channel rounding=toward-zero",
        "int4 channel rounding=toward-zero reciprocal=true", "int4 group=8 symmetric=false", "nf4 channel",
    )  # fmt: skip
    spans = stack([Grid(weight(line), None) for line in lines])
    assert [(span.rows.start, span.rows.stop) for span in spans] == [(0, 48), *((n, n + 24) for n in (48, 72, 96, 120))]
    assert [span.quantizer for span in spans] == [Quantizer(lines[n]) for n in (0, 2, 3, 4, 5)]


def test_gptq_helps() -> None:
    """Where inputs are correlated it must gain clearly, or the feedback is broken."""
    for line in ("int4 group=8", "nvfp4", "int3 channel symmetric=false"):
        found = Gptq(activation_order=False, clip=False).solve([weight(line)], Stats(second_moment=moment()))[0]
        assert found.error < 0.8 * found.rtn_error


def test_searched_clip_values_help() -> None:
    """Heavy tails in long blocks, where the maximum wastes most of the grid."""
    generator = torch.Generator().manual_seed(1)
    for line in ("int4 channel", "float4_e2m1fn channel", "int3 channel symmetric=false", "int4 group=16"):
        tails = torch.randn(ROWS, COLUMNS, generator=generator) ** 3
        given = Weight(name="w", matrix=tails, quantizer=Quantizer(line))
        plain = Gptq(activation_order=False, clip=False).solve([given], Stats(second_moment=moment()))[0]
        found = Gptq(activation_order=False).solve([given], Stats(second_moment=moment()))[0]
        assert found.error < plain.error


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_identity_second_moment_is_rtn(line: str, factor: float) -> None:
    given = weight(line)
    for order in (False, True):
        solver = Gptq(activation_order=order, clip=False)
        found = solver.solve([given], Stats(second_moment=torch.eye(COLUMNS) * factor))[0]
        plain = given.quantizer.quantize(given.matrix)
        assert torch.equal(found.weight.dequantize(), plain.dequantize())


@pytest.mark.parametrize("order", [False, True])
def test_stacked_weights_are_solved_as_alone(order: bool) -> None:
    """q, k and v share one pass; different formats, scales and numbers of rows among them."""
    lines = ("nvfp4", "nvfp4", "int4 group=8 symmetric=false", "nf4 channel", "nf4 channel", "float4_e2m1fn tensor")
    given = [weight(line, rows=8 + 4 * i, seed=i) for i, line in enumerate(lines)]
    solver = Gptq(activation_order=order)
    together = solver.solve(given, Stats(second_moment=moment()))
    for one, found in zip(given, together, strict=True):
        alone = solver.solve([one], Stats(second_moment=moment()))[0]
        difference = found.weight.dequantize() != alone.weight.dequantize()
        assert difference.double().mean() <= 0.02  # products of another size may round a last bit otherwise
        assert found.error == pytest.approx(alone.error, rel=0.02)
        assert found.rtn_error == alone.rtn_error


@pytest.mark.parametrize("line", ["int4 channel", "float4_e2m1fn channel", "int8 channel symmetric=false"])
def test_groups_of_rows_are_solved_as_alone(line: str) -> None:
    """Convolutions have a moment for each group; a group whose moment is singular or zero is no trouble to others."""
    given, size = weight(line), ROWS // 4
    singular = torch.ones(COLUMNS, COLUMNS) * 2
    moments = torch.stack([moment(seed=1), singular, torch.zeros(COLUMNS, COLUMNS), moment(seed=2)])
    solver = Gptq(activation_order=False, damping=0.0, clip=False)
    together = solver.solve([given], Stats(second_moment=moments))[0]
    assert any(note.startswith("damping raised to") for note in together.notes)
    assert f"{COLUMNS} inputs are always zero" in together.notes
    for group, found in enumerate(torch.split(together.weight.dequantize(), size)):
        rows = Weight(name="w", matrix=given.matrix[group * size :][:size], quantizer=given.quantizer)
        alone = solver.solve([rows], Stats(second_moment=moments[group]))[0]
        assert (found != alone.weight.dequantize()).double().mean() <= 0.02


def test_clip_values_are_the_best_for_each_rows_own_inputs() -> None:
    """By brute force over 0.6 .. 1.1 of the maximum; of a grouped convolution, under its own group's energy."""
    generator, size = torch.Generator().manual_seed(1), ROWS // 2
    tails = torch.randn(ROWS, COLUMNS, generator=generator) ** 3
    energies = torch.rand(2, COLUMNS, generator=generator) ** 4 + 1e-3
    moments = torch.stack([torch.diag(energy) for energy in energies])
    given = Weight(name="w", matrix=tails, quantizer=Quantizer("int4 channel"))
    found = Gptq(activation_order=False).solve([given], Stats(second_moment=moments))
    assert isinstance(found[0].weight, BlockQTensor)
    fractions = [1.0, *torch.linspace(0.6, 1.1, 11).tolist()]
    scales = torch.stack([tails.abs().amax(1) * f / 7 for f in fractions])
    rounded = (tails / scales[..., None]).round().clamp(-7, 7) * scales[..., None]
    errors = ((rounded - tails).square() * energies.repeat_interleave(size, 0)).sum(-1)
    best = errors.argmin(0)
    chosen = scale_of(found[0].weight).flatten()
    assert torch.allclose(chosen, scales.gather(0, best[None])[0], rtol=1e-6)
    assert {0.6, 1.0} <= {round(fractions[i], 2) for i in best.tolist()}


def test_rules_that_weigh_see_the_energy_of_the_inputs() -> None:
    generator = torch.Generator().manual_seed(2)
    tails, energy = torch.randn(ROWS, COLUMNS, generator=generator) ** 3, torch.rand(COLUMNS, generator=generator) ** 6
    given = Weight(name="w", matrix=tails, quantizer=Quantizer("nvfp4-search"))
    found = Gptq(activation_order=False).solve([given], Stats(second_moment=torch.diag(energy + 1e-3)))[0]
    weighed = given.quantizer.quantize(tails, given.quantizer.fit(tails, energy + 1e-3))
    assert isinstance(found.weight, BlockQTensor)
    assert torch.equal(scale_of(found.weight), scale_of(weighed))
    assert not torch.equal(scale_of(weighed), scale_of(given.quantizer.quantize(tails)))


def test_each_group_is_damped_by_its_own_mean() -> None:
    """A loud group beside a quiet one changes nothing for it."""
    given, size = weight("int4 channel"), ROWS // 2
    moments = torch.stack([moment(seed=1), 1e6 * moment(seed=2)])
    together = Gptq(activation_order=False).solve([given], Stats(second_moment=moments))[0].weight.dequantize()
    for group in range(2):
        rows = Weight(name="w", matrix=given.matrix[group * size :][:size], quantizer=given.quantizer)
        alone = Gptq(activation_order=False).solve([rows], Stats(second_moment=moments[group]))[0].weight.dequantize()
        assert (together[group * size :][:size] != alone).double().mean() <= 0.02  # a last bit may round otherwise


def test_dead_columns_round_to_nearest() -> None:
    second = moment()
    second[[3, 17]] = 0
    second[:, [3, 17]] = 0
    given = weight("int4 group=8")
    found = Gptq(activation_order=False, clip=False).solve([given], Stats(second_moment=second))[0]
    plain = given.quantizer.quantize(given.matrix).dequantize()
    assert "2 inputs are always zero" in found.notes
    assert torch.equal(found.weight.dequantize()[:, [3, 17]], plain[:, [3, 17]])
    assert not torch.equal(found.weight.dequantize(), plain)


def test_no_second_moment_is_reported() -> None:
    found = Gptq(activation_order=False).solve([weight("int4 group=8")], Stats())[0]
    assert found.notes == ("no calibration input reached it: rounded to nearest",)
    assert found.error == found.rtn_error


def test_damping_is_raised_and_reported() -> None:
    """A singular H without damping, and one slightly indefinite (float32 sums give such)."""
    x = torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(0))
    singular = x.T @ x
    found = Gptq(activation_order=False, damping=0.0).solve([weight("int4 group=8")], Stats(second_moment=singular))[0]
    assert any(note.startswith("damping raised to") for note in found.notes)
    assert found.error <= found.rtn_error
    indefinite = moment()
    indefinite -= 1.5 * torch.linalg.eigvalsh(indefinite)[0] * torch.eye(COLUMNS)
    found = Gptq(activation_order=False, damping=0.0).solve([weight("int4 group=8")], Stats(second_moment=indefinite))[
        0
    ]
    assert any(note.startswith("damping raised to") for note in found.notes)


def test_damping_is_raised_three_times() -> None:
    """0.01, 0.1, 1, 10: of this mean, 0.05, what makes -0.3 positive is the last."""
    second = torch.diag(torch.tensor([0.4, -0.3] * (COLUMNS // 2)))
    found = Gptq(activation_order=False).solve([weight("int4 group=8")], Stats(second_moment=second))[0]
    assert found.notes[0] == "damping raised to 10"
    second = torch.diag(torch.tensor([0.4, -0.39] * (COLUMNS // 2)))  # a mean of 0.005
    found = Gptq(activation_order=False).solve([weight("int4 group=8")], Stats(second_moment=second))[0]
    assert found.notes == ("the second moment can't be factorised even with damping 10: rounded to nearest",)


def test_hopeless_second_moment_falls_back_and_says_so() -> None:
    hopeless = torch.diag(torch.tensor([1.0, -500.0] * (COLUMNS // 2)))
    given = weight("int4 group=8")
    found = Gptq(activation_order=False).solve([given], Stats(second_moment=hopeless))[0]
    assert any("can't be factorised even with damping" in note and "rounded to nearest" in note for note in found.notes)
    assert torch.equal(found.weight.dequantize(), given.quantizer.quantize(given.matrix).dequantize())


def test_worse_than_rtn_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(self: Gptq, grids: Any, *_: Any) -> list[Tensor]:
        return [grid.matrix * 0 for grid in grids]

    monkeypatch.setattr(Gptq, "_visit", bad)
    found = Gptq(activation_order=False).solve([weight("int4 group=8")], Stats(second_moment=moment()))[0]
    assert found.error == found.rtn_error
    assert any("worse than round-to-nearest" in note and "kept the latter" in note for note in found.notes)


def test_zero_weights_have_no_error() -> None:
    given = Weight(name="w", matrix=torch.zeros(4, 32), quantizer=Quantizer("nvfp4"))
    for solver in solvers().values():
        found = solver.solve([given], Stats(second_moment=moment()))[0]
        assert (found.error, found.rtn_error) == (0.0, 0.0)
        assert not found.weight.dequantize().any()


def test_inputs_are_left_alone() -> None:
    given, second = weight("int4 group=8"), moment()
    matrix, before = given.matrix.clone(), second.clone()
    for solver in solvers().values():
        solver.solve([given], Stats(second_moment=second))
    assert torch.equal(given.matrix, matrix) and torch.equal(second, before)


def test_refusals() -> None:
    for line, text in (
        ("int4 group=8 rounding=stochastic", "stochastic"),
        ("nf4 group=8 center=mean", "center"),
        ("nf4 group=8 floor=normal", "floor"),
    ):
        with pytest.raises(SchemeError, match=text):
            Gptq(activation_order=False).quantizer_for(Quantizer(line))
    with pytest.raises(UsageError, match=r"unknown solver 'gtpq'. Did you mean 'gptq'"):
        make_solver("gtpq", {})
    with pytest.raises(SchemeError, match=r"no option 'dampning'. Did you mean 'damping'"):
        make_solver("gptq", {"dampning": 0.1})
    with pytest.raises(SchemeError, match="block is an int; got 'x'"):
        make_solver("gptq", {"block": "x"})
    with pytest.raises(SchemeError, match="block=0"):
        make_solver("gptq", {"block": 0})
    with pytest.raises(SchemeError, match="damping=1"):
        make_solver("gptq", {"damping": 1})
    with pytest.raises(SchemeError, match="activation_order is a bool; got 1"):
        make_solver("gptq", {"activation_order": 1})
    with pytest.raises(UsageError, match="scale rule 'mmse'"):
        make_solver("rtn", {"scale": "mmse"}).quantizer_for(Quantizer("int4"))
