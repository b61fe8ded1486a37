"""``quantize``: a model is quantized, and judged on held-out data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nybble.core.errors import UsageError
from nybble.core.options import at_least_one
from nybble.data.text import check_source
from nybble.lab.kinds import RunKind
from nybble.models.named import check_model

if TYPE_CHECKING:
    from nybble.data import Samples

CHANGES = ("target", "scheme", "weights", "activations", "kv", "embeddings", "matmuls")
FLOAT = "none"
"""The recipe that leaves the model as it is: the baseline of a sweep."""


@dataclass(frozen=True, kw_only=True)
class QuantizeAndJudge(RunKind):
    """What ``nybble quantize`` and ``nybble eval`` do, with their options.

    Attributes:
        model: a float model. recipe: how it is quantized; ``none``: not at all.
        target, scheme, weights, activations, kv, embeddings, matmuls, effort: as of :func:`nybble.quantize`.
        data: to calibrate on. samples: how many; None: the usual number. seq_len: tokens of one.
        judged_on: to judge on. judged_samples: how many; None: all. judged_len: tokens of one.
        metrics: which; None: the usual ones. reference: compare with the float model too, as some metrics do.
        device: cpu or cuda. seed: of every random choice.
    """

    FILES: ClassVar[tuple[str, ...]] = ("model", "recipe", "scheme", "data", "judged_on")

    model: str
    recipe: str = "rtn"
    target: str | None = None
    scheme: str | None = None
    weights: str | None = None
    activations: str | None = None
    kv: str | None = None
    embeddings: str | None = None
    matmuls: str | None = None
    effort: str = "full"
    data: str = "builtin"
    samples: int | None = None
    seq_len: int = 512
    judged_on: str = "builtin"
    judged_samples: int | None = None
    judged_len: int = 512
    metrics: tuple[str, ...] | None = None
    reference: bool = False
    device: str = "cpu"
    seed: int = 0

    def check(self) -> None:
        """The recipe with its changes, and all that names something; layers are matched when it runs."""
        at_least_one(samples=self.samples, seq_len=self.seq_len)
        at_least_one(judged_samples=self.judged_samples, judged_len=self.judged_len)
        for src in (self.data, self.judged_on):
            check_source(src)
        check_model(self.model)
        if why := _refusal(self.recipe, self.effort, tuple(self._changes().items())):
            raise UsageError(why)

    def run(self, folder: Path) -> Mapping[str, Any]:
        """Metrics; ``bytes`` of all files, ``bits`` per weight stored, ``parameters``; ``error`` of the layers.

        Of a language model also ``layers``, ``kv_heads`` and ``head_dim`` of its cache.
        """
        from nybble.checkpoint.account import inspect
        from nybble.lab.kv_bytes import shape_columns
        from nybble.pipelines.evaluate import run_eval

        made, error = self._quantized(folder)
        size = inspect(made)
        found = run_eval(
            {"model": str(made)}, _judged_on(self.model, self.judged_on, self.judged_len, self.judged_samples),
            metrics=self.metrics, reference=self.model if self.reference else None, device=self.device,
        )  # fmt: skip
        return {
            **found["models"]["model"], "tokens": found["data"].get("predictions"), "error": error,
            "bytes": size["total"], "bits": size["bits_per_weight"], "parameters": size["parameters"],
            "quantized_bits": size["bits_per_quantized_weight"], "quantized_parameters": size["quantized_parameters"],
            **shape_columns(self.model),
        }  # fmt: skip

    def _changes(self) -> dict[str, Any]:
        return {name: value for name in CHANGES if (value := getattr(self, name)) is not None}

    def _quantized(self, folder: Path) -> tuple[str | Path, float | None]:
        """What is judged, and the mean relative output error of its layers, where the recipe measures one."""
        if self.recipe == FLOAT:
            return self.model, None
        from nybble.pipelines.quantize import quantize

        settings = {"samples": self.samples, "seq_len": self.seq_len, "device": self.device, "seed": self.seed}
        changes: Any = {**self._changes(), "effort": self.effort}
        out, report = quantize(
            self.model, self.recipe, self.data, out=folder / "model", settings=settings, form="native", **changes
        )
        errors = [row.error for row in report.layers if row.error is not None]
        return out, sum(errors) / len(errors) if errors else None


@lru_cache(4096)
def _refusal(recipe: str, effort: str, changes: tuple[tuple[str, Any], ...]) -> str:
    """Why a recipe can't be had with changes, or nothing."""
    if recipe == FLOAT:
        names = ", ".join(name for name, _ in changes)
        return f"recipe {FLOAT!r} leaves the model in float, and takes no {names}." if changes else ""
    from nybble.pipelines.request import build_recipe

    try:
        build_recipe(recipe, effort=effort, **dict(changes))
    except UsageError as error:
        return str(error)
    return ""


@lru_cache(2)
def _judged_on(model: str, data: str, length: int, count: int | None) -> Samples:
    """Held-out samples, cut once for all runs of a worker on a model."""
    from nybble.pipelines.evaluate import judged_on

    return judged_on(model, data, seq_len=length, samples=count)


PART = QuantizeAndJudge
