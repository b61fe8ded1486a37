"""What learning on windows is estimated to cost, beside how often the walk has each block in a window."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_model

from nybble.calibration.spans import spans
from nybble.recipe import parse_recipe
from nybble.walk.job import Job
from nybble.walk.settings import Settings
from nybble.walk.steps import Subject


def flops(window: int, overlap: int) -> float:
    """Of the first block."""
    model = tiny_model(dtype=torch.float32, num_hidden_layers=4)
    step = {"reconstruction": "mse", "weights": "flexround", "steps": 3, "window": window, "overlap": overlap}
    recipe = parse_recipe({"name": "x", "scheme": {"weights": "int4 channel"}, "steps": [{"solver": "rtn"}, step]})
    job = Job.make(model, None, recipe, torch.ones(2, 8, dtype=torch.int64), Settings(samples=2, seq_len=8))
    subject = Subject(model=model, adapter=job.adapter, plan=job.plan)
    return job.reconstructions[0].cost(subject, job.plan.blocks[0], job.load).flops


@pytest.mark.parametrize(("window", "overlap"), [(2, 0), (2, 1), (3, 1), (4, 3)])
def test_blocks_of_overlapping_windows_are_learned_on_as_often_as_the_walk_does(window: int, overlap: int) -> None:
    """Every step of a window runs all its blocks; with an overlap of one of two a block is in two windows."""
    blocks = 1200  # so many that the ends of the model, where windows are cut, don't count
    visits = sum(span.stop - span.start for span in spans([blocks], window, overlap)) / blocks
    assert flops(window, overlap) == pytest.approx(visits * flops(1, 0), rel=0.01)


@pytest.mark.parametrize("solver", ["gptq", "rtn"])
def test_a_pass_is_two_operations_a_weight_and_token_heads_included(
    monkeypatch: pytest.MonkeyPatch, solver: str
) -> None:
    """And embeddings not; known where nothing but a training at the end reads samples, too."""
    monkeypatch.setattr("nybble.walk.job.measure_flops", lambda *_: 1.0)
    model = tiny_model(dtype=torch.float32)
    steps: list[dict[str, object]] = [{"solver": solver}, {"train": "distill"}]
    recipe = parse_recipe({"name": "x", "scheme": {"weights": "int4 channel"}, "steps": steps})
    job = Job.make(model, None, recipe, torch.ones(4, 8, dtype=torch.int64), Settings(samples=4, seq_len=8))
    weights = sum(p.numel() for p in model.model.layers.parameters()) + model.lm_head.weight.numel()
    assert job.estimate.pass_seconds == 2 * 8 * weights
