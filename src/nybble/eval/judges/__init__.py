"""How models are judged, one judge a kind of data, under the kind's key: which metrics, the usual ones, on how much.

Other packages add judges through entry points of the group ``nybble.eval.judges``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nybble.core.errors import ModelError, UsageError, did_you_mean
from nybble.core.progress import Progress
from nybble.core.registry import Registry
from nybble.data.samples import Origin, Samples, Wanted

_COMPARES = "metric {!r} compares with the float model; give it (--reference MODEL)."
JUDGES = Registry("nybble.eval.judges", "judge", lambda part: isinstance(part, Judge))


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Who is judged on what.

    Attributes:
        models: by name, in eval mode. reference: the float model that some metrics compare with; may be one of them.
        origins: where they come from, by name. reference_origin: where the reference does.
        samples: of the judge's kind of data.
        metrics: names among the judge's own.
    """

    models: Mapping[str, nn.Module]
    reference: nn.Module | None
    samples: Samples
    metrics: Sequence[str]
    origins: Mapping[str, Origin] = field(default_factory=dict)
    reference_origin: Origin | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``metrics``: of each model, by name; ``counts``: what else is to stand in the data's manifest."""

    metrics: dict[str, dict[str, float]]
    counts: Mapping[str, int | str] = field(default_factory=dict)


class Judge(ABC):
    """Of the models of one kind of data."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names that a user may ask for."""

    @property
    def comparing(self) -> tuple[str, ...]:
        """Those that compare with a float model, and can't be without it."""
        return ()

    def usual(self, compared: bool) -> tuple[str, ...]:
        """What is computed if nothing is asked for; ``compared``: whether there is a float model."""
        return self.metrics

    def wanted(self, samples: int | None, seq_len: int) -> Wanted:
        """Which samples a judgement takes, if ``samples`` (None: nothing said) of length ``seq_len`` are asked for."""
        return Wanted(part="evaluation", samples=samples, seq_len=seq_len)

    def call(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """One forward of a model, as the judgement will make them."""
        return model(**inputs)

    @abstractmethod
    def judge(self, panel: Panel, progress: Progress) -> Verdict:
        """Run the models.

        Raises:
            UsageError: a metric without what it compares with. ModelError: a model that gives nothing to judge by.
        """

    def texts(self, models: Mapping[str, Any], origin: Origin, samples: Samples, count: int) -> list[dict[str, str]]:
        """What models make of some samples, for people to read: ``prompt`` and every model's name. Few kinds can."""
        return []


def judge_of(key: str) -> Judge:
    """The judge of a kind of data.

    Raises:
        ModelError: the kind has none; or a package registered something else under its name.
    """
    if key.replace("_", "-") not in JUDGES.names():
        raise ModelError(
            f"nothing judges a model of {key} yet (there are judges of {', '.join(JUDGES.names())}). "
            "A package adds one through an entry point of the group nybble.eval.judges."
        )
    found: Judge = JUDGES.get(key)
    return found


def check_metrics(metrics: Sequence[str] | None, compared: bool) -> None:
    """Refuse names that no judge knows, and those that need a float model where there is none; nothing is loaded.

    Raises:
        UsageError: the message has the closest name, or what to give.
    """
    if metrics is None:
        return
    judges: list[Judge] = [*JUDGES.all().values()]
    known = {name for judge in judges for name in judge.metrics}
    if not metrics:
        raise UsageError(f"no metric is named; there are {', '.join(sorted(known))}. Leave it out for the usual ones.")
    for metric in metrics:
        if metric not in known:
            raise UsageError(f"unknown metric {metric!r}.{did_you_mean(metric, known)}")
        if not compared and all(metric in judge.comparing for judge in judges if metric in judge.metrics):
            raise UsageError(_COMPARES.format(metric))


def chosen_metrics(key: str, metrics: Sequence[str] | None, compared: bool) -> tuple[str, ...]:
    """What is asked for, or the usual.

    Raises:
        UsageError: a metric of another kind of model, or nothing that goes without a float model where there is none.
    """
    judge = judge_of(key)
    if metrics is None:
        usual = judge.usual(compared)
        if not compared and set(usual) <= set(judge.comparing):
            raise UsageError(
                f"a model of {key} is judged by {', '.join(usual)}, which compare with the float model; give it as "
                "the reference (--reference MODEL)."
            )
        return usual
    if not metrics or not set(metrics) <= set(judge.metrics):
        asked = ", ".join(metrics) or "nothing"
        raise UsageError(f"a model of {key} is judged by {', '.join(judge.metrics)}; not by {asked}.")
    for metric in metrics:
        if not compared and metric in judge.comparing:
            raise UsageError(_COMPARES.format(metric))
    return tuple(metrics)
