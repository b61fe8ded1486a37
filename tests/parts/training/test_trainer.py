"""Optimizers where others drive them: transformers' Trainer, accelerate, GradScaler, schedules, other imports."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_model
from torch import Tensor

import nybble.optim
from nybble.core.errors import UsageError
from nybble.core.explicit import explicit_settings
from nybble.core.progress import Silent
from nybble.training.optimizers import trainer_optimizer
from nybble.training.settings import TrainSettings

accelerate = pytest.importorskip("accelerate", reason="the Trainer needs it: pip install 'nybble[train]'")
transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
    for name in ("transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def model() -> Any:
    return tiny_model(dtype=torch.float32).train()


def rows(count: int = 24) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    made = [torch.randint(3, 50, (12,), generator=draw) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def arguments(out: Path, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
    }
    settings |= {"weight_decay": 0.1, "warmup_steps": 2, "use_cpu": True, "disable_tqdm": True, "report_to": []}
    return transformers.TrainingArguments(str(out), **settings, dataloader_pin_memory=False, **more)


def trained(out: Path, line: str, resume: Path | None = None) -> Any:
    args = arguments(out)
    made = transformers.Trainer(
        model(), args, train_dataset=rows(), optimizer_cls_and_kwargs=trainer_optimizer(line, args)
    )
    made.train(resume_from_checkpoint=None if resume is None else str(resume))
    return made


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("line", ["AdamW8bit min_size=64", "PagedAdamW4bit min_size=64", "Lion8bit min_size=0"])
def test_the_trainer_goes_on_with_the_same_bytes(tmp_path: Path, line: str) -> None:
    whole = trained(tmp_path / "whole", line)
    resumed = trained(tmp_path / "resumed", line, tmp_path / "whole" / "checkpoint-3")
    kind = whole.optimizer.optimizer if hasattr(whole.optimizer, "optimizer") else whole.optimizer
    assert type(kind) is getattr(nybble.optim, line.split()[0])
    assert [group["weight_decay"] for group in kind.param_groups] == [0.1, 0.0]
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        one, other = (
            hashlib.sha256((tmp_path / run / "checkpoint-6" / name).read_bytes()).hexdigest()
            for run in ("whole", "resumed")
        )
        assert one == other, name
    saved = torch.load(tmp_path / "whole" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    kept = [x for entry in saved["state"].values() for x in entry.values() if isinstance(x, dict)]
    assert kept and all(x["codes"].dtype == torch.uint8 for x in kept)
    losses = [entry["train_loss"] for entry in whole.state.log_history if "train_loss" in entry]
    assert losses and all(loss == loss for loss in losses)
    assert resumed.state.global_step == 6


def test_what_the_trainer_is_given(tmp_path: Path) -> None:
    """Its rate and, for Adam's kin, its betas and epsilon; what the line says comes first."""
    args = arguments(tmp_path, adam_beta2=0.95, adam_epsilon=1e-6)
    kind, given = trainer_optimizer("AdamW4bit state=state8 eps=1e-7", args)
    assert kind is nybble.optim.AdamW4bit
    shared = {"lr": 2e-3, "betas": (0.9, 0.95), "weight_decay": 0.0}
    assert given == {**shared, "eps": 1e-7, "state": "state8"}
    assert trainer_optimizer("Lion8bit", args)[1] == {"lr": 2e-3, "weight_decay": 0.0}  # its betas are others'
    with pytest.raises(UsageError, match="unknown optimizer 'AdamW9bit'"):
        trainer_optimizer("AdamW9bit", args)
    with pytest.raises(UsageError, match="no option 'stat' here"):
        trainer_optimizer("AdamW8bit stat=state8", args)


