"""BiT: what its paper says of softmax's values, of its losses and of its stages; the recipe end to end, in 1-bit words.

Liu et al. 2022, "BiT: Robustly Binarized Multi-distilled Transformer", arXiv:2205.13016. Equations of the estimators
are in tests/parts/learned/test_elastic.py and test_statistics.py, those of the losses in test_training_losses.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.parts.training.test_text_tasks import BERT, ONE, model, sentences
from tests.tiny import framed_tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import nybble
from nybble.core.errors import ModelError
from nybble.core.progress import Silent
from nybble.data.samples import InMemory
from nybble.nn.attention import attentions
from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed
from nybble.pipelines import stages
from nybble.pipelines.train import train
from nybble.training.convert import convert
from nybble.training.methods import Given
from nybble.training.methods.qat import PART, QatOptions
from nybble.training.objective import Objective, make_losses
from nybble.training.recipe import load_training_recipe
from nybble.training.settings import TrainSettings
from nybble.training.tasks import TASKS, task_of
from nybble.training.unprepare import learned_values
from nybble.two_sets import TWO_SETS

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
RECIPE = load_training_recipe("bit")
SETTINGS = TrainSettings(
    steps=2, batch=4, accumulate=1, seq_len=16, lr=5e-3, save_every=12, dtype="float32", checkpointing=False
)


def options(**changes: Any) -> QatOptions:
    return QatOptions(**{**RECIPE.options, "stages": tuple(RECIPE.options["stages"]), **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A BERT with its tokenizer, and texts of three classes."""
    save(tmp_path, BERT, ["news", "sport", "weather"])
    return tmp_path


def save(folder: Path, config: Mapping[str, Any], labels: list[Any]) -> None:
    model("BertForSequenceClassification", "bert", dict(config)).save_pretrained(folder / "model")
    framed_tokenizer().save_pretrained(folder / "model")
    rows = [{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(sentences(8))]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path, **more: Any) -> dict[str, Any]:
    data = str(folder / "data.jsonl")
    return train("bit", folder / "model", folder / "out", data, settings=SETTINGS, form="native", **more)


def packed(root: nn.Module) -> dict[str, QuantLinear]:
    return {name: layer for name, layer in root.named_modules() if isinstance(layer, QuantLinear)}


# --------------------------------------------------------------------------------------------------- the whole recipe
def test_the_recipe_and_the_teacher_of_its_second_stage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check 7: the teacher of the second stage is the first stage's network, frozen, and the same afterwards."""
    pytest.importorskip("accelerate", reason="the Trainer needs it: pip install 'nybble[train]'")
    taught: list[tuple[nn.Module, dict[str, Tensor]]] = []

    class Watched(Objective):
        def __init__(self, task: Any, losses: Any, teacher: Any) -> None:
            super().__init__(task, losses, teacher)
            taught.append((teacher, {name: t.clone() for name, t in teacher.state_dict().items()}))

    monkeypatch.setattr(stages, "Objective", Watched)
    found = run(folder, judged_on=str(folder / "data.jsonl"))
    (first, _), (second, _) = taught
    assert isinstance(first.get_submodule("bert.pooler.dense"), nn.Linear)
    pooler: Any = second.get_submodule("bert.pooler.dense")
    assert pooler.inputs.quantizer.format.name == "int2_full" and found["steps"] == 4
    for teacher, before in taught:
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
        assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    made, tokenizer = nybble.load(folder / "out")
    assert made.config.hidden_act == "relu"
    task, origin = task_of(made, "it"), InMemory(made.config, tokenizer)
    held = task.load(str(folder / "data.jsonl"), origin, made, 16, "evaluation").rows
    assert task.measure(made, origin, held, 8, Silent()) == found["evaluation"]["models"]["after"]


