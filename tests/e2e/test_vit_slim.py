"""``nybble search --method vit-slim``: a smaller ViT that every command takes, within its budget to the unit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.test_train import _Stops
from tests.parts.data.test_labelled_images import NAMES, pictures
from tests.parts.training.test_images_task import VIT, model

import nybble
from nybble.cli import main
from nybble.core.errors import ModelError, SchemeError, UsageError
from nybble.nn.attention import MatmulQuantizers
from nybble.nn.packed import Packed
from nybble.pipelines.evaluate import run_eval
from nybble.pipelines.quantize import quantize
from nybble.pipelines.search_architecture import ArchitectureSettings, search_architecture
from nybble.pipelines.train import train

pytest.importorskip("nybble.training.loop", reason="needs accelerate, which nybble's extra 'train' brings")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
QUICK = {"search.steps": 2, "retrain.steps": 2, "search.batch": 4, "retrain.batch": 4, "points": 2}
PREPARED = {"size": {"height": 16, "width": 16}, "image_mean": [0.6], "image_std": [0.3]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slim")
    pictures(folder / "images", NAMES)
    for name, family in (("ViT", "vit"), ("DeiT", "deit")):
        made = model(f"{name}ForImageClassification", family, VIT, patch_size=4)
        made.save_pretrained(folder / family)
        (folder / family / "preprocessor_config.json").write_text(json.dumps(PREPARED))
    return folder


def run(place: Path, out: Path, options: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    images = str(place / "images")
    asked = {"budget": "parameters=0.7", "method": "vit-slim", "data": images, "judged_on": images, **more}
    return search_architecture(place / asked.pop("model", "vit"), out, options={**QUICK, **(options or {})}, **asked)


def test_what_is_found_is_quantized_trained_and_judged_as_any(place: Path, tmp_path: Path) -> None:
    """All three dimensions; killed in retraining and gone on with, the bytes are the same."""
    options = {"tokens": 1e-2, "losses": {"task": 1, "logits": 1}}
    found = run(place, tmp_path / "a", options, budget="flops=0.6")
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "b", options, budget="flops=0.6", progress=_Stops(4))
    run(place, tmp_path / "b", options, budget="flops=0.6", settings=ArchitectureSettings(resume=True))
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.name != "times.json"} for n in "ab"]
    assert files[0] == files[1]
    made, _ = nybble.load(tmp_path / "a", dtype=torch.float32)
    assert type(made).__name__ == "SlimViTForImageClassification"
    assert sum(p.numel() for p in made.parameters()) == found["compared"][-1]["parameters"]
    assert 0.5 * found["full"] < found["cost"] <= found["limit"] < found["full"]
    patches = found["encoding"]["patches"]
    assert patches == sorted(patches, reverse=True) and 0 < patches[0] <= 16
    images = str(place / "images")
    assert run_eval({"it": str(tmp_path / "a")}, images)["models"]["it"] == {"top1": found["measures"]["accuracy"]}
    quantize(tmp_path / "a", "rtn", out=tmp_path / "q", weights="int4 channel")
    packed = {name for name, module in nybble.load(tmp_path / "q")[0].named_modules() if isinstance(module, Packed)}
    assert {f"vit.layers.1.{name}.weight" for name in ("attention.q_proj", "attention.o_proj", "mlp.fc2")} <= packed
    settings = {"steps": 1, "batch": 2, "accumulate": 1, "dtype": "float32"}
    options = {"query_key": False}  # whose one weight is of heads that are all alike
    train("ofq", tmp_path / "a", tmp_path / "t", images, options=options, settings=settings)
    rounded = [m for m in nybble.load(tmp_path / "t")[0].modules() if isinstance(m, MatmulQuantizers)]
    assert len(rounded) == 2 and list(run_eval({"it": str(tmp_path / "t")}, images)["models"]["it"]) == ["top1"]


@pytest.mark.parametrize(
    ("budget", "options"),
    [
        ("parameters=0.8", {"heads": "head", "mlp": 0.0}), ("units=0.5", {"scores": "random"}),
        ("flops=0.5", {"scores": "magnitude", "tokens": 1e-4, "removed": "zero"}),
        ("parameters=3000", {"scores": "magnitude", "heads": "layer"}),
        ("flops=0.8", {"attention": 0.0, "mlp": 0.0, "tokens": 1e-3, "tokens_share": None}),
    ],
)  # fmt: skip
def test_budgets_are_met(place: Path, tmp_path: Path, budget: str, options: dict[str, Any]) -> None:
    found = run(place, tmp_path / "a", options, budget=budget)
    sizes, units = found["encoding"]["head features"], found["encoding"]["MLP units"]
    assert 0 < found["cost"] <= found["limit"]
    assert all(sum(layer) for layer in sizes) and all(units)
    if options.get("heads") == "head":
        assert {size for layer in sizes for size in layer} == {0, 8} and units == [24, 24]
    if options.get("heads") == "layer":
        assert all(len({*layer}) == 1 for layer in sizes)
    if options.get("removed"):
        assert found["compared"][1]["network"] == "found, tokens times zero"
    if options.get("scores") == "magnitude":
        assert len({*units}) == 1  # the same share of each layer


def test_a_larger_penalty_leaves_smaller_masks(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a kind without a penalty has no mask."""
    from nybble.search.slimming.masks import Masks

    means, fixed = list[float](), Masks.scores

    def seen(self: Masks, kind: str) -> list[torch.Tensor]:
        assert kind == "mlp" and list(self.by_kind) == ["mlp"]
        scores = fixed(self, kind)
        means.append(float(torch.cat(scores).mean()))
        return scores

    monkeypatch.setattr(Masks, "scores", seen)
    for number, weight in enumerate((1e-6, 1e-2, 1.0)):
        run(
            place,
            tmp_path / str(number),
            {"attention": 0.0, "mlp": weight, "search.steps": 8, "search.lr": 0.01},
            budget="units=0.9",
        )
    assert means[0] > means[1] > means[2]


