"""Distillation as LLM-QAT, BiT and TBT have it (checks 5, 6, 7 of their sheets), in float64, against torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from nybble.core.errors import ModelError, NybbleError, SchemeError
from nybble.training.losses import LOSSES, Lesson, Loss

SHAPE = (3, 5, 7)
"""Samples, tokens, classes."""
REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


def loss(name: str, **options: Any) -> Loss:
    made: Loss = LOSSES.make(name, options)
    return made


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def lesson(student: Tensor, teacher: Tensor | None, real: Tensor = REAL, kind: str = "logits") -> Lesson:
    """Of outputs that have one tensor each, or of hidden states and maps one layer."""
    outputs = [
        None if x is None else SimpleNamespace(**{kind: x if kind == "logits" else (x,)}) for x in (student, teacher)
    ]
    return Lesson(student=outputs[0], teacher=outputs[1], batch={"attention_mask": real}, counted=real.bool())


@pytest.mark.parametrize("form", ["ce", "kl"])
def test_the_gradient_of_logits_is_the_difference_of_probabilities(form: str) -> None:
    student, teacher = draw(*SHAPE).requires_grad_(), draw(*SHAPE, seed=1)
    torch.autograd.backward(loss("logits", form=form)(lesson(student, teacher)))
    wanted = (student.softmax(-1) - teacher.softmax(-1)) / REAL.sum() * REAL[..., None]
    torch.testing.assert_close(student.grad, wanted.detach(), atol=1e-14, rtol=1e-12)
    warm = student.detach().clone().requires_grad_()
    torch.autograd.backward(loss("logits", form=form, temperature=2.0)(lesson(warm, teacher)))
    wanted = 2 * ((warm / 2).softmax(-1) - (teacher / 2).softmax(-1)) / REAL.sum() * REAL[..., None]
    torch.testing.assert_close(warm.grad, wanted.detach(), atol=1e-14, rtol=1e-12)


def test_a_student_that_is_its_teacher_has_its_entropy_or_nothing_to_learn() -> None:
    teacher = draw(*SHAPE)
    known: Any = torch.distributions.Categorical(logits=teacher)
    entropy = known.entropy()[REAL.bool()].mean()
    for form, wanted in (("ce", entropy), ("kl", torch.zeros_like(entropy)), ("mse", torch.zeros_like(entropy))):
        student, made = teacher.clone().requires_grad_(), loss("logits", form=form)
        found = made(lesson(student, teacher))
        torch.testing.assert_close(found, wanted, atol=1e-14, rtol=1e-12)
        torch.testing.assert_close(made.entropy(lesson(student, teacher)).double(), wanted, atol=1e-14, rtol=1e-12)
        torch.autograd.backward(found)
        torch.testing.assert_close(student.grad, torch.zeros(SHAPE, dtype=torch.float64), atol=1e-15, rtol=0)


def test_reductions_are_those_of_the_released_codes() -> None:
    """LLM-QAT's batchmean of [samples, tokens, classes]: T times the mean a token; BiT's mean over classes too."""
    student, teacher = draw(*SHAPE), draw(*SHAPE, seed=1)
    given = lesson(student, teacher, torch.ones_like(REAL))
    per_token = loss("logits", form="kl")(given)
    theirs = functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(loss("logits", form="kl", reduction="batchmean")(given), theirs)
    torch.testing.assert_close(theirs, SHAPE[1] * per_token)
    theirs = -(teacher.softmax(-1) * student.log_softmax(-1)).mean()
    torch.testing.assert_close(loss("logits", form="ce", reduction="elements")(given), theirs)
    torch.testing.assert_close(
        loss("logits", form="mse", reduction="elements")(given), functional.mse_loss(student, teacher)
    )
    flat = functional.cross_entropy(student.flatten(0, 1), teacher.softmax(-1).flatten(0, 1))
    torch.testing.assert_close(loss("logits", form="ce")(given), flat)
    for form, temperature in (("ce", 3.0), ("kl", 0.5), ("mse", 1.0)):
        made = loss("logits", form=form, temperature=temperature)
        again = draw(*SHAPE).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, made=made: made(lesson(x, teacher)), again)


def test_the_option_of_padding_changes_padded_rows_alone() -> None:
    teacher = draw(*SHAPE, seed=1)
    for name, kind, shape in (("logits", "logits", SHAPE), ("hidden", "hidden_states", SHAPE)):
        grads = []
        for padding in (False, True):
            student = draw(*shape).requires_grad_()
            torch.autograd.backward(loss(name, padding=padding)(lesson(student, teacher, kind=kind)))
            assert student.grad is not None
            grads.append(student.grad * (REAL.numel() if padding else REAL.sum()))
        torch.testing.assert_close(grads[0][REAL.bool()], grads[1][REAL.bool()])
        assert (grads[0][~REAL.bool()] == 0).all() and (grads[1][~REAL.bool()] != 0).all()


def test_maps_count_where_both_tokens_are_real() -> None:
    shape = (3, 2, 5, 5)
    student, teacher = draw(*shape).softmax(-1), draw(*shape, seed=1).softmax(-1)
    both = (REAL[:, None, :, None] * REAL[:, None, None, :]).bool().expand(shape)
    found = loss("attention")(lesson(student, teacher, kind="attentions"))
    torch.testing.assert_close(found, functional.mse_loss(student[both], teacher[both]))
    found = loss("attention", padding=True)(lesson(student, teacher, kind="attentions"))
    torch.testing.assert_close(found, functional.mse_loss(student, teacher))


def test_a_head_that_gives_one_number() -> None:
    """Its soft cross-entropy is 0 whatever it says; squared differences teach."""
    student, teacher = draw(4, 1).requires_grad_(), draw(4, 1, seed=1)
    given = lesson(student, teacher, torch.ones(4))
    for form in ("ce", "kl"):
        with pytest.raises(ModelError, match=rf"one number a row.*form {form} would teach nothing. Take form: mse"):
            loss("logits", form=form)(given)
    torch.testing.assert_close(loss("logits", form="mse")(given), functional.mse_loss(student, teacher))


# ------------------------------------------------------------------------------------------------- of real networks
SIZES: dict[str, Any] = {
    "vocab_size": 60, "max_position_embeddings": 32, "pad_token_id": 0, "attn_implementation": "eager",
}  # fmt: skip
BERT = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
BART = {
    **SIZES, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip


def network(family: str, config: dict[str, Any], seed: int = 0, **changes: Any) -> Any:
    made: Any = getattr(
        transformers, {"bert": "BertForSequenceClassification", "bart": "BartForConditionalGeneration"}[family]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return made(transformers.AutoConfig.for_model(family, **{**config, **changes})).double().eval()


def batch_of(family: str) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments, and which rows of logits are real."""
    ids = torch.randint(3, 60, (3, 5), generator=torch.Generator().manual_seed(2))
    given = {"input_ids": ids * REAL, "attention_mask": REAL}
    if family == "bert":
        return {**given, "labels": torch.tensor([0, 1, 0])}, torch.ones(3, dtype=torch.bool)
    labels = torch.tensor([[7, 8, 9, 2], [4, 2, -100, -100], [5, 6, 2, -100]])
    return {**given, "labels": labels}, labels != -100


