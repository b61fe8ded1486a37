"""``nybble bench`` times what it says, and refuses what can't be timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parts.export.folders import model
from tests.tiny import logits, save_tiny
from typer.testing import CliRunner

import nybble
from nybble.cli import build
from nybble.core.errors import ModelError, UsageError
from nybble.nn.kinds import quant_modules
from nybble.pipelines.bench import bench, unpacked
from nybble.pipelines.export import export
from nybble.pipelines.load import load_with_origin


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    place = str(save_tiny(folder / "float", hidden_size=128, intermediate_size=320))
    nybble.quantize(place, "rtn", weights="int4 group=32", activations="int8 token", out=folder / "out")
    return folder / "out"


def test_rows_ratios_and_kernels(out: Path) -> None:
    found = bench(str(out), batches=(1, 3), prompt=16, tokens=2, rounds=2)
    assert [row["name"] for row in found["rows"]] == ["packed", "bfloat16", "float32"]
    packed, half, single = (row["bytes"] for row in found["rows"])
    assert packed < half < single < 2.1 * half
    assert all(rate > 0 for row in found["rows"] for rate in (row["read"], *row["write"].values()))
    assert set(found["ratios"]) == {"read", "1", "3"} and set(found["rows"][0]["write"]) == {"1", "3"}
    assert sum(row["weights"] for row in found["kernels"]) == 14
    large = [row for row in found["kernels"] if row["kernel"]]
    assert sum(row["weights"] for row in large) == 6  # 320 x 128 of both blocks; the rest is small
    assert all("elements" in row["reason"] for row in found["kernels"] if not row["kernel"])


@pytest.mark.parametrize("what", ["prompt", "tokens"])
def test_more_tokens_than_positions(what: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is unpacked or timed."""
    monkeypatch.setattr("nybble.pipelines.bench.unpacked", lambda _: pytest.fail("was unpacked"))
    most = load_with_origin(out)[0].config.max_position_embeddings
    given = {"prompt": 8, "tokens": 1} | {what: most + 1}
    with pytest.raises(UsageError, match=f"{what}.* is {most + 1 + 32 * (what == 'tokens')}, and .* {most} positions"):
        bench(str(out), **given)


def test_the_unpacked_model_is_a_float_one(out: Path) -> None:
    own = load_with_origin(out)[0]
    dense = unpacked(load_with_origin(out)[0])
    layer = dense.get_submodule("model.layers.0.mlp.up_proj")
    packed: Any = own.get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(4, 128).bfloat16()
    assert torch.equal(layer(x), x @ packed.weight(torch.bfloat16).T) and not torch.equal(layer(x), packed(x))


def test_the_command(out: Path, tmp_path: Path) -> None:
    options = ["--prompt", "8", "--tokens", "1", "--rounds", "1", "--batch", "2"]
    done = CliRunner().invoke(build(), ["bench", str(out), *options, "--out", str(tmp_path / "b.json")])
    assert done.exit_code == 0 and "packed / fastest unpacked" in done.stdout and "int4" in done.stdout
    assert list(json.loads((tmp_path / "b.json").read_text())["rows"][0]["write"]) == ["2"]
    with pytest.MonkeyPatch.context() as patch:  # said before anything is timed
        patch.setattr("nybble.pipelines.bench.bench", lambda *_, **__: pytest.fail("was timed"))
        for place, said in ((tmp_path / "no" / "b.json", "there is no folder"), (tmp_path, "is a folder")):
            done = CliRunner().invoke(build(), ["bench", str(out), "--out", str(place)])
            assert done.exit_code == 1 and said in done.stderr.replace("\n", " ")


def test_a_float_model_has_no_kernels(out: Path) -> None:
    done = CliRunner().invoke(build(), ["inspect", "--kernels", str(out.with_name("float"))])
    assert done.exit_code == 0 and "no packed weights" in done.stdout and "multiplied with" not in done.stdout


def test_a_gguf_file_is_timed_as_it_is_packed(out: Path, tmp_path: Path) -> None:
    """Embedding and head too; and what is timed computes as the float model that the file stands for."""
    nybble.quantize(str(out.parent / "float"), "rtn", weights="q8_0", embeddings="q8_0", out=tmp_path / "q")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "q" / name).unlink()  # of words, which a GGUF has no rules for
    export(tmp_path / "q", tmp_path / "d", "gguf")
    (file,) = (tmp_path / "d").glob("*.gguf")
    found = bench(file, batches=(1,), prompt=8, tokens=1, rounds=1)
    assert sum(row["weights"] for row in found["kernels"]) == 16 and "int8" in found["kernels"][0]["format"]
    packed, half, _ = (row["bytes"] for row in found["rows"])
    assert packed < 0.6 * half
    ours, theirs = load_with_origin(file, packed=True, dense=True)[0], load_with_origin(file)[0]
    assert torch.equal(logits(ours), logits(theirs)) and not list(quant_modules(theirs))


def test_what_cannot_be_timed(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no packed weights"):
        bench(str(save_tiny(tmp_path / "float")))
    with pytest.raises(ModelError, match="a model that writes text"):
        bench(str(model("bert")))
    with pytest.raises(UsageError, match="tokens is a whole number"):
        bench(str(out), tokens=0)
