"""Peak memory of ``nybble quantize`` stays below its own estimate (docs/memory.md), in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.memory import SIZES, measure, measure_base, write_llama

# 60 million parameters.
SMALL = SIZES | {
    "vocab_size": 16000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 5,
    "num_attention_heads": 12, "num_key_value_heads": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "model"
    write_llama(folder, SMALL)
    return folder


# Blocks are alike, and so are their peaks: of those that gptq takes long for, two are enough.
TWO = ["--ignore", r"re:model\.layers\.[2-9]\..*"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--recipe", "rtn"], ["--recipe", "gptq", *TWO, "--samples", "8", "--seq-len", "64"]]
)
def test_peak_is_below_the_estimate(model: Path, tmp_path: Path, options: list[str]) -> None:
    found = measure(["quantize", str(model), str(tmp_path / "out"), *options])
    above = found["peak"] - measure_base()
    assert above <= found["estimate"]
    assert found["estimate"] <= 2 * above  # close enough to be of use