def test_one_number_is_refused_with_a_way_out(tmp_path: Path) -> None:
    """Check 6: of a head with one logit cross-entropy is constant."""
    pytest.importorskip("accelerate", reason="the Trainer needs it: pip install 'nybble[train]'")
    save(tmp_path, ONE, [0.5, 1.5])
    with pytest.raises(ModelError, match=r"one number a row.*Take form: mse"):
        run(tmp_path)
    found = run(tmp_path, options={"losses": {"logits": {"form": "mse"}, "hidden": 1.0}})
    assert found["steps"] == 4


# ------------------------------------------------------------------------------------------------------ packed products
def trained(made: Any, seed: int = 0) -> Any:
    """Some steps of the second stage's training, on texts of random words."""
    prepared, batch = attached(made), random_batch(seed)
    with torch.enable_grad():
        learn(prepared, copy.deepcopy(made), [batch] * 3, lr=5e-3)
    return convert(prepared)


def attached(made: Any, before: Any = None, stage: int = 1, **changes: Any) -> Any:
    given = Given(
        options=options(**changes), scheme=RECIPE.scheme, stage=stage, before=before,
        run=lambda network: network(random_batch(0)["input_ids"]),
    )  # fmt: skip
    network = copy.deepcopy(made)
    if before is not None:
        network.load_state_dict(PART.float_values(before), strict=False)
    return PART.attach(network, given)


def random_batch(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 53, (4, 12), generator=draw)
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, 8:] = mask[3, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(4) % 3}


def learn(student: Any, teacher: Any, batches: list[dict[str, Tensor]], lr: float) -> None:
    """The recipe's losses and schedule, in a loop of its own."""
    objective = Objective(TASKS.get("classification"), make_losses(RECIPE.options["losses"]), teacher.eval())
    groups = PART.groups(student, options(), lr)
    assert groups is not None
    optimizer = torch.optim.AdamW(groups, lr, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / len(batches))
    student.train()
    for batch in batches:
        optimizer.zero_grad()
        torch.autograd.backward(objective(student, batch, 0.0))
        optimizer.step()
        rate.step()
    student.eval()


@torch.no_grad()
def test_products_are_counts_of_bits() -> None:
    """Check 8: (-1, 1) x (-1, 1) by XNOR, {0, 1} x (-1, 1) by AND, of every packed layer; operands of attention too."""
    made = trained(model("BertForSequenceClassification", "bert", BERT))
    assert len(packed(made)) == 2 * 6 + 1 and isinstance(made.classifier, nn.Linear)
    seen: dict[str, Tensor] = {}
    for name, layer in packed(made).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    made(**random_batch(5))
    for name, layer in packed(made).items():
        assert isinstance(layer.weight, Packed) and layer.inputs is not None
        weight = layer.weight.qtensor()
        x = layer.inputs(seen[name]).flatten(0, -2).double()
        w = weight.dequantize(torch.float32).double()
        a, s = (t.abs().max().item() for t in (x, w))
        unsigned = name.endswith("output.dense") and "attention" not in name
        assert {*(x / a).flatten().tolist()} <= ({0.0, 1.0} if unsigned else {-1.0, 1.0})
        assert {*(w / s).flatten().tolist()} == {-1.0, 1.0}
        assert torch.equal(torch.from_numpy(counted((x > 0).numpy(), (w > 0).numpy(), unsigned)), (x / a) @ (w / s).T)
    for _, attention in attentions(made):
        zero_one = attention.get_submodule("matmuls.probabilities")(torch.tensor([0.0, 1e-9, 1.0]))
        assert zero_one[0] == 0 and zero_one[2] > 0


def counted(x: Any, w: Any, unsigned: bool) -> Any:
    """Rows of bits with rows of bits: integers, by bitwise operations on packed words and counts of ones."""
    words, rows = np.packbits(x, axis=1)[:, None, :], np.packbits(w, axis=1)[None]
    if unsigned:  # sum of w where x is 1
        return (2 * ones(words & rows) - ones(words)).astype(np.float64)
    return (x.shape[1] - 2 * ones(words ^ rows)).astype(np.float64)


