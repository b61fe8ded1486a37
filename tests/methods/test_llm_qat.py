"""LLM-QAT's recipe on a small llama that has learned a language: texts of its own bring it back to its float logits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import WORDS, tiny_model, tiny_tokenizer
from tests.tiny import given as given_to
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

import nybble
from nybble.core.errors import NybbleError
from nybble.pipelines.train import train
from nybble.training.objective import Objective, make_losses
from nybble.training.recipe import load_training_recipe
from nybble.training.tasks import TASKS

pytest.importorskip("accelerate", reason="needs accelerate, which nybble's extra 'train' brings")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")

SIZES: dict[str, Any] = {"vocab_size": len(WORDS), "pad_token_id": 0, "attention_bias": False}
LOOP: dict[str, Any] = {
    "steps": 60, "batch": 16, "accumulate": 1, "seq_len": 24, "lr": 1e-3, "dtype": "float32", "checkpointing": False
}  # fmt: skip
SCHEMES = {
    bits: {"weights": f"int{bits} channel", "inputs": "int8 token", "kv": "int8 token" if bits > 4 else "int4 token"}
    for bits in (8, 6, 4)
}


def sentences(count: int, seed: int) -> Tensor:
    """A language: after each word one of four, of a chain that is always the same."""
    chain = random.Random(7)
    after = {word: chain.sample(range(3, len(WORDS)), 4) for word in range(3, len(WORDS))}
    rng, rows = random.Random(seed), []
    for _ in range(count):
        row = [rng.randrange(3, len(WORDS))]
        while len(row) < 24:
            row.append(rng.choices(after[row[-1]], (8, 4, 2, 1))[0])
        rows.append(row)
    return torch.tensor(rows)


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher, trained on the language."""
    torch.set_num_threads(1)
    made = tmp_path_factory.mktemp("llama")
    model = tiny_model(dtype=torch.float32, **SIZES)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.div_(8)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = sentences(512, 1)
    for step in range(150):
        ids = rows[torch.arange(step * 16, step * 16 + 16) % len(rows)]
        loss = model(input_ids=ids, labels=ids).loss
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


def loaded(place: Path) -> Any:
    return nybble.load(place, dtype="float32")[0]


@torch.no_grad()
def divergence(teacher: Any, model: Any) -> float:
    """KL to the teacher on text of the language that neither has seen, with the cache that the model has."""
    ids = sentences(64, 2)
    wanted, said = (made(input_ids=ids, use_cache=True).logits.double().log_softmax(-1) for made in (teacher, model))
    return float(functional.kl_div(said, wanted, log_target=True, reduction="none").sum(-1).mean())


def rounded(folder: Path, out: Path, bits: int) -> Any:
    nybble.quantize(folder, "rtn", out=out, scheme=SCHEMES[bits], settings={"dtype": "float32"})
    return loaded(out)


@pytest.fixture(scope="module")
def trained(float_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By bits, as the recipe trains it."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("trained")
    for bits in SCHEMES:
        train("llm-qat", float_folder, out / str(bits), "self:192", scheme=SCHEMES[bits], settings=LOOP)
    return {bits: out / str(bits) for bits in SCHEMES}


def test_it_comes_nearer_to_its_teacher_than_rounding(
    float_folder: Path, trained: dict[int, Path], tmp_path: Path
) -> None:
    """Check 7: with data that it never saw, and in the order of bits."""
    teacher = loaded(float_folder)
    assert divergence(teacher, teacher) == 0
    found = {bits: divergence(teacher, loaded(place)) for bits, place in trained.items()}
    assert found[8] < found[6] < found[4] < 0.5 * divergence(teacher, rounded(float_folder, tmp_path / "rtn", 4))


def test_decoding_step_by_step_is_the_pass_over_all(trained: dict[int, Path]) -> None:
    """Check 3: a token's key and value are rounded once, by themselves; more tokens change nothing."""
    model, ids = loaded(trained[4]), sentences(2, 3)[:, :10]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=True).logits
        more, rows = dict[str, Any](), []
        for at in range(ids.shape[1]):
            out = model(input_ids=ids[:, at : at + 1], use_cache=True, **more)
            more = given_to(model, out.past_key_values)
            rows.append(out.logits)
        part = model(input_ids=ids[:, :6], past_key_values=None, use_cache=True).logits  # whatever a cache is called
        plain = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(part, whole[:, :6], rtol=1e-4, atol=1e-4)
    assert float((plain - whole).abs().max()) > 1e-3  # the cache is in four bits


