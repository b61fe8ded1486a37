"""``nybble train`` where a scheme quantizes all that it can: a tied table, layers, attention's operands, the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_train import _Stops
from tests.e2e.test_train_models import SETTINGS, _Origin, folder, loop, run

import nybble
from nybble.core.progress import Silent
from nybble.nn.attention import MatmulQuantizers
from nybble.nn.embedding import QuantEmbedding, TiedHead
from nybble.nn.kv_model import recorded_kv

__all__ = ["folder"]
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


def scheme(bits: int) -> dict[str, Any]:
    return {
        "rules": [
            {"targets": ["Embedding"], "weights": f"int{bits} channel"},
            {"targets": ["Linear"], "weights": f"int{bits} channel", "inputs": "int8 tensor static"},
            {"matmuls": "int8 tensor static probabilities=(uint8 tensor static)"},
        ],
        "kv": f"int{bits} token",
    }


SHORT = replace(SETTINGS, steps=2)
OPTIONS = {
    "learned": {"weights": "lsq", "inputs": "lsq", "matmuls": "lsq"},
    "losses": {"task": 1, "logits": {"weight": 1}},
    "stages": [{"scheme": scheme(8)}],
    "teacher": "stage",
}


def test_in_stages_behind_a_kill_and_as_it_was_measured(folder: Path, tmp_path: Path) -> None:
    data = str(folder / "data.jsonl")
    more: dict[str, Any] = {"scheme": scheme(4), "weights": None, "activations": None, "options": OPTIONS}
    whole, out = tmp_path / "whole", tmp_path / "out"
    found = run(folder, whole, settings=SHORT, judged_on=data, **more)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, settings=SHORT, progress=_Stops(3), **more)
    run(folder, out, settings=replace(SHORT, resume=True), **more)
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (whole / weights).read_bytes()
    models = found["evaluation"]["models"]
    assert models["after"]["nll"] < models["before"]["nll"] != models["float"]["nll"]
    model, tokenizer = nybble.load(whole)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding) and isinstance(model.lm_head, TiedHead)
    assert any(isinstance(module, MatmulQuantizers) for module in model.modules())
    assert str(recorded_kv(model)) == "int4 token"
    task, origin = loop.TASKS.get("language"), _Origin(tokenizer)
    rows = task.load(data, origin, model, 16, "evaluation").rows
    assert task.measure(model, origin, rows, 8, Silent()) == models["after"]
