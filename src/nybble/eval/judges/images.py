"""What quantization did to an image classifier: top-1 against labels, and agreement with the float model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError, UsageError
from nybble.core.progress import Progress, task
from nybble.data.images import ImageSamples
from nybble.data.kinds.images import PART as IMAGES
from nybble.eval.judges import Judge, Panel, Verdict
from nybble.nn.config import config_of


@torch.no_grad()
def classify(model: nn.Module, pixel_values: Tensor, batch_size: int = 64) -> Tensor:
    """The likeliest class of each image, int64 [images].

    Args:
        model: gives ``logits`` [images, classes]; a plain network gives them bare.
        pixel_values: float [images, channels, height, width], as the model wants them; a plain network any.
        batch_size: images a forward takes.

    Raises:
        ModelError: no logits, or NaN in them.
    """
    first = next(iter(model.parameters()))
    found = []
    for start in range(0, len(pixel_values), batch_size):
        batch = IMAGES.batch({"pixel_values": pixel_values}, start, start + batch_size, first.device)
        given = batch.inputs["pixel_values"].to(first.dtype)
        output = model(given) if config_of(model) is None else model(pixel_values=given)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None:
            raise ModelError(f"{type(model).__name__} gives no logits, so it has no top-1.")
        if not bool(torch.isfinite(logits).all()):
            raise ModelError("the logits hold NaN or infinity. Look for NaN weights, or try another dtype.")
        found.append(logits.float().argmax(-1).cpu())
    return torch.cat(found)


def classification(classes: Tensor, reference: Tensor | None, labels: Tensor | None) -> dict[str, float]:
    """``top1`` where there are labels, ``agreement`` with the reference's classes where there is one; shares of one."""
    found = {}
    if labels is not None:
        found["top1"] = float((classes == labels).double().mean())
    if reference is not None:
        found["agreement"] = float((classes == reference).double().mean())
    return found


class Images(Judge):
    """Of classifiers: by their likeliest class."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The first needs labels, the second a float model."""
        return ("top1", "agreement")

    @property
    def comparing(self) -> tuple[str, ...]:
        """The second."""
        return ("agreement",)

    def judge(self, panel: Panel, progress: Progress) -> Verdict:
        """Classify with the float model, then with each of the others; what the data doesn't allow is left out."""
        samples = panel.samples
        labels = samples.labels if isinstance(samples, ImageSamples) else None
        pixels, found = next(iter(samples.inputs.values())), {}
        with task(progress, len(panel.models) + (panel.reference is not None), "evaluate") as bar:
            exact = None
            if panel.reference is not None:
                exact = classify(panel.reference, pixels)
                bar.advance()
            for name, model in panel.models.items():
                every = classification(classify(model, pixels), exact, labels)
                found[name] = {metric: value for metric, value in every.items() if metric in panel.metrics}
                bar.advance()
        if not all(found.values()):
            raise UsageError(
                f"{samples.source} has no labels, and no float model to agree with was given as the reference."
            )
        return Verdict(metrics=found)


PART = Images()
