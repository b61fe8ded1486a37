"""ModelOpt's folders with NVFP4 weights alone: what ``modelopt`` writes, and nothing in another format of its."""

from __future__ import annotations

from nybble.export.modelopt import ModelOpt


class ModelOptNvfp4(ModelOpt):
    """Inputs stay in float, or are FP8 with one calibrated scale."""

    summary = "safetensors in ModelOpt's layout, NVFP4 weights"
    algorithms = frozenset({"W4A16_NVFP4", "W4A8_NVFP4_FP8"})
    takes = tuple(row for row in ModelOpt.takes if row.weights == "nvfp4")


PART = ModelOptNvfp4
