"""A solver as a step: what calibration shows of a block's layers, the method on each, quantized modules in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nybble.calibration.block import BlockState, Record
from nybble.calibration.operands import see_operands
from nybble.calibration.statistics import ChannelSizes, SecondMoment
from nybble.calibration.watch import Group, Seen, layer_moments, see_block, see_nothing
from nybble.calibration.window import Window
from nybble.core import ranks
from nybble.core.errors import DataError, UsageError, within
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.kinds import Quantized, Target
from nybble.solvers import Sizes, Solved, Solver, Stats, Weight
from nybble.walk.steps import BlockStep, Cost, Load, Subject
from nybble.walk.steps._solver_cost import solver_cost
from nybble.walk.steps._together import beside_each_other, joined, solve_joined


class SolverStep(BlockStep):
    """Quantizes a block when it enters the window.

    Args:
        key: the solver's. solver: the method.
        looks: whether later steps want some of every layer's inputs.
        together: layers that share what a quantizer has for a whole tensor (:class:`~nybble.scheme.Scheme`).
    """

    kind: ClassVar[str] = "solver"

    def __init__(self, key: str, solver: Solver, looks: bool = False, together: Sequence[Sequence[str]] = ()) -> None:
        self.looks, self.together = looks, together
        self.name, self.solver, self.path = f"solver {key!r}", solver, solver.path
        self.paths = solver.paths

    # ------------------------------------------------------------------------------------------------ questions
    def needs(self, subject: Subject) -> frozenset[str]:
        """What the solver needs, and ``ranges`` for static activations."""
        return subject.plan.needs(self.solver)

    def cost(self, subject: Subject, targets: Sequence[Target], load: Load) -> Cost:  # noqa: D102
        cost = solver_cost(self.solver, targets, load)
        guided = self.solver.guides and any(t.rule.weights and t.kind.by_rows for t in targets)
        if not guided or not load.samples:
            return cost
        weights = [t for block in subject.plan.blocks for t in block if t.kind.by_rows]
        groups = sum(min(self.solver.guides, target.shape[0]) for target in weights)
        return replace(cost, held=cost.held + 2 * groups * load.samples * load.seq_len)

    def gradient_tokens(self, subject: Subject, load: Load) -> int:  # noqa: D102
        needs = subject.plan.needs(self.solver)
        if "guided" in needs:  # of a batch at a time; what is kept of them is small
            return load.tokens
        return min(load.samples * load.seq_len, self.solver.most_tokens) if "fisher" in needs else 0

    # ------------------------------------------------------------------------------------------------ doing
    def run(self, window: Window) -> None:
        """See the block's inputs, solve every target, put the quantized modules in place."""
        state, path = window.block, self.path
        seen = see_nothing(state.targets)
        if window.calibrated and state.targets:
            seen = see_block(window, path, self.solver, self.looks)
        products = [t for t in state.targets if t.kind.operands]
        found = {t.name: self._operands(window, t) for t in products}  # all before any is in place
        for target in products:
            self._put_operands(state, target, found[target.name])
        if not window.calibrated:
            seen = replace(seen, groups=beside_each_other(seen.groups, self.together))
        self._solve_groups(window, seen, window.calibration.fisher, "solve")
        for target in state.targets:
            if target.kind.fused:
                routed, sizes = seen.routed.pop(target.name, None), seen.routed_sizes.pop(target.name, None)
                self._solve_fused(window, target, routed, sizes)

    def run_outside(self, window: Window) -> None:
        """The same for what is in no block."""
        seen = see_nothing(window.block.targets)
        if window.calibrated:
            seen = see_block(window, self.path, self.solver)
        self._solve_groups(window, seen, {}, "")

    def _solve_groups(self, window: Window, seen: Seen, fisher: Mapping[str, Tensor], phase: str) -> None:
        """Every group with a seed of its own; by several processes at once, unless each sees what those before it gave.

        Processes give each other what they came to.
        """
        state, device, owners = window.block, window.calibration.device, _owners(seen.groups)
        stages = [[number] for number in range(len(seen.groups))] if seen.later else [list(range(len(seen.groups)))]
        for numbers in stages:
            mine: dict[int, list[Solved]] = {}
            # the widest input first: its second moment is let go of before the others' weights are copied
            for number in sorted(numbers, key=lambda n: -seen.groups[n].members[0].shape[1]):
                group = seen.groups[number]
                window.seed(f"{phase} {group.leader}".strip())
                self._see_drift(window, group, seen)
                stats = _stats(state, group, seen, fisher, owners[number] == ranks.number())
                if stats is not None:
                    mine[number] = self._solved(state, group, stats)
                    del stats
            for number, solved in sorted(ranks.spread(mine, device)):
                self._install(state, seen.groups[number], seen, solved)

    def _see_drift(self, window: Window, group: Group, seen: Seen) -> None:
        """Of a group that asks for its drift: what it gets now that the groups before it are in place."""
        if group.leader not in seen.later:
            return
        inputs = (group.inputs, seen.params.get(group.leader))
        guided = [(group.leader, seen.guided[t.name]) for t in group.members if t.name in seen.guided]
        layers = {group.leader: (group.members[0], inputs)}
        moments, drifts = layer_moments(window, self.path, layers, guided)
        seen.moments.update(moments)
        seen.drifts.update(drifts)

    def _solved(self, state: BlockState, group: Group, stats: Stats) -> list[Solved]:
        """What the solver makes of a group's weights."""
        weights = [
            Weight(
                name=f"{state.prefix}{t.name}",
                matrix=self._checked(state.matrix(t), f"{state.prefix}{t.name}.weight"),
                quantizer=t.rule.weights,
            )
            for t in group.members
            if t.rule.weights is not None
        ]
        with within(f"{state.prefix}{group.leader}"):
            return self._joined(weights, stats)

    def _install(self, state: BlockState, group: Group, seen: Seen, answers: Sequence[Solved]) -> None:
        """Put a group's layers in place."""
        look, params = seen.looks.pop(group.leader, None), seen.params.get(group.leader)
        sample = None if look is None else look.all()
        solved = dict(zip([t.name for t in group.members if t.rule.weights is not None], answers, strict=True))
        for target in group.members:
            found = solved.get(target.name)
            chosen = (target.rule.inputs, params) if found is None or found.inputs is None else found.inputs
            state.records[target.name] = _record(target, found, chosen, sample)
            made = Quantized(
                weights=() if found is None else (found.weight,),
                inputs=None if chosen[0] is None else ActivationQuantizer(chosen[0], chosen[1]),
                outputs=None if target.rule.outputs is None else ActivationQuantizer(target.rule.outputs),
                folded=state.folded.get(target.name, ""),
            )
            state.install(target, made)

    def _joined(self, weights: Sequence[Weight], stats: Stats) -> list[Solved]:
        """What becomes of each; those that share a scale are solved as one."""
        groups = joined(weights, self.together)
        if all(len(group) == 1 for group in groups):
            return self._answers(weights, stats)
        found: dict[str, Solved] = {}
        for group in groups:
            one = len(group) == 1
            answers = self._answers(group, stats) if one else solve_joined(self._answers, group, stats)
            found |= dict(zip([w.name for w in group], answers, strict=True))
        return [found[weight.name] for weight in weights]

    def _answers(self, weights: Sequence[Weight], stats: Stats) -> list[Solved]:
        """What the solver makes of them; it may be another package's."""
        if not weights:
            return []
        found: Any = self.solver.solve(weights, stats)
        if isinstance(found, list) and len(found) == len(weights) and all(isinstance(each, Solved) for each in found):
            return found
        came = f"{len(found)} of {len(weights)}" if isinstance(found, list) else f"a {type(found).__name__}"
        raise UsageError(
            f"{type(self.solver).__module__}.{type(self.solver).__name__}.solve returned {came}; it returns a list of "
            "nybble.solvers.Solved, one a weight."
        )

    def _solve_fused(
        self,
        window: Window,
        target: Target,
        moments: Sequence[SecondMoment] | None,
        sizes: Sequence[ChannelSizes] | None,
    ) -> None:
        """Every matrix by itself; processes take their share of them."""
        if target.rule.weights is None:
            return
        state, mine = window.block, dict[int, Solved]()
        stored = state.matrix(target)
        for number in ranks.share(target.matrices):
            name = f"{state.prefix}{target.name}.{number}"
            window.seed(f"solve {target.name}.{number}")
            matrix = self._checked(stored[number], name)
            weight = Weight(name=name, matrix=matrix, quantizer=target.rule.weights)
            second = None if moments is None else moments[number].mean(name)
            with within(name):
                stats = Stats(second_moment=second, sizes=None if sizes is None else _sizes(sizes[number]))
                mine[number] = self._answers([weight], stats)[0]
        solved = dict(ranks.spread(mine, window.calibration.device))
        for number, found in sorted(solved.items()):
            record = state.records[f"{target.name}.{number}"] = _record(target, found, (None, None), None)
            record.number = number
        state.install(target, Quantized(weights=[solved[number].weight for number in sorted(solved)]))

    def _operands(self, window: Window, target: Target) -> dict[str, ActivationQuantizer]:
        """The quantizers of an attention's operands; the parameters of static ones from what the block computes."""
        matmuls = target.rule.matmuls
        assert matmuls is not None
        chosen: dict[str, tuple[Any, Any]] = {operand: (quantizer, None) for operand, quantizer in matmuls.items()}
        if matmuls.static:
            name = f"{window.block.prefix}{target.name}.{target.kind.part}"
            if not window.calibrated:
                raise DataError(f"{name} was never called on the calibration data, so its operands have no scale.")
            seen = see_operands(window.block.module, target, name, window.batches(self.path))
            for (left, x), (right, y) in target.kind.pairs(seen):
                first, second = chosen[left][0], chosen[right][0]
                if first == second and first.static:
                    chosen[left], chosen[right] = self.solver.solve_product(x, y, first)
                    continue
                for operand, quantizer, values in ((left, first, x), (right, second, y)):  # each by its own values
                    chosen[operand] = quantizer, quantizer.fit(values) if quantizer.static else None
        return {operand: ActivationQuantizer(*chosen[operand]) for operand in target.kind.operands}

    def _put_operands(self, state: BlockState, target: Target, operands: dict[str, ActivationQuantizer]) -> None:
        state.install(target, Quantized(operands=operands))
        for name, part in operands.items():
            record = Record(target=target, inputs=(part.quantizer, part.params()))
            state.records[f"{target.name}.{target.kind.part}.{name}"] = record

    @staticmethod
    def _checked(matrix: Tensor, what: str) -> Tensor:
        """``matrix`` as float32, contiguous; raises DataError where it isn't finite."""
        check_finite(matrix, what)
        return matrix.float().contiguous()


