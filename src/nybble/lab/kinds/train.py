"""``train``: a model is trained in few bits, and judged before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from nybble.core.errors import UsageError
from nybble.core.options import at_least_one
from nybble.lab.kinds import RunKind
from nybble.models.named import check_model
from nybble.recipes.training import check_training_recipe

SIZES = ("steps", "epochs", "batch", "accumulate", "seq_len", "lr", "schedule", "optimizer", "dtype")


@dataclass(frozen=True, kw_only=True)
class TrainAndJudge(RunKind):
    """What ``nybble train`` does, with its options.

    Attributes:
        recipe: a training recipe. model: a float model. data: examples; None: the recipe's own.
        judged_on: held-out examples. scheme, weights, activations, kv: in place of the recipe's.
        options: of the recipe's method. teacher: the float network that losses compare with; None: the model.
        steps ... dtype: in place of the recipe's settings. device: cpu or cuda. seed: of every random choice.
    """

    FILES: ClassVar[tuple[str, ...]] = ("recipe", "model", "data", "judged_on", "scheme", "teacher")

    recipe: str
    model: str
    data: str | None = None
    judged_on: str | None = None
    scheme: str | None = None
    weights: str | None = None
    activations: str | None = None
    kv: str | None = None
    options: Mapping[str, Any] | None = field(default=None, hash=False)
    teacher: str | None = None
    steps: int | None = None
    epochs: int | None = None
    batch: int | None = None
    accumulate: int | None = None
    seq_len: int | None = None
    lr: float | None = None
    schedule: str | None = None
    optimizer: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    seed: int = 0

    def check(self) -> None:
        """Names and sizes; the rest is checked when it runs, before it trains."""
        check_training_recipe(self.recipe)
        check_model(self.model)
        at_least_one(steps=self.steps, epochs=self.epochs, batch=self.batch, accumulate=self.accumulate)
        if self.scheme is not None and (self.weights is not None or self.activations is not None):
            raise UsageError("a scheme says everything; give either it or weights and activations.")

    def run(self, folder: Path) -> Mapping[str, Any]:
        """Metrics after training, those before as ``before_*``, of the float model as ``float_*``; the last loss."""
        from nybble.pipelines.train import train

        settings = {name: value for name in SIZES if (value := getattr(self, name)) is not None}
        found = train(
            self.recipe, self.model, folder / "trained", self.data, scheme=self.scheme, weights=self.weights,
            activations=self.activations, kv=self.kv, options=self.options, teacher=self.teacher,
            judged_on=self.judged_on, settings={**settings, "device": self.device, "seed": self.seed},
        )  # fmt: skip
        models = (found["evaluation"] or {"models": {}})["models"]
        result = {
            (name if model == "after" else f"{model}_{name}"): value
            for model, metrics in models.items() for name, value in metrics.items()
        }  # fmt: skip
        last = found["curve"][-1][1] if found["curve"] else None
        return {**result, "last_loss": last, "updates": found["steps"], "trainable": found["trainable"]}


PART = TrainAndJudge
