"""Mixture-of-Supernets as `nybble search` runs it: an ordinary model folder, the same bytes behind a kill, bits too."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.e2e.test_train import _Stops
from tests.parts.training.test_masked_language import masking_tokenizer
from tests.parts.training.test_text_tasks import BART, BERT, model, sentences
from tests.tiny import WORDS, framed_tokenizer

from nybble.core.errors import GranularityError, ModelError, UsageError
from nybble.core.progress import Silent
from nybble.data.pairs import IGNORED
from nybble.models.own.bottleneck import of_bert
from nybble.pipelines.load import load, load_with_origin
from nybble.pipelines.quantize import quantize
from nybble.pipelines.search_architecture import ArchitectureSettings, search_architecture
from nybble.search.architectures.mos import loss_of
from nybble.training.tasks import task_of

pytest.importorskip("nybble.training.loop", reason="needs accelerate, which nybble's extra 'train' brings")
pytest.importorskip("sacrebleu", reason="the judge: pip install sacrebleu")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
OPTIONS: dict[str, Any] = {
    "space": {"d_model": [16, 32], "encoder_ffn_dim": [16, 32, 48], "decoder_layers": [1, 2]}, "training.steps": 3,
    "training.batch": 4, "training.save_every": 1, "hidden": 8, "scored": 6,
    "evolution": {"population": 6, "parents": 2, "mutations": 3, "crossovers": 3, "generations": 2, "tries": 50},
}  # fmt: skip


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """A BART of two decoder layers, and pairs."""
    folder = tmp_path / "model"
    model("BartForConditionalGeneration", "bart", BART, decoder_layers=2).save_pretrained(folder)
    framed_tokenizer().save_pretrained(folder)
    words = WORDS[3:]
    rows = [{"source": " ".join(words[i : i + 4]), "target": " ".join(words[i + 1 : i + 4])} for i in range(12)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": folder, "data": str(data), "judged_on": str(data), "method": "mos", "budget": "parameters=0.8",
            "options": OPTIONS, "settings": ArchitectureSettings(seq_len=16)}  # fmt: skip


def judged(folder: Path, data: str) -> dict[str, float]:
    """What the task measures of a folder."""
    made, origin = load_with_origin(folder, dtype="float32")
    task = task_of(made, "it")
    return task.measure(made, origin, task.load(data, origin, made, 16, "evaluation").rows, 64, Silent())


def test_what_is_found_is_an_ordinary_translator(given: dict[str, Any], tmp_path: Path) -> None:
    """Within the budget, in transformers' own class, judged as nybble eval judges it; a kill changes nothing."""
    whole = search_architecture(out=tmp_path / "a", **given)
    limit = int(0.8 * whole["full"])
    found: Any = load(tmp_path / "a")[0]
    assert type(found).__name__ == "BartForConditionalGeneration" and whole["cost"] <= limit == whole["limit"]
    assert sum(p.numel() for p in found.parameters()) == whole["cost"]
    assert {key: getattr(found.config, key) for key in OPTIONS["space"]} == whole["encoding"]
    assert judged(tmp_path / "a", given["data"]) == whole["measures"]
    rows = {row["architecture"]: row for row in whole["compared"]}
    assert rows["found"]["held-out loss"] == min(p["score"] for p in whole["front"]) and "largest" in rows
    assert rows["found"]["held-out loss"] == pytest.approx(whole["measures"]["nll"], rel=0.5)
    parts = {row["part"]: row["bytes"] for row in whole["parts"]}
    router = sum(5 * 0 + 3 * 8 + 8 + 8 * (2 * n) + 2 * n for n in (48, 32) + (48, 32) * 2)
    assert parts["training: routers"] == 4 * router and parts["deployed, in float32"] == 4 * whole["cost"]
    trained = sum(parts[f"training: {name}"] for name in ("shared weights", "further experts", "routers"))
    assert 2 * trained <= parts["training: optimizer states"] <= 2 * trained + 8 * 200
    torch.manual_seed(99)
    with pytest.raises(KeyboardInterrupt):
        search_architecture(out=tmp_path / "b", progress=_Stops(3), **given)
    given["settings"] = ArchitectureSettings(seq_len=16, resume=True)
    search_architecture(out=tmp_path / "b", **given)
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.name != "times.json"} for n in "ab"]
    assert files[0] == files[1]