class Says(nn.Module):
    """A network of logits alone."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, **given: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.logits)


def pairs() -> Iterator[tuple[Any, dict[str, Tensor]]]:
    given = load_training_recipe("llm-qat").options["losses"]
    ids = torch.zeros(3, 5, dtype=torch.long)
    yield given, {"input_ids": ids}
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[0, 3:] = 0
    yield given, {"input_ids": ids, "attention_mask": mask}


def test_the_loss_is_that_of_logits_alone() -> None:
    """Check 5: its gradient is (p_student - p_teacher) / count; no labels; nothing where both agree."""
    draw = torch.Generator().manual_seed(0)
    for losses, batch in pairs():
        student = Says(torch.randn(3, 5, 7, generator=draw, dtype=torch.float64))
        teacher = Says(torch.randn(3, 5, 7, generator=draw, dtype=torch.float64)).requires_grad_(False)
        task = TASKS.get("language")
        torch.autograd.backward(Objective(task, make_losses(losses), teacher)(student, batch, 0.0))
        real = batch.get("attention_mask", torch.ones(3, 5))[..., None]
        wanted = (student.logits.softmax(-1) - teacher.logits.softmax(-1)) * real / real.sum()
        torch.testing.assert_close(student.logits.grad, wanted.detach(), rtol=1e-5, atol=1e-8)
        same = Says(teacher.logits.detach().clone())
        loss = Objective(task, make_losses(losses), teacher)(same, batch, 0.0)
        torch.autograd.backward(loss)
        assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
        assert same.logits.grad is not None and float(same.logits.grad.abs().max()) < 1e-12
        mean, per_batch = (
            Objective(task, make_losses({"logits": {"reduction": reduction}}), teacher)(
                student, {"input_ids": batch["input_ids"]}, 0.0
            )
            for reduction in ("mean", "batchmean")
        )
        assert float(per_batch.detach()) == pytest.approx(5 * float(mean.detach()))


BITS: dict[str, tuple[dict[str, Any], str]] = {
    "weights of no bit": ({"weights": "int0 channel"}, "int0"),
    "one bit of inputs": ({"activations": "int1 token"}, "int1"),
    "no such cache": ({"kv": "int0 token"}, "int0"),
    "as many bits as it has": ({"weights": "int64 channel"}, "int64"),
}


@pytest.mark.parametrize("case", BITS)
def test_bits_that_there_are_not(float_folder: Path, tmp_path: Path, case: str) -> None:
    """Check 8: they are refused; the released code leaves out what it can't do."""
    given, wrong = BITS[case]
    with pytest.raises(NybbleError, match=wrong):
        train("llm-qat", float_folder, tmp_path / "out", "self:8", settings=LOOP, **given)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("seq_len", "wrong"), [(5, "the first 5 tokens are given"), (65, "positions for 64")])
def test_lengths_that_leave_nothing_to_draw_or_to_read(
    float_folder: Path, tmp_path: Path, seq_len: int, wrong: str
) -> None:
    with pytest.raises(NybbleError, match=wrong):
        train("llm-qat", float_folder, tmp_path / "out", "self:8", settings={**LOOP, "seq_len": seq_len})
    assert not [*tmp_path.iterdir()]


def test_a_broken_weight_is_named(float_folder: Path, tmp_path: Path) -> None:
    model = loaded(float_folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = float("inf")
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    (tmp_path / "data.jsonl").write_text('{"text": "ba be bi"}\n')
    with pytest.raises(NybbleError, match=r"model\.layers\.1\.mlp\.up_proj.*Inf"):
        train("llm-qat", tmp_path / "broken", tmp_path / "out", str(tmp_path / "data.jsonl"), settings=LOOP)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
