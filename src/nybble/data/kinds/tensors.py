"""Whatever a plain network is called with: tensors of the caller's own, of any shape behind their samples."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, ClassVar

from nybble.core.errors import UsageError
from nybble.data.given import GivenSamples
from nybble.data.kinds import DataKind
from nybble.data.samples import Origin, Samples, Wanted


class Tensors(DataKind):
    """The network's first input, or its inputs by name."""

    asks: ClassVar[bool] = False

    def prepare(self, src: str, origin: Origin, wanted: Wanted) -> Samples:
        """Refuse every SRC: no config says what the network takes."""
        raise UsageError(
            "a plain network is given tensors, as it is called with them, samples in front: "
            "data=torch.Tensor, a mapping of its inputs by name, or a list of either. "
            f"{'No file' if src == 'builtin' else repr(src)} says what it takes."
        )

    def fitted(self, samples: Samples, model: Any) -> Samples:
        """With the network's first argument in front, whatever their order was."""
        network = getattr(model, "network", model)  # one of ours is a model already, and wrapped in none
        main = next(iter(inspect.signature(network.forward).parameters), "")
        if not isinstance(samples, GivenSamples) or main not in samples.inputs:
            return samples
        return replace(samples, inputs={main: samples.inputs[main], **samples.inputs})


PART = Tensors()