def taught(family: str, student: Any, teacher: Any, *made: Loss) -> Lesson:
    batch, counted = batch_of(family)
    asked = {name: True for each in made for name in each.outputs}
    with torch.no_grad():
        known = teacher(**batch, **asked)
    return Lesson(student=student(**batch, **asked), teacher=known, batch=batch, counted=counted)


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_a_network_is_not_moved_by_itself(family: str) -> None:
    config = BERT if family == "bert" else BART
    student = network(family, config)
    made = [loss("hidden"), loss("attention"), loss("logits", form="kl")]
    found = [each(taught(family, student, network(family, config), *made)) for each in made]
    assert [x.item() for x in found[:2]] == [0, 0] and found[2].item() == pytest.approx(0, abs=1e-15)
    torch.autograd.backward(torch.stack(found).sum())
    assert all(p.grad is None or p.grad.abs().max() < 1e-15 for p in student.parameters())


def test_every_layer_of_both_sides_counts() -> None:
    """Hidden states of embeddings and all layers, and all three kinds of maps, each by torch's own mse_loss."""
    student, teacher = network("bart", BART), network("bart", BART, seed=1)
    batch, counted = batch_of("bart")
    given = taught("bart", student, teacher, loss("hidden"), loss("attention"))
    a, b = given.student, given.teacher

    def mean(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        if columns is None:
            return functional.mse_loss(x[rows], y[rows])
        both = (rows[:, None, :, None] & columns[:, None, None, :]).expand(x.shape)
        return functional.mse_loss(x[both], y[both])

    encoder, decoder = REAL.bool(), counted
    states = [mean(x, y, encoder) for x, y in zip(a.encoder_hidden_states, b.encoder_hidden_states, strict=True)]
    states += [mean(x, y, decoder) for x, y in zip(a.decoder_hidden_states, b.decoder_hidden_states, strict=True)]
    assert len(states) == 3 + 4
    torch.testing.assert_close(loss("hidden")(given), sum(states))
    chosen = [states[0], states[2], states[3], states[6]]
    torch.testing.assert_close(loss("hidden", layers=[0, -1])(given), sum(chosen))
    maps = []
    for name, rows, columns in (
        ("encoder_attentions", encoder, encoder), ("decoder_attentions", decoder, decoder),
        ("cross_attentions", decoder, encoder),
    ):  # fmt: skip
        maps += [mean(x, y, rows, columns) for x, y in zip(a[name], b[name], strict=True)]
    assert len(maps) == 2 + 3 + 3
    torch.testing.assert_close(loss("attention")(given), sum(maps))
    whole = [functional.mse_loss(x, y) for x, y in zip(a.cross_attentions, b.cross_attentions, strict=True)]
    only = SimpleNamespace(cross_attentions=a.cross_attentions), SimpleNamespace(cross_attentions=b.cross_attentions)
    bare = Lesson(student=only[0], teacher=only[1], batch=batch, counted=counted)
    torch.testing.assert_close(loss("attention", padding=True)(bare), sum(whole))
    for each in (loss("hidden"), loss("attention")):
        grads: tuple[Tensor | None, ...] = torch.autograd.grad(
            each(given), [*student.parameters()], allow_unused=True, retain_graph=True
        )
        assert any(g is not None and g.abs().max() > 0 for g in grads)


def test_the_task_s_loss_is_the_networks_own() -> None:
    student = network("bert", BERT)
    given = taught("bert", student, student)
    wanted = functional.cross_entropy(given.student.logits, given.batch["labels"])
    torch.testing.assert_close(loss("task")(given), wanted)
    assert not loss("task").taught
    assert loss("task").entropy(given) == 0
    half = SimpleNamespace(loss=wanted.to(torch.bfloat16))
    assert loss("task")(Lesson(student=half, teacher=None, batch={}, counted=given.counted)).dtype == torch.float32
    without = SimpleNamespace(logits=given.student.logits, loss=None)
    with pytest.raises(ModelError, match="without a loss; call it with labels"):
        loss("task")(Lesson(student=without, teacher=None, batch={}, counted=given.counted))


def test_networks_that_can_not_be_compared() -> None:
    bert = network("bert", BERT)
    cases: list[tuple[Loss, dict[str, int], type[NybbleError], str]] = [
        (loss("hidden"), {"hidden_size": 16}, ModelError, r"hidden_states\[0\] is 3 x 5 x 32 of the student"),
        (loss("hidden"), {"num_hidden_layers": 2}, ModelError, "student has 4 hidden_states, the teacher 3"),
        (loss("hidden", layers=[1, 4]), {}, SchemeError, "layers names 4, and there are 4 hidden_states, 0 to 3"),
        (loss("attention"), {"num_attention_heads": 2}, ModelError, r"attentions\[0\] is 3 x 4 x 5 x 5 of the student"),
        (loss("logits"), {"num_labels": 3}, ModelError, "student's logits are 3 x 2, the teacher's 3 x 3"),
    ]
    for made, changes, error, message in cases:
        teacher = network("bert", BERT, **changes)
        batch = {name: x for name, x in batch_of("bert")[0].items() if name != "labels"}
        asked = dict.fromkeys(made.outputs, True)
        given = Lesson(
            student=bert(**batch, **asked), teacher=teacher(**batch, **asked), batch=batch, counted=torch.ones(3).bool()
        )
        with pytest.raises(error, match=message):
            made(given)


def test_maps_that_an_attention_does_not_make() -> None:
    fast = network("bert", BERT, attn_implementation="sdpa")
    made = loss("attention")
    for student, teacher, who in ((fast, network("bert", BERT), "student"), (network("bert", BERT), fast, "teacher")):
        with pytest.raises(ModelError, match=rf"{who} gives no .*attentions.*set_attn_implementation\('eager'\)"):
            made(taught("bert", student, teacher, made))
    with pytest.raises(ModelError, match=r"student gives no hidden_states or .*output_hidden_states=True"):
        loss("hidden")(taught("bert", fast, fast))


def test_other_bad_requests() -> None:
    x = draw(*SHAPE)
    with pytest.raises(ModelError, match="loss logits compares with a teacher, and there is none"):
        loss("logits")(lesson(x, None))
    bare = Lesson(student=SimpleNamespace(), teacher=SimpleNamespace(), batch={}, counted=REAL.bool())
    with pytest.raises(ModelError, match="student gives SimpleNamespace without logits; take loss hidden"):
        loss("logits")(bare)
    with pytest.raises(ModelError, match=r"hidden_states has 5 tokens, and what is padding is known of 3 x 4"):
        loss("hidden")(lesson(x, x, REAL[:, :4], "hidden_states"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"form": "mse", "temperature": 2.0}, "leave temperature out"),
        ({"form": "nll"}, "form is kl or ce or mse"),
        ({"warmth": 2}, "no option 'warmth'"),
    ]
    for options, message in cases:
        with pytest.raises(SchemeError, match=message):
            loss("logits", **options)