# ------------------------------------------------------------------------------------------------------------- loops
def plain(made: Any, optimizer: Any, schedule: Any, step: Callable[[Tensor], None] | None = None) -> list[float]:
    losses = []
    for start in range(0, 24, 4):
        ids = torch.stack([row["input_ids"] for row in rows()[start : start + 4]])
        loss = made(input_ids=ids, labels=ids, use_cache=False).loss
        if step is None:
            torch.autograd.backward(loss)
            optimizer.step()
        else:
            step(loss)
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def begun() -> tuple[Any, Any, Any]:
    made = model()
    optimizer = nybble.optim.AdamW8bit(made.parameters(), lr=4e-3, min_size=64)
    return made, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=7)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_scaler_changes_nothing_and_skips_what_overflows() -> None:
    """A scale of a power of two is exact; a step whose gradients overflowed is left out, states and all."""
    one, *of_one = begun()
    other, optimizer, schedule = begun()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def scaled(loss: Tensor) -> None:
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()

    assert plain(one, *of_one) == plain(other, optimizer, schedule, scaled)
    assert same(one, other)
    before = [p.detach().clone() for p in other.parameters()]
    for p in other.parameters():
        p.grad = torch.full_like(p, torch.inf)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    assert {int(state["step"]) for state in optimizer.state.values()} == {6} and not optimizer.set_aside()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_accelerate(tmp_path: Path) -> None:
    """Prepared by it, saved and loaded by it: the same weights as without."""
    one, *of_one = begun()
    losses = plain(one, *of_one)
    runner = accelerate.Accelerator(cpu=True)
    other, optimizer, schedule = runner.prepare(*begun())

    def step(loss: Tensor) -> None:
        runner.backward(loss)
        optimizer.step()

    assert plain(other, optimizer, schedule, step) == losses
    assert same(one, other)
    runner.save_state(str(tmp_path / "state"))
    again, *rest = runner.prepare(*begun())
    runner._models, runner._optimizers, runner._schedulers = [again], [rest[0]], [rest[1]]
    runner.load_state(str(tmp_path / "state"))
    assert same(again, other)
    for p, q in zip(other.parameters(), again.parameters(), strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    rest[0].step()
    assert same(again, other)


@pytest.mark.parametrize("library", ["torch", "bitsandbytes", "torchao"])
@pytest.mark.filterwarnings("ignore")
def test_two_lines(library: str) -> None:
    """A training script of another library, whose import and name alone change, on a small language model.

    Its last loss is within a few per cent, the bound of the sheet of 8-bit optimizers.
    """
    peer: Any = torch.optim if library == "torch" else pytest.importorskip(f"{library}.optim", exc_type=ImportError)
    losses = []
    for source, name in ((peer, "AdamW" if library == "torch" else "AdamW8bit"), (nybble.optim, "AdamW8bit")):
        made = model()
        optimizer = getattr(source, name)(made.parameters(), lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 30)
        for _ in range(5):
            last = plain(made, optimizer, schedule)
        losses.append(sum(last) / len(last))
        first = plain(model(), optimizer, schedule)[0]
    assert losses[1] < 0.8 * first
    assert abs(losses[1] / losses[0] - 1) < 0.03 and losses[0] != losses[1]


@pytest.mark.parametrize("around", ["settings", "a caller's autocast"])
def test_a_mixed_run_multiplies_with_the_weights_of_its_update(tmp_path: Path, around: str) -> None:
    """Within another autocast, one that ends keeps its 16-bit copies of weights: the Trainer's must not."""
    from nybble.training.loop import train

    made = model()
    weight = made.model.layers[0].mlp.down_proj.weight  # of a float layer: the weight itself is what is multiplied
    for p in made.parameters():
        p.requires_grad_(p is weight)
    settings = TrainSettings(
        steps=3, batch=4, accumulate=1, seq_len=12, lr=0.05, warmup=0.0, dtype="bfloat16", checkpointing=False,
        optimizer="torch.SGD",
    )  # fmt: skip
    outer = torch.autocast("cpu", torch.bfloat16) if around == "a caller's autocast" else explicit_settings()
    row = rows(1) * 12
    before = weight.detach().clone()
    with outer:
        run = train(made, row, settings, tmp_path, Silent(), mixed=True)
    losses = [loss for _, loss in run.curve]
    assert not torch.equal(before, weight)
    assert losses[0] > losses[1] > losses[2]
