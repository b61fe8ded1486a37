"""A CNN quantized by the recipe hawq-v3, from its folder: judged in integers, with the codes it had in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.parts.data.test_images import grey
from tests.parts.training.test_images_task import RESNET, VIT, model
from typer.testing import CliRunner

import nybble
from nybble.cli import build
from nybble.core.errors import ModelError, NybbleError, UsageError
from nybble.nn.integer.convert import integer_network
from nybble.nn.integer.model import in_integers
from nybble.nn.integer.network import IntegerNetwork
from nybble.pipelines.evaluate import run_eval

PREPARED = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 16, "width": 16},
    "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    images, labels = grey()
    path = tmp_path_factory.mktemp("pictures") / "a.npz"
    np.savez(path, images=images, labels=labels)
    return str(path)


def folder(at: Path, name: str, family: str, config: dict[str, Any]) -> Path:
    model(name, family, config).save_pretrained(at)
    (at / "preprocessor_config.json").write_text(json.dumps(PREPARED))
    return at


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, pictures: str) -> Path:
    room = tmp_path_factory.mktemp("resnet")
    source = folder(room / "float", "ResNetForImageClassification", "resnet", {**RESNET, "image_size": 16})
    nybble.quantize(str(source), "hawq-v3", pictures, out=room / "out")
    return room / "out"


def test_a_folder_has_the_integer_network_that_it_had_in_memory(out: Path, pictures: str) -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    made, _ = nybble.quantize(str(out.with_name("float")), "hawq-v3", pictures)
    nets = [integer_network(found, x) for found in (made, nybble.load(out)[0])]
    codes = [list(net.codes(net.entrance.codes(x))) for net in nets]
    assert len(codes[0]) > 15
    for (name, ours), (_, theirs) in zip(*codes, strict=True):
        assert torch.equal(ours, theirs), name


def test_the_command_judges_in_integers(out: Path, pictures: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = list[torch.dtype]()
    run = IntegerNetwork.run

    def noted(self: IntegerNetwork, q: torch.Tensor) -> torch.Tensor:
        runs.append(q.dtype)
        return run(self, q)

    monkeypatch.setattr(IntegerNetwork, "run", noted)
    told = ["eval", str(out), "--data", pictures, "--reference", str(out.with_name("float")), "--json"]
    plain = CliRunner().invoke(build(), told)
    assert plain.exit_code == 0 and not runs and "integer" not in json.loads(plain.stdout)
    found = CliRunner().invoke(build(), [*told, "--integer"])
    assert found.exit_code == 0, found.output
    assert set(runs) == {torch.int32}
    said = json.loads(found.stdout)
    assert said["integer"] is True and said["metrics"]["agreement"] > 0.8


def test_the_model_is_as_it_was_afterwards(out: Path) -> None:
    made: Any = nybble.load(out)[0]
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(made.dtype)
    with torch.no_grad():
        before = made(pixel_values=x).logits
        with in_integers(made):
            inside = made(pixel_values=x).logits
            with pytest.raises(ModelError, match="called with one tensor"):
                made(pixel_values=x, labels=torch.zeros(2))
        assert torch.equal(made(pixel_values=x).logits, before)
    assert inside.dtype == torch.float32 and not torch.equal(inside, before.float())
    assert (inside - before.float()).norm() < 0.1 * before.float().norm()


def test_what_cant_be_judged_in_integers_says_why(out: Path, pictures: str, tmp_path: Path) -> None:
    source = str(out.with_name("float"))
    with pytest.raises(NybbleError, match=r"without quantized layers|can.t follow"):
        run_eval({"model": source}, pictures, integer=True)
    made = nybble.load(out)[0]
    with pytest.raises(UsageError, match="it can't run in two ways at once"):
        run_eval({"model": made}, pictures, reference=made, integer=True)
    vit = folder(tmp_path / "vit", "ViTForImageClassification", "vit", VIT)
    nybble.quantize(str(vit), "hawq-v3", pictures, out=tmp_path / "out")
    with pytest.raises(NybbleError, match="integers"):
        run_eval({"model": str(tmp_path / "out")}, pictures, integer=True)
