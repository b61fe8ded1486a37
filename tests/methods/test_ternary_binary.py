"""TBT: its values without a sign, its losses, its recipe and schemes end to end on encoder-decoders.

Liu et al. 2023, "Binary and Ternary Natural Language Generation", arXiv:2306.01841. Equations of the estimators are in
tests/parts/learned/test_elastic.py and test_statistics.py, those of the losses in test_training_losses.py.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parts.training.test_text_tasks import BART, T5, model, sentences
from tests.tiny import framed_tokenizer
from torch import Tensor, nn

import nybble
from nybble.core.errors import DataError, SchemeError
from nybble.core.progress import Silent
from nybble.data.samples import InMemory
from nybble.nn.embedding import QuantEmbedding, TiedEmbedding, TiedHead
from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed
from nybble.pipelines.train import train
from nybble.qtensor.block import BlockQTensor
from nybble.training.convert import convert
from nybble.training.methods import Given
from nybble.training.methods.qat import PART, QatOptions
from nybble.training.objective import Objective, make_losses
from nybble.training.recipe import load_training_recipe
from nybble.training.settings import TrainSettings
from nybble.training.tasks import TASKS, task_of
from nybble.two_sets import TWO_SETS

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
RECIPE = load_training_recipe("ternary-binary")
SETTINGS = TrainSettings(
    steps=2, batch=4, accumulate=1, seq_len=16, lr=5e-3, save_every=12, dtype="float32", checkpointing=False
)
TBT = [name for name in TWO_SETS if name.startswith("TBT")]


def bart() -> Any:
    return model("BartForConditionalGeneration", "bart", BART)


def batch(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(3, 53, (3, size), generator=draw) for size in (9, 7))
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:], labels[2, 4:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def attached(made: Any, scheme: str = "TBT_W2A2") -> Any:
    chosen = nybble.scheme.parse_scheme(scheme)
    given = Given(options=QatOptions(**RECIPE.options), scheme=chosen, run=lambda network: network(**batch()))
    return PART.attach(made, given)


def learn(student: Any, teacher: Any, steps: int = 2) -> None:
    objective = Objective(TASKS.get("translation"), make_losses(RECIPE.options["losses"]), teacher)
    optimizer = torch.optim.AdamW(student.parameters(), 2e-3)
    student.train()
    with objective.served(student):
        for step in range(steps):
            optimizer.zero_grad()
            torch.autograd.backward(objective(student, batch(step), 0.0))
            optimizer.step()
    student.eval()


def codes_of(packed: Packed) -> Tensor:
    found = packed.qtensor()
    assert isinstance(found, BlockQTensor)
    return found.dequantize(torch.float32)


# --------------------------------------------------------------------------------------------------- the whole recipe
@pytest.mark.parametrize(
    ("name", "family", "config"),
    [("BartForConditionalGeneration", "bart", BART), ("T5ForConditionalGeneration", "t5", T5)],
)
@pytest.mark.parametrize("scheme", [None, "TBT_W1A8"])
def test_the_recipe_is_packed_as_it_was_measured(
    name: str, family: str, config: dict[str, Any], scheme: str | None, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs it: pip install 'nybble[train]'")
    pytest.importorskip("sacrebleu", reason="the judge: pip install sacrebleu")
    model(name, family, config).save_pretrained(tmp_path / "model")
    framed_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"source": text, "target": " ".join(text.split()[::-1])} for text in sentences(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, out = str(tmp_path / "data.jsonl"), tmp_path / "out"
    found = train(
        "ternary-binary", tmp_path / "model", out, data, scheme=scheme, settings=SETTINGS, judged_on=data, form="native"
    )
    made, tokenizer = nybble.load(out)
    task, origin = task_of(made, "it"), InMemory(made.config, tokenizer)
    held = task.load(data, origin, made, 16, "evaluation").rows
    assert task.measure(made, origin, held, 8, Silent()) == found["evaluation"]["models"]["after"]
    layers = [layer for layer in made.modules() if isinstance(layer, QuantLinear)]
    linear = [layer for layer in model(name, family, config).modules() if isinstance(layer, nn.Linear)]
    assert len(layers) == len(linear) - 1 and type(made.lm_head) is nn.Linear
    for layer in layers:  # check 1: codes and nothing else
        assert isinstance(layer.weight, Packed)
        dense = codes_of(layer.weight)
        levels = {*(dense / dense.abs().amax(1, keepdim=True)).flatten().tolist()}
        assert levels == ({-1.0, 1.0} if scheme else {-1.0, 0.0, 1.0})


def test_a_head_may_share_the_embeddings_few_bits() -> None:
    """As the scheme alone does; the recipe's head keeps a float table, which is trained apart."""
    made = bart()
    before = made.lm_head.weight
    assert before is made.model.shared.weight
    shared = nybble.training.prepare.prepare(bart(), "TBT_W2A8")
    assert isinstance(convert(shared).lm_head, TiedHead)
    student = attached(made)
    learn(student, bart())
    packed: Any = convert(student)
    assert isinstance(packed.model.shared, QuantEmbedding)
    assert isinstance(packed.model.encoder.embed_tokens, TiedEmbedding)
    assert type(packed.lm_head) is nn.Linear and not torch.equal(packed.lm_head.weight, before)


