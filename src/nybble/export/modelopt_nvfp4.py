"""ModelOpt's folders with weights in NVFP4: what ``modelopt`` writes, and nothing in another format of its."""

from __future__ import annotations

from nybble.export.modelopt import ModelOpt


class ModelOptNvfp4(ModelOpt):
    """Inputs are NVFP4 or FP8 under one calibrated number, or stay in float."""

    summary = "safetensors in ModelOpt's layout, NVFP4 weights"
    algorithms = frozenset({"NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8"})
    takes = tuple(row for row in ModelOpt.takes if row.weights == "nvfp4")


PART = ModelOptNvfp4
