"""What a solver step takes for one block: statistics, kept inputs, the solver's own working memory, and its search."""

from __future__ import annotations

from collections.abc import Sequence

from nybble.calibration.watch import SAMPLE
from nybble.nn.kinds import Target
from nybble.solvers import Solver
from nybble.walk.steps import Cost, Load


def solver_cost(solver: Solver, targets: Sequence[Target], load: Load) -> Cost:
    """Of the targets of one block, or of one that is in no block."""
    solved = [t for t in targets if t.rule.weights is not None]
    alone = 0
    if any(t.kind.rows_a_sample for t in targets):
        peak = _rows(solved, solver, load)
    else:
        gathered, inputs = _moments(solved, solver), _inputs(solved, solver, load)
        peak = gathered + inputs
        alone = max(gathered, _solving(targets, solved, solver)) + inputs
    tokens = load.samples * load.seq_len
    flops = 0.0
    for target in solved:
        if solver.needs(target.rule.inputs) & {"second_moment", "inputs"}:
            kept = _kept(solver, target) + (2 * min(solver.guides, target.shape[0]) if target.kind.by_rows else 0)
            flops += tokens * target.shape[1] ** 2 * kept
        most = min(load.samples * target.kind.rows_a_sample, solver.most_tokens) or tokens
        flops += solver.flops(*target.shape, most, target.rule.inputs) * target.matrices
    flops += _passes(solved, solver) * sum(_forward(t, load) for t in targets)
    stored = sum(solver.stored_bytes(t.rule.weights, t.shape) * t.matrices for t in solved if t.rule.weights)
    return Cost(peak=peak, alone=alone, flops=flops, stored=stored)


def _rows(targets: Sequence[Target], solver: Solver, load: Load) -> int:
    """Of layers whose statistics are of a limited number of rows a sample (convolutions): all are kept at once."""
    most = min(load.samples * max((t.kind.rows_a_sample for t in targets), default=0), solver.most_tokens)
    gathered = frozenset().union(*(solver.needs(t.rule.inputs) for t in targets)) if targets else frozenset()
    kept = 0
    if gathered & {"second_moment", "inputs"}:
        kept = sum(
            4 * t.shape[1] * (2 * _kept(solver, t) * t.shape[1] + (most if "inputs" in gathered else SAMPLE))
            for t in targets
        )
    return kept + max(
        (solver.working_bytes([t.shape[0]], t.shape[1]) + 24 * most * t.shape[1] for t in targets), default=0
    )


def _moments(targets: Sequence[Target], solver: Solver) -> int:
    """Second moments, float64 sums: a block reads at most three tensors of one width (qkv, out, MLP); one to add."""
    needy = [t for t in targets if "second_moment" in solver.needs(t.rule.inputs)]
    if not needy:
        return 0
    total = sum(8 * t.matrices * t.shape[1] ** 2 for t in needy if t.kind.fused)
    each = max(_kept(solver, t) for t in needy)
    linear = [t.shape[1] for t in needy if not t.kind.fused]
    if any(_later(solver, t) for t in needy):  # of one input after the other
        total += each * 8 * max(linear, default=0) ** 2
    else:
        total += each * sum(8 * c * c * min(3, linear.count(c)) for c in set(linear))
    if any("guided" in solver.needs(t.rule.inputs) for t in needy):  # each weight has its own
        total += sum(
            8 * min(solver.guides, t.shape[0]) * t.shape[1] ** 2 for t in needy if t.kind.by_rows and not t.kind.fused
        )
    return int(total + 4 * max(t.shape[1] for t in needy) ** 2)


def _kept(solver: Solver, target: Target) -> int:
    """Matrices like the second moment that are gathered of an input: with a drift, its two."""
    return 3 if _later(solver, target) else 1


def _later(solver: Solver, target: Target) -> bool:
    """Whether what a solver needs of an input is gathered when its turn comes, and not of the whole block at once."""
    return "drift" in solver.needs(target.rule.inputs) and not target.kind.fused


def _passes(targets: Sequence[Target], solver: Solver) -> int:
    """How often a block is run for that: on both paths for each input; every layer of a convolutional net has one."""
    later = [t for t in targets if _later(solver, t)]
    widths = [t.shape[1] for t in later]
    alone = any(t.kind.rows_a_sample for t in later)
    return 2 * (len(later) if alone else sum(min(3, widths.count(c)) for c in set(widths)))


def _forward(target: Target, load: Load) -> float:
    """Multiply-adds x 2 of a layer for all calibration data."""
    rows = load.samples * (load.products.get(target.name, 0) if load.sample else load.seq_len)
    return 2.0 * rows * target.shape[0] * target.shape[1] * target.matrices


def _inputs(targets: Sequence[Target], solver: Solver, load: Load) -> int:
    """Inputs that a solver reads: kept in the model's dtype, three of a width; of the widest, six copies in float32."""
    needy = [t for t in targets if "inputs" in solver.needs(t.rule.inputs)]
    if not needy:
        return 0
    tokens = min(load.samples * load.seq_len, solver.most_tokens)
    widths = [t.shape[1] for t in needy]
    kept = sum(c * min(3, widths.count(c)) for c in set(widths)) * load.dtype.itemsize
    return tokens * (kept + 24 * max(widths))


def _solving(targets: Sequence[Target], solved: Sequence[Target], solver: Solver) -> int:
    """Of weights that are solved together, at most three of one width; experts are solved one by one.

    Beside what was gathered of inputs as wide or narrower, as the widest go first; one is what the method works with.
    """
    found = [0]
    for width in {t.shape[1] for t in targets}:
        rows = sorted((t.shape[0] for t in targets if t.shape[1] == width and not t.kind.fused), reverse=True)[:3]
        rows = rows or [max(t.shape[0] for t in targets if t.shape[1] == width)]
        left = [t for t in solved if t.kind.fused or t.shape[1] <= width]
        own = any(t.shape[1] == width and not t.kind.fused for t in left)
        found.append(solver.working_bytes(rows, width) + max(0, _moments(left, solver) - 12 * own * width**2))
    return max(found)
