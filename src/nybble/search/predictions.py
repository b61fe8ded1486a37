"""The float model's predictions on the calibration data, and how far those of a changed model are from them."""

from __future__ import annotations

import torch

from nybble.core.errors import DataError
from nybble.search.losses import answer, divergence
from nybble.search.study import Study


class Predictions:
    """Of a study's model as it is now; they are kept in the model's dtype.

    Args:
        study: with batches.

    Raises:
        DataError: there are none.
    """

    def __init__(self, study: Study) -> None:
        if not study.batches:
            raise DataError("this sensitivity compares predictions on data, and there is none.")
        self._study = study
        with torch.no_grad():
            self._float = [answer(study.run(batch)) for batch in study.batches]

    @torch.no_grad()
    def divergence(self) -> float:
        """Mean KL divergence a prediction, in nats, of the model as it is now."""
        total, count = 0.0, 0
        for reference, batch in zip(self._float, self._study.batches, strict=True):
            found, number = divergence(reference, self._study.run(batch), batch.real)
            total, count = total + found, count + number
        return total / max(1, count)
