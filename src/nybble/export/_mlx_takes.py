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
        note="a scale over these scales experts alone have (nvfp4), and mlx runs that on GPUs alone",
    ),
)

TRIED = frozenset([
    "cohere", "ernie4_5", "gemma", "gemma2", "gemma3_text", "glm4", "granite", "helium", "hunyuan_v1_dense", "llama",
    "mistral", "mixtral", "nemotron", "olmo2", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "seed_oss", "smollm3", "stablelm", "starcoder2",
])  # fmt: skip
"""``model_type`` of families whose folder mlx-lm 0.32.2 ran with nybble's logits."""

WINDOWLESS = frozenset({"gemma2", "mistral"})
"""Those of them that attend to all tokens in mlx-lm 0.32.2, whatever sliding window config.json asks for."""