def _owners(groups: Sequence[Group]) -> list[int]:
    """Which process solves each group: the dearest first, each by whoever has least to do.

    What a method takes grows with the weights, with the columns that it goes through one after the other, and of those
    that factorise a second moment with its cube.
    """
    shapes = [(sum(t.shape[0] for t in group.members), group.members[0].shape[1]) for group in groups]
    return ranks.owners([columns * (rows + 2 * columns) for rows, columns in shapes])


def _stats(state: BlockState, group: Group, seen: Seen, fisher: Mapping[str, Tensor], wanted: bool) -> Stats | None:
    """What a solver gets of a group's input, if it is wanted; the memory is free once the caller lets go of it."""
    moment, sample = seen.moments.pop(group.leader, None), seen.samples.pop(group.leader, None)
    drift = seen.drifts.pop(group.leader, None)
    if not wanted:
        return None
    if not group.members[0].kind.shares_input:  # a table that a head reads: judged by the head's output error
        sample = None
    guided = {t.name: seen.guided.pop(t.name) for t in group.members if t.name in seen.guided}
    weighed = {f"{state.prefix}{name}": each.mean(f"{state.prefix}{name}") for name, each in guided.items()}
    return Stats(
        guided={name: moments for name, moments in weighed.items() if moments is not None},
        second_moment=None if moment is None else moment.mean(f"{state.prefix}{group.leader}"),
        drift=None if drift is None else drift.mean(),
        sizes=_sizes(seen.sizes.pop(group.leader, None)),
        inputs=None if sample is None else sample.all(),
        quantizer=group.inputs,
        fisher={name: fisher[name] for t in group.members if (name := f"{state.prefix}{t.name}") in fisher},
    )


def _sizes(seen: ChannelSizes | None) -> Sizes | None:
    """What a solver gets of them; None where nothing was seen."""
    if seen is None or seen.largest is None:
        return None
    return Sizes(largest=seen.largest, mean=seen.mean)


def _record(target: Target, found: Solved | None, inputs: tuple[Any, Any], sample: Tensor | None) -> Record:
    return Record(
        target=target,
        quantizer=None if found is None else found.quantizer or target.rule.weights,
        stored="" if found is None else str(found.stored),
        error=None if found is None else found.error,
        rtn_error=None if found is None else found.rtn_error,
        clip=None if found is None else found.clip,
        notes=[] if found is None else list(found.notes),
        inputs=inputs,
        sample=None if sample is None else sample.flatten(0, -2),
    )


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise DataError, naming ``what``, where a weight has NaN or infinities."""
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise DataError(f"{what} holds {bad} NaN or Inf among {tensor.numel()} values; repair the model file.")