def test_bad_requests_leave_nothing(place: Path, tmp_path: Path) -> None:
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"budget": "parameters=0.01"}, UsageError, r"infeasible in this space; the least is [\d,]+, 0\.\d+"),
        ({"budget": "flops=100"}, UsageError, "infeasible"),
        ({"budget": "units=0.5", "options": {"least": 20}}, UsageError, "the least is 72, 0.900"),
        ({"budget": "units=0.19", "options": {"heads": "head"}}, UsageError, "the least is 18, 0.225"),
        ({"budget": "units=0.06", "options": {"heads": "layer"}}, UsageError, "the least is 6, 0.075"),
        ({"budget": "units=2"}, UsageError, "a share up to 1"),
        ({"budget": "bits=4"}, UsageError, "parameters or flops or units=NUMBER"),
        ({"model": "deit"}, ModelError, "is a DeiTForImageClassification; ViT-Slim searches in ViT"),
        ({"options": {"mlp": -1}}, SchemeError, "mlp=-1 is the weight of a penalty"),
        ({"options": {"mlp": 0, "attention": 0}}, SchemeError, "leaves nothing to search"),
        ({"options": {"tokens_share": 1.5}}, SchemeError, "tokens_share=1.5"),
        ({"options": {"retrain.stpes": 1}}, SchemeError, "retrain.steps"),
        ({"options": {"losses": {"task": 0}}}, SchemeError, "nothing is left to learn from"),
        ({"data": None}, UsageError, "give --data SRC"),
    ]  # fmt: skip
    for changes, error, message in bad:
        with pytest.raises(error, match=message):
            run(place, tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())


def test_the_command(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options that say nothing to a method are refused, of both kinds."""
    images = str(place / "images")
    words = ["nybble", "search", str(place / "vit"), str(tmp_path / "o"), "--budget", "units=0.5"]
    more = ["--data", images, *(word for key, value in QUICK.items() for word in ("--set", f"{key}={value}"))]
    for given, code in (
        ([*words, "--method", "vit-slim", *more], 0),
        ([*words, "--method", "vit-slim", *more, "--menu", "int4"], 2),
        ([*words[:-1], "bits=3", "--method", "fisher", "--eval", images], 2),
    ):
        monkeypatch.setattr("sys.argv", given)
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        assert (ended.value.code or 0) == code, shown.err
        if code == 0:
            assert "quantize, eval, train and export take" in shown.out
            (tmp_path / "o").rename(tmp_path / "done")
        else:
            assert "says nothing to it, leave it out" in shown.err or "say nothing to it, leave them out" in shown.err
