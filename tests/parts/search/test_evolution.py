"""Evolution: it finds what trying all finds, scores nothing twice, keeps a limit, and can be killed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from nybble.core.errors import DataError, UsageError
from nybble.search.evolution import Candidates, Encoding, Evolution
from nybble.search.kept import Kept

SMALL = Evolution(population=20, parents=5, mutations=10, crossovers=10, generations=12, tries=200)
CHOICES = (4, 4, 4, 4, 4, 4)


def score(encoding: Encoding) -> float:
    """Has one best, and neighbours that matter together."""
    return sum((gene - at % 4) ** 2 for at, gene in enumerate(encoding)) + 0.1 * abs(encoding[0] - encoding[-1])


def fits(encoding: Encoding) -> bool:
    """A little under half of the space."""
    return sum(encoding) <= 8


def test_it_finds_the_best_within_the_limit_and_scores_nothing_twice() -> None:
    asked: list[Encoding] = []

    def counted(encoding: Encoding) -> float:
        asked.append(encoding)
        return score(encoding)

    found = SMALL.run(Candidates(choices=CHOICES, score=counted, fits=fits), seed=1)
    every = [e for e in itertools.product(range(4), repeat=6) if fits(e)]
    assert found[0].score == min(map(score, every))
    assert len(set(asked)) == len(asked) == len(found) <= 20 + 12 * 20 and all(map(fits, asked))
    assert [scored.score for scored in found] == sorted(map(score, asked))


def test_the_best_never_gets_worse_and_children_are_of_parents() -> None:
    """With mutations alone at a small probability a child is near one of the best."""
    options = Evolution(population=30, parents=2, mutations=8, crossovers=0, probability=0.2, generations=6)
    found = options.run(Candidates(choices=CHOICES, score=score), seed=3)
    for generation in range(1, 7):
        before = sorted((s for s in found if s.generation < generation), key=lambda s: s.score)
        parents = [s.encoding for s in before[:2]]
        children = [s.encoding for s in found if s.generation == generation]
        near = [min(sum(a != b for a, b in zip(c, p, strict=True)) for p in parents) for c in children]
        assert children and sum(near) / len(near) < 3  # 0.2 x 6 x 3/4 genes differ, without the doubles 1.5
    crossed = Evolution(population=30, parents=4, mutations=0, crossovers=8, generations=1)
    found = crossed.run(Candidates(choices=CHOICES, score=score), seed=3)
    parents = [s.encoding for s in sorted((s for s in found if not s.generation), key=lambda s: s.score)[:4]]
    children = [s.encoding for s in found if s.generation]
    assert children
    for child in children:
        pairs = itertools.combinations(parents, 2)
        assert any(all(gene in genes for gene, genes in zip(child, zip(*pair, strict=True), strict=True))
                   for pair in pairs)  # fmt: skip


def test_seeds_and_runs_that_were_killed(tmp_path: Path) -> None:
    whole = SMALL.run(Candidates(choices=CHOICES, score=score, fits=fits), seed=5)
    assert whole == SMALL.run(Candidates(choices=CHOICES, score=score, fits=fits), seed=5)
    assert whole != SMALL.run(Candidates(choices=CHOICES, score=score, fits=fits), seed=6)
    calls = 0

    def killed(encoding: Encoding) -> float:
        nonlocal calls
        calls += 1
        if calls == 70:
            raise KeyboardInterrupt
        return score(encoding)

    with pytest.raises(KeyboardInterrupt):
        SMALL.run(Candidates(choices=CHOICES, score=killed, fits=fits), seed=5, keep=Kept(tmp_path / "kept"))
    again = Candidates(choices=CHOICES, score=killed, fits=fits)
    assert SMALL.run(again, seed=5, keep=Kept(tmp_path / "kept")) == whole
    assert calls == len(whole) + 1  # one was measured again, 69 were not


def test_small_spaces_end_and_what_means_the_same_is_one() -> None:
    """A gene that is switched off by another counts once."""

    def canonical(encoding: Encoding) -> Encoding:
        return encoding if encoding[0] else (0, 0)

    found = SMALL.run(Candidates(choices=(2, 5), score=lambda e: float(sum(e)), canonical=canonical))
    assert sorted(s.encoding for s in found) == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4)]
    alone = Evolution(population=1, parents=1, generations=2).run(Candidates(choices=(3,), score=lambda e: float(e[0])))
    assert len(alone) == 3
    first = SMALL.run(Candidates(choices=CHOICES, score=score, fits=fits, start=[(0,) * 6, (3,) * 6, (0,) * 6]))
    assert (0,) * 6 in {s.encoding for s in first if not s.generation} and (3,) * 6 not in {s.encoding for s in first}
    assert sum(not s.generation for s in first) == 20


def test_what_can_not_be_met_is_an_error_and_no_endless_loop() -> None:
    never = Candidates(
        choices=CHOICES, score=score, fits=lambda e: False, limit="parameters <= 10", least="The least is 12."
    )
    with pytest.raises(
        UsageError, match=r"none of 200 architectures drawn is within parameters <= 10\. The least is 12"
    ):
        SMALL.run(never)
    with pytest.raises(UsageError, match="population of 4 can't have 5 parents"):
        Evolution(population=4, parents=5)
    with pytest.raises(UsageError, match="every gene needs a choice"):
        SMALL.run(Candidates(choices=(3, 0), score=score))
    with pytest.raises(DataError, match=r"architecture \[\d, \d\] is NaN"):
        SMALL.run(Candidates(choices=(3, 3), score=lambda e: float("nan")))
    for wrong in ({"parents": 0}, {"probability": 0.0}, {"probability": 1.5}, {"generations": -1}, {"tries": 0}):
        with pytest.raises(UsageError):
            Evolution(**wrong)
