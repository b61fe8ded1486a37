"""What mlx and mlx-lm load, from which version, and where that is said; and the families that were tried.

Versions are those whose wheels were run (mlx 0.32.4, mlx-lm 0.32.2); where a release's notes name an earlier one, that.
"""

from __future__ import annotations

from nybble.export import Takes

_DOCS = "https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html"

TAKES: tuple[Takes, ...] = (
    Takes(
        weights="int1 to int8, uint1 to uint8, ternary, binary; symmetric, or with a real offset; group=32, 64 or 128, "
        "or any granularity that these divide",
        inputs="float",
        form="affine",
        runtime="mlx-lm",
        since="",
        source=_DOCS,
        note="7 bits become 8; integer zero points need float32 scales and biases",
    ),
    Takes(weights="mxfp4", inputs="float", form="mxfp4", runtime="mlx-lm", since="", source=_DOCS),
    Takes(weights="mxfp8", inputs="float", form="mxfp8", runtime="mlx-lm", since="", source=_DOCS),
    Takes(
        weights="float4_e2m1fn group=16 scale_format=(float8_e4m3fn scale=one)",
        inputs="float",
        form="nvfp4",
        runtime="mlx-lm",
        since="",
        source=_DOCS,
        note="a scale over the scales of experts alone (nvfp4)",
    ),
)

TRIED = frozenset({"llama"})
"""``model_type`` of families whose folder mlx-lm 0.32.2 ran with nybble's logits."""