def test_bits_join_the_search_and_quantize_makes_what_was_scored(given: dict[str, Any], tmp_path: Path) -> None:
    """OUT/scheme.yaml on the found float model gives the weights that evolution scored, bit for bit."""
    options = {**OPTIONS, "space": {"encoder_ffn_dim": [16, 48]}, "formats": ["int8 channel", "int4 channel"],
               "experts": 3, "router": "layer", "further": {"steps": 1, "batch": 4}}  # fmt: skip
    whole = search_architecture(out=tmp_path / "a", **{**given, "options": options, "budget": "latency=1e8"})
    assert whole["encoding"]["weights"] == "int8 channel" and whole["unit"] == "µs a forward" and whole["cost"] >= 1
    assert "further" in whole["seconds"]
    options = {**options, "formats": ["int4 channel"], "further": None}
    whole = search_architecture(out=tmp_path / "b", **{**given, "options": options, "budget": "parameters=1"})
    assert whole["measures"]["nll in int4 channel"] != whole["measures"]["nll"]
    quantize(
        tmp_path / "b",
        "rtn",
        out=tmp_path / "q",
        scheme=str(tmp_path / "b" / "scheme.yaml"),
        settings={"dtype": "float32"},
    )
    found = judged(tmp_path / "q", given["data"])
    assert found == {name: pytest.approx(whole["measures"][f"{name} in int4 channel"], rel=1e-6) for name in found}
    float_names = {name for name in load_file(tmp_path / "b" / "model.safetensors") if ".fc1.weight" in name}
    assert float_names and not float_names & load_file(tmp_path / "q" / "model.safetensors").keys()


def test_one_expert_has_no_router_and_its_weights_are_slices(given: dict[str, Any], tmp_path: Path) -> None:
    options = {**OPTIONS, "experts": 1, "space": {"encoder_ffn_dim": [16, 48]}}
    whole = search_architecture(out=tmp_path / "a", **{**given, "options": options, "budget": "parameters=1"})
    parts = {row["part"]: row["bytes"] for row in whole["parts"]}
    assert parts["training: routers"] == parts["training: further experts"] == 0
    assert whole["encoding"]["encoder_ffn_dim"] in (16, 48) and torch.isfinite(torch.tensor(whole["measures"]["nll"]))


def test_bad_requests_leave_nothing(given: dict[str, Any], tmp_path: Path) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"options": {}}, r"its space names none; --set 'space=.*encoder_ffn_dim"),
        ({"budget": "parameters=0.01"}, r"infeasible in this space; the least is"),
        ({"options": {**OPTIONS, "space": {"d_model": [16, 64]}}}, "between 1 and the model's 32"),
        ({"options": {**OPTIONS, "experts": 0}}, "experts is 0"),
        ({"options": {**OPTIONS, "evolution": {"population": 4, "parents": 5}}}, "population of 4"),
        ({"judged_on": None}, "give --data and --eval"),
        ({"budget": "latency=2"}, r"2 µs a forward \(latency=2\) is infeasible in this space; the least is"),
        ({"settings": ArchitectureSettings()}, "positions for 24 tokens"),
    ]
    for changes, message in bad:
        with pytest.raises(UsageError, match=message):
            search_architecture(out=tmp_path / "out", **{**given, **changes})
    for options, error, message in (
        ({"space": {"d_model": [16, 30, 32]}}, ModelError, "embed_dim must be divisible by num_heads"),
        (
            {"space": {"encoder_ffn_dim": [16, 24, 48]}, "formats": ["int8 channel", "int4 group=16"]},
            GranularityError, r"fc2 of \{'encoder_ffn_dim': 24.*in 'int4 group=16': 24 columns",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            asked = {**given, "options": {**OPTIONS, **options}, "budget": "parameters=1"}
            search_architecture(out=tmp_path / "out", **asked)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "pairs.jsonl"]


def test_an_encoder_with_widths_of_its_own(tmp_path: Path) -> None:
    """BERT as a network of bottlenecks, told masked tokens; each layer's width is a gene."""
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    of_bert(model("BertForMaskedLM", "bert", BERT)).save_pretrained(folder)
    masking_tokenizer().save_pretrained(folder)
    text.write_text("\n".join(sentences(24)))
    options = {**OPTIONS, "space": {"widths": [8, 16, 32]}, "training.lr": 0.01}
    whole = search_architecture(
        folder, tmp_path / "a", budget="parameters=0.7", method="mos", data=str(text), judged_on=str(text),
        options=options, settings=ArchitectureSettings(seq_len=16),
    )  # fmt: skip
    found: Any = load(tmp_path / "a")[0]
    assert type(found).__name__ == "BottleneckForMaskedLM" and found.config.widths == whole["encoding"]["widths"]
    assert sum(p.numel() for p in found.parameters()) == whole["cost"] <= 0.7 * whole["full"]
    assert judged(tmp_path / "a", str(text)) == whole["measures"] and "accuracy" in whole["measures"]
    losses = {row["architecture"]: row["held-out loss"] for row in whole["compared"]}
    assert losses["found"] <= losses["smallest"]


def test_a_loss_of_batches_is_of_targets() -> None:
    """One target that loses 4 beside three that lose 8; what is ignored isn't one."""
    batches = [{"labels": torch.tensor([[1, IGNORED]])}, {"labels": torch.tensor([[1, 1, 2]])}]
    lost = {2: 4.0, 3: 8.0}
    assert loss_of(lambda labels: SimpleNamespace(loss=torch.tensor(lost[labels.numel()])), batches) == 7
