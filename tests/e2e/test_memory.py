"""Peak memory of ``nybble quantize`` stays below its own estimate (docs/memory.md), in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from benchmarks.memory import SIZES, measure, measure_base, write_llama
from tests.tiny import shortened

from nybble.recipe import load_recipe

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

ONE = ["--ignore", r"re:model\.layers\.[1-9]\..*"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--recipe", "rtn"],
        ["--recipe", "gptq", *TWO, "--samples", "8", "--seq-len", "64"],
        ["--recipe", "LEARNED", *ONE, "--samples", "8", "--seq-len", "64"],
    ],
    ids=["rtn", "gptq", "learned"],
)
def test_peak_is_below_the_estimate(model: Path, tmp_path: Path, options: list[str]) -> None:
    recipe = shortened(load_recipe("best-nvfp4"))
    (tmp_path / "learned.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    options = [str(tmp_path / "learned.yaml") if option == "LEARNED" else option for option in options]
    found = measure(["quantize", str(model), str(tmp_path / "out"), *options])
    above = found["peak"] - measure_base()
    assert above <= found["estimate"]
    learned = any("learned" in option for option in options)  # room for every parameter's moments, not always there
    assert found["estimate"] <= (2.5 if learned else 2) * above  # close enough to be of use