def ones(words: Any) -> Any:
    """How many bits are 1, of the last dimension's bytes."""
    return np.unpackbits(words, axis=-1).sum(-1, dtype=np.int64)


# ------------------------------------------------------------------------------------------------------------ the sets
@torch.no_grad()
def test_what_a_mask_hides_stays_hidden() -> None:
    """Check 5: {0, a} of probabilities; with {-a, a} words of padding are read."""
    made = trained(model("BertForSequenceClassification", "bert", BERT))
    batch = random_batch(5)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)}
    assert torch.equal(made(**batch).logits, made(**other).logits)
    signed = TWO_SETS["BIT_W1A1"]
    scheme = signed._replace(unsigned=signed.signed).to_dict()
    one = nybble.training.prepare.prepare(
        model("BertForSequenceClassification", "bert", BERT), scheme, run=lambda network: network(**batch)
    )
    assert not torch.equal(one(**batch).logits, one(**other).logits)


# ---------------------------------------------------------------------------------------------------------- the stages
def test_a_stage_begins_where_the_one_before_ended() -> None:
    """Weights always; scales and thresholds unless ``inherit: false``, with which they begin as without a stage."""
    made = model("BertForSequenceClassification", "bert", BERT)
    first = attached(made, stage=0)
    learn(first, copy.deepcopy(made), [random_batch(0)] * 2, lr=5e-3)
    ended, alone = learned_values(first), learned_values(attached(first_of(made, first)))
    for inherits, wanted in ((True, ended), (False, alone)):
        second = attached(made, first, inherit=inherits)
        begins = learned_values(second)
        assert begins.keys() == ended.keys() and any(name.endswith("shift") for name in begins)
        assert all(torch.equal(p, wanted[name]) for name, p in begins.items())
        weights = PART.float_values(second)
        assert all(torch.equal(t, weights[name]) for name, t in PART.float_values(first).items())
    assert not all(torch.equal(p, alone[name]) for name, p in ended.items())


def first_of(made: Any, before: Any) -> Any:
    """A float network with the weights of a stage."""
    found = copy.deepcopy(made)
    found.load_state_dict(PART.float_values(before), strict=False)
    return found


@pytest.mark.slow
def test_two_stages_are_better_than_one_of_as_many_updates() -> None:
    """Check 7: which of two marks is somewhere in a text, and whether its first word is odd; means of three seeds."""
    found = [_two_and_one(seed) for seed in range(3)]
    two, one = (sum(each) / len(each) for each in zip(*found, strict=True))
    assert two >= one and two > 0.98


def _two_and_one(seed: int, steps: int = 50) -> tuple[float, float]:
    """Accuracy on 2,000 texts that nobody has seen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {**BERT, "num_hidden_layers": 1, "id2label": {0: "even", 1: "odd"}}
        teacher: Any = BertForSequenceClassification(BertConfig(**config))
        optimizer = torch.optim.AdamW(teacher.parameters(), 3e-3)
        for number in range(250):
            teacher.train()(**marked(seed, number)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        batches = [marked(seed, 1000 + number) for number in range(2 * steps)]
        first = attached(teacher, stage=0)
        learn(first, teacher, batches[:steps], lr=1e-2)
        second, one = attached(teacher, before=first), attached(teacher)
        learn(second, first, batches[steps:], lr=1e-2)
        learn(one, teacher, batches, lr=1e-2)
    return accuracy(second), accuracy(one)


def marked(seed: int, number: int, count: int = 64) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(10_000 * seed + number)
    ids = torch.randint(7, 37, (count, 6), generator=draw)
    place, mark = (torch.randint(low, high, (count,), generator=draw) for low, high in ((1, 6), (0, 2)))
    ids[torch.arange(count), place] = 5 + mark
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (mark + ids[:, 0] - 7) % 2}


@torch.no_grad()
def accuracy(made: Any) -> float:
    batch = marked(100, 0, 2000)
    right: Tensor = made.eval()(**batch).logits.argmax(-1) == batch["labels"]
    return right.double().mean().item()
