"""The walk over a model: for each window of blocks, every step of every recipe; then what is in no block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from time import perf_counter

from nybble.calibration.spans import Span
from nybble.calibration.window import Known
from nybble.checkpoint.parts import Parts
from nybble.core import ranks
from nybble.core.products import products_in
from nybble.core.progress import Progress, task
from nybble.report.record import LayerRow
from nybble.walk.job import Job, part_name
from nybble.walk.lane import Lane


class Walk:
    """Some recipes over one model, block after block.

    Args:
        jobs: one, or several that can share a float stream (:attr:`Job.shares`); what is seen of a block serves all.
        spill: a folder for hidden states; None keeps them in memory.

    Attributes:
        seconds: by job, of its own work.
    """

    def __init__(self, jobs: Mapping[str, Job], spill: Path | None = None) -> None:
        self.lanes = {name: Lane(job, spill) for name, job in jobs.items()}
        # A recipe that looks at nothing does not move the streams on.
        self.lead = next(
            (lane for lane in reversed(self.lanes.values()) if lane.calibrated), [*self.lanes.values()][-1]
        )
        self.finishes = any(lane.job.outside_sees for lane in self.lanes.values())
        self.seconds = dict.fromkeys(jobs, 0.0)

    def run(self, parts: Parts | None, progress: Progress) -> dict[str, list[LayerRow]]:
        """Quantize everything; returns rows by job. ``parts``: where a single job's blocks are written."""
        with products_in(self.lead.job.products):
            return self._run(parts, progress)

    def _run(self, parts: Parts | None, progress: Progress) -> dict[str, list[LayerRow]]:
        lead, rows = self.lead, {name: list[LayerRow]() for name in self.lanes}
        (title, *more) = self.lanes.values()
        what = f"quantize ({len(self.lanes)} recipes)" if more else f"quantize ({title.job.recipe.name})"
        try:
            for lane in self.lanes.values():
                lane.begin() if lane is lead else lane.begin_beside(lead)
            todo = lead.spans()
            done = self._done(todo, parts)
            with task(progress, len(lead.names) + 1, what) as bar:
                for number, span in enumerate(todo):
                    if lead.calibrated and span.start == lead.stacks[0]:
                        lead.enter_stack(1)
                    if number < done and parts is not None:
                        rows[next(iter(rows))] += lead.replay(span, parts, self.finishes, number == done - 1)
                    else:
                        self._work(span, parts, rows)
                    bar.advance(span.leave - span.start, note=_last(rows))
                for name, lane in self.lanes.items():
                    lane.streams = lead.streams
                    rows[name] += lane.outside(parts)
                bar.advance(note="")
        finally:
            lead.close()
        return rows

    def _work(self, span: Span, parts: Parts | None, rows: dict[str, list[LayerRow]]) -> None:
        known: Known | None = {} if len(self.lanes) > 1 else None
        order = sorted(self.lanes.items(), key=lambda item: item[1] is self.lead)  # the lead, which moves on, last
        for name, lane in order:
            lane.streams = self.lead.streams
            started = perf_counter()
            lane.work(span, known if lane.calibrated else None)
            found = lane.finish(span)
            rows[name] += [row for each in found.values() for row in each]
            if lane is self.lead:
                lane.advance(span, self.finishes)  # before anything is written: what overflows leaves nothing
            if parts is not None:
                lane.write(span, found, parts)
            lane.release(span, parts is not None)
            self.seconds[name] += perf_counter() - started

    def _done(self, todo: list[Span], parts: Parts | None) -> int:
        """How many windows an earlier run finished, counted from the first."""
        if parts is None:
            return 0
        ready = [all(parts.done(part_name(index)) for index in range(span.start, span.leave)) for span in todo]
        return ranks.lead_says(ready.index(False) if False in ready else len(todo))


def _last(rows: Mapping[str, list[LayerRow]]) -> str:
    return next((each[-1].name for each in rows.values() if each), "")
