"""Denoisers: how far the noise that they see is from what the float model sees, on the same latents."""

from __future__ import annotations

import torch

from nybble.core.progress import Progress
from nybble.data.kinds import data_kind
from nybble.eval.judges import Judge, Panel, Verdict

BATCH = 16
METRICS = ("noise_mse", "noise_sqnr")


class LatentsJudge(Judge):
    """``noise_mse``: mean squared error of what is told; ``noise_sqnr``: the float model's power over it, in dB."""

    @property
    def metrics(self) -> tuple[str, ...]:  # noqa: D102
        return METRICS

    @property
    def comparing(self) -> tuple[str, ...]:  # noqa: D102
        return METRICS

    def judge(self, panel: Panel, progress: Progress) -> Verdict:
        """Run every model on the panel's latents beside the reference."""
        assert panel.reference is not None  # both metrics compare
        kind, inputs = data_kind("latents"), panel.samples.inputs
        count = len(inputs["latents"])
        found: dict[str, dict[str, float]] = {}
        for name, model in panel.models.items():
            error, power, numbers = 0.0, 0.0, 0
            device = next(model.parameters()).device
            other = next(panel.reference.parameters()).device
            for first in range(0, count, BATCH):
                stop = min(count, first + BATCH)
                with torch.no_grad():
                    told = model(**kind.batch(inputs, first, stop, device).inputs).logits.double().cpu()
                    wanted = panel.reference(**kind.batch(inputs, first, stop, other).inputs).logits.double().cpu()
                error += float((told - wanted).square().sum())
                power += float(wanted.square().sum())
                numbers += wanted.numel()
            sqnr = float("inf") if error == 0 else 10 * float(torch.tensor(power / error).log10())
            known = {"noise_mse": error / numbers, "noise_sqnr": sqnr}
            found[name] = {metric: known[metric] for metric in panel.metrics}
        return Verdict(metrics=found, counts={"samples": count})


PART = LatentsJudge()
