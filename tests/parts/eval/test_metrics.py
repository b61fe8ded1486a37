"""Metrics in pieces against the same from whole logits in float64, and the rules of evaluate_many."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nybble.core.errors import DataError, ModelError, UsageError
from nybble.eval import METRICS, EvalResult, _evaluate, evaluate, evaluate_many
from nybble.eval._logits import Predictor

ALL = ["ppl", "nll", "kl", "agreement"]
VOCABULARY = 97


def tiny(kind: str = "llama", seed: int = 0, **options: Any) -> nn.Module:
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,  # logits that differ, so that a wrong scale would show
        "pad_token_id": 0,
    }
    if kind in ("gpt2", "opt"):
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "ffn_dim": 48, "word_embed_proj_dim": 16}
    config = transformers.AutoConfig.for_model(kind, **(sizes | options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        torch.manual_seed(seed)
        for parameter in model.parameters():  # a neighbour for other seeds: it often agrees with seed 0, not always
            parameter.data += (0.02 if seed else 0.0) * torch.randn_like(parameter)
    return model.eval()


def token_ids(windows: int = 5, length: int = 19) -> Tensor:
    return torch.randint(0, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(7))


def by_hand(model: nn.Module, reference: nn.Module, tokens: Tensor) -> dict[str, float]:
    """The definitions, from whole logits in float64."""
    with torch.no_grad():
        q = model(tokens).logits[:, :-1].double().log_softmax(-1)
        p = reference(tokens).logits[:, :-1].double().log_softmax(-1)
    nll = -q.gather(-1, tokens[:, 1:, None]).mean().item()
    return {
        "nll": nll,
        "ppl": math.exp(nll),
        "kl": (p.exp() * (p - q)).sum(-1).mean().item(),
        "agreement": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
    }


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head calls of 7 rows and steps of 3, so that pieces end inside windows."""
    monkeypatch.setattr(_evaluate, "_HEAD_BYTES", 7 * VOCABULARY * 4)
    monkeypatch.setattr(_evaluate, "_CACHE_BYTES", 3 * VOCABULARY * 4)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "opt", "granite"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_pieces_equal_whole_logits(kind: str, batch_size: int) -> None:
    options = {"gemma2": {"final_logit_softcapping": 2.0}, "granite": {"logits_scaling": 3.0}}.get(kind, {})
    reference, model, tokens = tiny(kind, 0, **options), tiny(kind, 1, **options), token_ids()
    assert Predictor(model, tokens).in_pieces == (kind != "granite")  # its logits are scaled after the head
    found = evaluate(model, tokens, ALL, reference, batch_size=batch_size)
    expected = by_hand(model, reference, tokens)
    assert found.tokens == 5 * 18
    assert list(found.metrics) == ALL
    # float32 logits of about 10, each sum over 97 terms: errors of 1e-6, averaged.
    assert found.metrics == pytest.approx(expected, rel=1e-5)
    assert expected["kl"] > 0.01
    assert 0.1 < expected["agreement"] < 1


@pytest.mark.usefixtures("small_pieces")
def test_bfloat16_equals_whole_logits_of_the_same_dtype() -> None:
    reference, model, tokens = tiny("llama", 0).bfloat16(), tiny("llama", 1).bfloat16(), token_ids()
    found = evaluate(model, tokens, ALL, reference)
    # A bfloat16 product may round otherwise for other numbers of rows: 2**-8 of single logits.
    assert found.metrics == pytest.approx(by_hand(model, reference, tokens), rel=0.01)


class Counted(nn.Module):
    """A bare language model: logits as a tensor, forwards counted."""

    def __init__(self, seed: int = 0, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)))
        self.calls = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return self.table[ids]


