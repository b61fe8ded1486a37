"""Evolution over encodings: the best of a population have children, and the best of all are parents again.

An encoding is a tuple of numbers, one a gene: the number of a choice. The loop knows nothing of what they stand for: it
asks what one scores, and whether it fits a limit. As in once-for-all and HAT (Cai et al. 2020, arXiv:1908.09791; Wang
et al. 2020, arXiv:2005.14187), whose numbers Mixture-of-Supernets takes: candidates that break the limit, or that have
been scored, are drawn again; parents are the best of all that were scored (elitism), so the best never gets worse.
Unlike there, draws in a row that find nothing new are counted: a limit that nothing meets is an error, and a space that
is used up an end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nybble.core.errors import DataError, UsageError
from nybble.core.options import at_least_one
from nybble.core.progress import Progress, Silent, task
from nybble.core.seeds import generator
from nybble.search.kept import Kept

Encoding = tuple[int, ...]
"""The number of a choice for each gene."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What evolution chooses among.

    Attributes:
        choices: how many each gene has.
        score: of an encoding; smaller is better. Called once for each that is scored.
        fits: whether an encoding is within the limit.
        canonical: the one encoding that stands for all that mean the same network (genes of layers that it hasn't).
        limit: in words, for messages: ``parameters <= 1,000,000``.
        least: in words, what an error says could be met; empty where nobody knows.
        start: encodings of the first population, before those that are drawn; those that don't fit are left out.
    """

    choices: Sequence[int]
    score: Callable[[Encoding], float]
    fits: Callable[[Encoding], bool] = lambda encoding: True
    canonical: Callable[[Encoding], Encoding] = lambda encoding: encoding
    limit: str = "the limit"
    least: str = ""
    start: Sequence[Encoding] = ()


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A candidate and its score; ``generation`` 0 is the first population."""

    encoding: Encoding
    score: float
    generation: int


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """The loop's numbers; the defaults are those of Mixture-of-Supernets (arXiv:2306.04845, released code).

    Attributes:
        population: candidates that are drawn at random at first.
        parents: the best that have children.
        mutations, crossovers: children of either kind in a generation.
        probability: of each gene to be drawn anew in a mutation.
        generations: behind the first population.
        tries: draws in a row that may be refused before the loop gives up looking.
    """

    population: int = 125
    parents: int = 25
    mutations: int = 50
    crossovers: int = 50
    probability: float = 0.3
    generations: int = 30
    tries: int = 1000

    def __post_init__(self) -> None:
        at_least_one(population=self.population, parents=self.parents, tries=self.tries)
        if self.population < self.parents:
            raise UsageError(f"a population of {self.population} can't have {self.parents} parents; name fewer.")
        if min(self.mutations, self.crossovers, self.generations) < 0:
            raise UsageError("mutations, crossovers and generations are 0 or more.")
        if not 0 < self.probability <= 1:
            raise UsageError(f"the probability of a mutation is above 0 and at most 1; got {self.probability:g}.")

    def run(
        self, candidates: Candidates, seed: int = 0, keep: Kept | None = None, progress: Progress | None = None
    ) -> list[Scored]:
        """All that were scored, the best first; of equals the one that was scored first.

        Args:
            candidates: what there is.
            seed: the same one gives the same list, on every machine where the scores are the same.
            keep: scores by encoding; a run that was killed goes on with them.
            progress: told after each generation.

        Raises:
            UsageError: a gene without a choice, or none of ``tries`` draws is within the limit. DataError: a score is
                NaN.
        """
        if not candidates.choices or min(candidates.choices) < 1:
            raise UsageError("the space to search is empty: every gene needs a choice.")
        run = _Run(self, candidates, keep or Kept())
        with task(progress or Silent(), self.generations + 1, "generations") as bar:
            for generation in range(self.generations + 1):
                before = len(run.found)
                run.step(generation, generator(seed, "evolution", str(generation)))
                best = run.best()
                bar.advance(note=f"{len(best)} scored, best {best[0].score:.6g}")
                if len(run.found) == before:
                    break
        return run.best()


class _Run:
    """One run: what it has scored."""

    def __init__(self, options: Evolution, candidates: Candidates, keep: Kept) -> None:
        self.options, self.candidates, self.keep = options, candidates, keep
        self.found: dict[Encoding, Scored] = {}

    def best(self) -> list[Scored]:
        return sorted(self.found.values(), key=lambda scored: scored.score)

    def step(self, generation: int, drawn: torch.Generator) -> None:
        """The first population, or the children of a generation: all are drawn, then scored."""
        options = self.options
        if generation == 0:
            given = [self.candidates.canonical(tuple(each)) for each in self.candidates.start]
            fresh = [each for each in dict.fromkeys(given) if self.candidates.fits(each)]
            fresh += self._new(options.population - len(fresh), lambda: self._random(drawn), fresh)
            if not fresh:
                least = f" {self.candidates.least}" if self.candidates.least else ""
                raise UsageError(
                    f"none of {options.tries:,} architectures drawn is within {self.candidates.limit}.{least} "
                    "Raise the limit, or widen the space."
                )
        else:
            parents = [scored.encoding for scored in self.best()[: options.parents]]
            fresh = self._new(options.mutations, lambda: self._mutated(parents, drawn), [])
            if len(parents) > 1:
                fresh += self._new(options.crossovers, lambda: self._crossed(parents, drawn), fresh)
        for encoding in fresh:
            self._score(encoding, generation)

    def _new(self, count: int, draw: Callable[[], Encoding], taken: Sequence[Encoding]) -> list[Encoding]:
        """Up to ``count`` that fit and are new; fewer where ``tries`` draws in a row find none."""
        found = dict.fromkeys(taken)
        refused = 0
        while len(found) - len(taken) < count and refused < self.options.tries:
            encoding = self.candidates.canonical(draw())
            if encoding in found or encoding in self.found or not self.candidates.fits(encoding):
                refused += 1
                continue
            found[encoding], refused = None, 0
        return [*found][len(taken) :]

    def _score(self, encoding: Encoding, generation: int) -> None:
        key = f"evolution {json.dumps(encoding)}"
        score = self.keep(key, lambda: [float(self.candidates.score(encoding))])[0]
        if math.isnan(score):
            raise DataError(f"the score of the architecture {list(encoding)} is NaN; check the supernet and its data.")
        self.found[encoding] = Scored(encoding=encoding, score=score, generation=generation)

    def _random(self, drawn: torch.Generator) -> Encoding:
        return tuple(_below(count, drawn) for count in self.candidates.choices)

    def _mutated(self, parents: Sequence[Encoding], drawn: torch.Generator) -> Encoding:
        parent, other = parents[_below(len(parents), drawn)], self._random(drawn)
        anew = torch.rand(len(parent), generator=drawn, dtype=torch.float64) < self.options.probability
        return tuple(b if new else a for a, b, new in zip(parent, other, anew.tolist(), strict=True))

    def _crossed(self, parents: Sequence[Encoding], drawn: torch.Generator) -> Encoding:
        first, second = torch.randperm(len(parents), generator=drawn)[:2].tolist()
        side = torch.randint(2, (len(parents[0]),), generator=drawn).tolist()
        return tuple(b if s else a for a, b, s in zip(parents[first], parents[second], side, strict=True))


def _below(count: int, drawn: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=drawn))