def test_a_float_head_goes_on_in_the_next_stage() -> None:
    """With what it learned in the one before, and not with the table that it shared once."""
    first = attached(bart())
    learn(first, bart())
    made = bart()
    made.load_state_dict(PART.float_values(first), strict=False)
    chosen = nybble.scheme.parse_scheme("TBT_W1A1")
    options = QatOptions(**{**RECIPE.options, "stages": ({"scheme": "TBT_W2A2"},)})
    given = Given(options=options, scheme=chosen, stage=1, before=first, run=lambda network: network(**batch()))
    second: Any = PART.attach(made, given)
    assert torch.equal(second.lm_head.weight, first.lm_head.weight)
    assert torch.equal(second.model.shared.weight.latent, first.model.shared.weight.latent)
    assert not torch.equal(second.lm_head.weight, second.model.shared.weight.latent)


# ------------------------------------------------------------------------------------------------------------ the sets
@torch.no_grad()
@pytest.mark.parametrize("scheme", ["TBT_W2A2", "TBT_W1A1"])
def test_what_has_no_sign_stays_so(scheme: str) -> None:
    """Check 6, behind training: softmax and the second MLP layer's input."""
    student = attached(bart(), scheme)
    with torch.enable_grad():
        learn(student, bart())
    made: Any = convert(student)
    for layer in (*made.model.encoder.layers, *made.model.decoder.layers):
        rounded = layer.fc2.inputs(torch.linspace(-3, 3, 101))
        a = rounded.max()
        assert {*(rounded / a).unique().tolist()} == ({0.0, 0.5, 1.0} if scheme == "TBT_W2A2" else {0.0, 1.0})
        maps = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
        maps[0, 0] = 0.0
        operands = layer.self_attn.matmuls
        rounded = operands("probabilities", maps)
        assert rounded.min() == 0 and rounded[0, 0] == 0
        signed = rounded.max() * torch.where(maps >= 0, 1.0, -1.0)
        assert (signed - maps).square().mean() > 4 * (rounded - maps).square().mean()


# ---------------------------------------------------------------------------------------------------------- the losses
def test_a_student_that_is_its_teacher() -> None:
    """Check 7: maps and states lose nothing, logits the teacher's entropy; padding counts where it is told to."""
    teacher = bart()
    objective = Objective(TASKS.get("translation"), make_losses(RECIPE.options["losses"]), teacher)
    student = bart()
    with objective.served(student), torch.no_grad():
        objective(student, batch(), 0.0)
        logits = teacher(**batch()).logits.double()
    assert objective.last["attention"] == 0 and objective.last["hidden"] == 0
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)[batch()["labels"] != -100].mean()
    assert objective.last["logits"].item() == pytest.approx(entropy.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ bad input
def test_rows_without_magnitude_and_scales_below_zero() -> None:
    """Check 8: no NaN of zero and constant rows; a scale of 0 or less in a checkpoint is used at the floor."""
    made = bart()
    with torch.no_grad():
        made.model.encoder.layers[0].fc1.weight[3] = 0.0
        made.model.encoder.layers[0].fc1.weight[4] = 0.25
    rounded: Any = convert(attached(copy.deepcopy(made)))
    codes = codes_of(rounded.model.encoder.layers[0].fc1.weight)
    assert (codes[3:5] == 0).all() and (codes != 0).any(1).sum() == len(codes) - 2
    student = attached(made)
    state = {name: torch.full_like(t, -1.0) if name.endswith("inputs.held.scale") else t for name, t in
             student.state_dict().items()}  # fmt: skip
    assert any((state[name] != t).any() for name, t in student.state_dict().items())
    student.load_state_dict(state)
    learn(student, bart(), steps=1)
    with torch.no_grad():
        before = student(**batch()).logits
        packed: Any = convert(student)
        assert before.isfinite().all() and torch.equal(packed(**batch()).logits, before)
    first = packed.model.encoder.layers[0].fc1
    assert first.inputs.params().scale == torch.tensor(1e-5)


def test_bad_requests() -> None:
    with pytest.raises(SchemeError, match=r"unknown scheme 'TBT_W3A1'\. Did you mean 'TBT_W"):
        nybble.scheme.parse_scheme("TBT_W3A1")
    made = bart()
    with torch.no_grad():
        made.model.decoder.layers[0].fc2.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"decoder\.layers\.0\.fc2: the weight"):
        attached(made)