def test_reference_runs_once_a_batch_and_may_be_a_row() -> None:
    reference, tokens = Counted(0), token_ids(6)
    models = {"float": reference, "one": Counted(1), "two": Counted(2)}
    found = evaluate_many(reference, models, tokens, ALL, batch_size=2)
    assert [model.calls for model in models.values()] == [1 + 3] * 3  # the probe, then each batch
    assert (found["float"].metrics["kl"], found["float"].metrics["agreement"]) == (0.0, 1.0)
    assert found["one"] == evaluate(models["one"], tokens, ALL, reference, batch_size=2)
    assert found["two"].metrics["kl"] > 0.1


def test_reference_does_not_run_when_nothing_is_compared() -> None:
    reference = Counted(0)
    evaluate(Counted(1), token_ids(), ["ppl"], reference)
    assert reference.calls == 0


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    model = Counted()
    model.table.data.zero_()
    found = evaluate(model, token_ids(), ["ppl"])
    assert found == EvalResult(metrics={"ppl": found.metrics["ppl"]}, tokens=5 * 18)
    assert found.metrics["ppl"] == pytest.approx(VOCABULARY, rel=1e-6)


def test_kl_of_a_known_pair() -> None:
    """Two tokens, p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 log 3/2 + 1/4 log 1/2; the other direction differs."""
    reference, model = Counted(vocabulary=2), Counted(vocabulary=2)
    reference.table.data[:] = torch.tensor([3.0, 1.0]).log()
    model.table.data.zero_()
    kl = evaluate(model, torch.tensor([[0, 1, 1]]), ["kl"], reference).metrics["kl"]
    assert kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)


def test_large_logits_do_not_overflow() -> None:
    model = Counted()
    model.table.data.mul_(1e4)
    found = evaluate(model, token_ids(), ALL, model).metrics
    assert found["kl"] == 0.0
    assert found["ppl"] == math.inf
    assert math.isfinite(found["nll"])


def test_training_mode_and_gradients_are_left_alone() -> None:
    model = tiny().train()
    inner = next(iter(model.children())).eval()
    evaluate(model, token_ids(1), ["ppl"])
    assert model.training
    assert not inner.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (UsageError, "unknown metric 'pl'.*Did you mean 'ppl'", lambda m: evaluate(m, token_ids(), ["pl"])),
        (UsageError, "'kl' compares with the float model", lambda m: evaluate(m, token_ids(), ["kl"])),
        (UsageError, "nothing to evaluate", lambda m: evaluate(m, token_ids(), [])),
        (UsageError, "nothing to evaluate", lambda m: evaluate_many(m, {}, token_ids())),
        (UsageError, "batch_size is 0", lambda m: evaluate(m, token_ids(), batch_size=0)),
        (DataError, "int64", lambda m: evaluate(m, token_ids().int())),
        (DataError, "int64", lambda m: evaluate(m, token_ids()[0])),
        (DataError, r"\[5, 1\] leave nothing", lambda m: evaluate(m, token_ids()[:, :1])),
        (DataError, r"\[0, 19\] leave nothing", lambda m: evaluate(m, token_ids()[:0])),
        (DataError, "model: tokens from 0 to 500 don't fit a vocabulary of 97", lambda m: evaluate(m, past_the_end())),
        (ModelError, "logits over 50 tokens, the reference over 97", lambda m: compare(m, Counted(vocabulary=50))),
        (ModelError, "bad: kl came out as nan", lambda m: compare(m, broken())),
    ],
)
def test_what_cannot_be_evaluated(error: type[Exception], message: str, call: Callable[[nn.Module], object]) -> None:
    with pytest.raises(error, match=message):
        call(tiny())


def compare(reference: nn.Module, bad: nn.Module) -> object:
    return evaluate_many(reference, {"good": reference, "bad": bad}, token_ids() % 50, ["kl"])


def broken() -> nn.Module:
    model = tiny()
    next(model.parameters()).data.fill_(math.nan)
    return model


def past_the_end() -> Tensor:
    tokens = token_ids()
    tokens[0, 0], tokens[-1, -1] = 0, 500
    return tokens


def test_metrics_are_described() -> None:
    assert METRICS.names() == sorted(ALL)
    assert [name for name, metric in METRICS.all().items() if metric.needs_reference] == ["agreement", "kl"]
