"""Recommendations: bytes against real caches and files, the ranking against its definition, and what is refused."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_tiny
from typer.testing import CliRunner

from nybble.checkpoint.account import inspect
from nybble.cli import build
from nybble.core.errors import DataError, ModelError, NybbleError, UsageError
from nybble.kv_format import KVFormat
from nybble.lab.kinds.quantize import QuantizeAndJudge
from nybble.lab.kv_bytes import kv_bytes, shape_of
from nybble.lab.laws.advice import advise
from nybble.lab.laws.training import PUBLISHED
from nybble.lab.recommend import Budget, read_memory, recommend
from nybble.lab.rows import as_csv


def row(model: str, recipe: str, nll: float, megabytes: float, **more: Any) -> dict[str, Any]:
    shape = {"layers": 2, "kv_heads": 2, "head_dim": 64}
    return {"model": model, "recipe": recipe, "nll": nll, "weight_bytes": int(megabytes * 1e6), **shape, **more}


ROWS = [
    row("large", "rtn", 2.0, 40, weights="int4 group=64"),
    row("large", "rtn", 4.0, 30, weights="int2 group=64"),
    row("large", "none", 1.9, 160),
    row("small", "rtn", 2.5, 20, weights="int8 group=64"),
    row("small", "gptq", 2.6, 10, weights="int4 group=64", kv="int8 token"),
]


@pytest.mark.parametrize(
    "line",
    [
        None,
        "int8 token",
        "nvfp4",
        "keys=(int3 group=8) values=(int8 token) residual=5 sink=2",
        "keys=(int2 block=32x1) values=(int4 token)",
    ],
)
def test_a_caches_bytes_are_those_of_a_filled_cache(line: str | None) -> None:
    from transformers import DynamicCache, LlamaConfig

    from nybble.nn.kv_cache import QuantizedCache

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    cache: Any = DynamicCache(config=config) if line is None else QuantizedCache.of(config, KVFormat.parse(line))
    for layer in range(3):
        states = torch.randn(2, 2, 70, 16, dtype=torch.bfloat16)
        cache.update(states, states, layer)
    if line is None:
        stored = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    else:
        stored = cache.nbytes()
    assert kv_bytes(shape_of(config.to_dict(), "m"), 70, 2, line) == stored


def test_a_sliding_window_stores_what_it_sees() -> None:
    from transformers import DynamicCache, MistralConfig

    config = MistralConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1,
                           sliding_window=16)  # fmt: skip
    cache: Any = DynamicCache(config=config)
    states = torch.randn(1, 2, 40, 16, dtype=torch.bfloat16)
    cache.update(states, states, 0)
    assert kv_bytes(shape_of(config.to_dict(), "m"), 40, 1) == 2 * cache.layers[0].keys.nbytes


def test_weights_are_what_inspect_counts(tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "tiny"))
    run = QuantizeAndJudge(model=model, weights="int4 group=16", judged_samples=2, judged_len=16, metrics=("nll",))
    result = run.run(tmp_path)
    (found,) = recommend([{"model": model, "recipe": "rtn", **result}], Budget(memory=10**9, context=8))
    size = inspect(tmp_path / "model")
    files = {name: size["bytes"].get(name, 0) for name in ("headers", "config", "tokenizer", "report")}
    assert found.weights == size["total"] - sum(files.values())
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert found.cache == kv_bytes(shape_of(config, "tiny"), 8, 1)


def test_what_fits_is_ranked_and_its_command_makes_it() -> None:
    cache = 2 * 2 * 2 * 64 * 1000 * 2  # sides, layers, heads, width, tokens, bytes
    found = recommend(ROWS, Budget(memory=40_000_000 + cache, context=1000))
    assert [(each.options["model"], each.quality) for each in found] == [
        ("large", 2.0), ("small", 2.5), ("small", 2.6), ("large", 4.0)
    ]  # fmt: skip
    assert found[0].total == 40_000_000 + cache and found[2].cache < 0.6 * cache
    assert shlex.split(found[2].command)[2:] == [
        "small", "OUT", "--recipe", "gptq", "--weights", "int4 group=64", "--kv", "int8 token"
    ]  # fmt: skip
    assert len(recommend(ROWS, Budget(memory=39_999_999 + cache, context=1000))) == 3
    assert recommend(ROWS, Budget(memory=10**9, context=1), high=True)[0].quality == 4.0


def test_how_sure_a_ranking_is() -> None:
    texts = [
        {**each, "nll": each["nll"] + more, "judged_on": text} for each in ROWS for text, more in (("a", 0), ("b", 2))
    ]
    with pytest.raises(UsageError, match=r"judged on different data \(judged_on: a, b\).*--paired judged_on"):
        recommend(texts, Budget(memory=10**9, context=1))
    best, *_, last = recommend(texts[:-1], Budget(memory=10**9, context=1), paired="judged_on")
    assert best.sure == 1 and best.options["recipe"] == "none" and best.low < best.quality < best.high
    assert last.options["weights"] == "int2 group=64" and last.sure == 0
    assert "gptq" not in {each.options["recipe"] for each in (best, last)}


def test_a_command_says_how_it_was_calibrated() -> None:
    often = {"weights": "int4", "data": "my.txt", "seq_len": 512}
    rows = [row("m", "gptq", nll, 9, samples=count, **often) for nll, count in ((2.0, 16), (2.2, 16), (1.0, None))]
    usual, few = recommend(rows, Budget(memory=10**9, context=1))
    assert few.quality == 2.1 and few.command.endswith("--weights int4 --samples 16 --data my.txt")
    assert usual.quality == 1.0 and usual.command.endswith("--weights int4 --data my.txt")
    (mixed,) = recommend([rows[0], {**rows[1], "data": "builtin"}], Budget(memory=10**9, context=1))
    assert mixed.quality == 2.1 and "--data" not in mixed.command


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"weight_bytes": float("nan")}, "large: neither bits and parameters nor weight_bytes"),
        ({"weight_bytes": -5}, "large: neither bits and parameters nor weight_bytes"),
        ({"model": None}, "row 1 names no model"),
        ({"layers": 0}, "layers, kv_heads and head_dim are whole numbers above 0"),
        ({"model": "none/at/all", **dict.fromkeys(("layers", "kv_heads", "head_dim"))}, "in columns layers, kv_heads"),
    ],
)
def test_what_has_no_size_is_refused(change: dict[str, Any], word: str) -> None:
    with pytest.raises(NybbleError, match=word):
        recommend([{**ROWS[0], **change}], Budget(memory=10**9, context=1))


def test_an_impossible_budget_says_the_least() -> None:
    with pytest.raises(DataError, match=r"The least is 10,0\d\d,\d\d\d: 10,000,000 of weights.*--recipe gptq"):
        recommend(ROWS, Budget(memory=10**6, context=100))


@pytest.mark.parametrize(("text", "size"), [("8GB", 8 * 10**9), ("6 GiB", 6 * 2**30), ("1.5MB", 1500000), ("77", 77)])
def test_sizes_of_memory(text: str, size: int) -> None:
    assert read_memory(text) == size
    for wrong in ("", "GB", "8 horses", "-1GB", "nanGB"):
        with pytest.raises(UsageError, match="memory is"):
            read_memory(wrong)


def test_a_cache_of_something_else_is_refused() -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8}
    for change, word in (
        ({"kv_lora_rank": 4}, "holds latents"),
        ({"layer_types": ["linear_attention"] * 2}, "layers of linear_attention"),
        ({"hidden_size": None}, "doesn't say layers"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=word):
            shape_of({**config, **change}, "m")


def test_a_training_gets_a_format_and_a_warning() -> None:
    found = advise(1e9, 1e12, None)
    assert [row["format"] for row in found["formats"][:4]] == ["E4M3"] * 4 and found["formats"][0]["block"] == 32
    assert any(line.startswith("E2M1 in blocks of 128: past 3.93e+11 tokens") for line in found["warnings"])
    assert any(line.startswith("E2M1 with a scale a channel: past") for line in found["warnings"])
    assert found["bits"] == PUBLISHED.bits_for_data(1e12) and found["chosen"]["bits"] == 6
    free = advise(None, None, 1e23)
    assert advise(free["N"], None, 1e23)["D"] == pytest.approx(free["D"])
    assert advise(None, free["D"], 1e23)["N"] == pytest.approx(free["N"])
    for sizes, word in (((1e9, None, None), "needs --parameters"), ((1e9, 1e9, 1e9), "one too many"),
                        ((-1, 1e9, None), "above 0")):  # fmt: skip
        with pytest.raises(NybbleError, match=re.escape(word)):
            advise(*sizes)


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(as_csv(ROWS, list(dict.fromkeys(name for each in ROWS for name in each))))
    line = ["recommend", str(path), "--memory", "100MB", "--context", "64"]
    done = CliRunner().invoke(build(), [*line, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (
        found["fit"] == 4 and found["candidates"][0]["cache_bytes"] == 65536 and found["candidates"][0]["sure"] is None
    )
    path.write_text(path.read_text().replace("nll", "ppl", 1))
    found = json.loads(CliRunner().invoke(build(), [*line, "--json"]).stdout)
    assert found["candidates"][0]["quality"] == math.log(2.0)
    shown = CliRunner().invoke(build(), line)
    assert shown.stdout.strip().endswith("nybble quantize large OUT --recipe rtn --weights 'int4 group=64'")
    twin = CliRunner().invoke(build(), ["recommend", "--parameters", "1e9", "--tokens", "1e12", "--json"])
    assert json.loads(twin.stdout)["chosen"]["format"] == "E3M2"
    twin = CliRunner().invoke(build(), ["recommend", "--parameters", "1e9", "--tokens", "1e12"])
    assert twin.stdout.strip().endswith("E3M2 in blocks of 32")
    for wrong, word in ((line[:2], "give measured runs and --memory"), ([*line, "--tokens", "1"], "Ask apart")):
        done = CliRunner().invoke(build(), wrong)
        assert done.exit_code == 2 and word in done.stderr.replace("\n", " ")
