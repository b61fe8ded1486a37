"""The evaluation pipeline on models in memory: each judge against its numbers by hand, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tests.tiny import WORDS, tiny_model, tiny_tokenizer
from torch import nn

from nybble.cli.eval import COMPARING
from nybble.core.errors import DataError, ModelError, UsageError
from nybble.data import ImageSamples, SentenceSamples, make_source, sentence_samples, token_samples
from nybble.eval import evaluate
from nybble.eval.judges import JUDGES, chosen_metrics, judge_of
from nybble.eval.judges.tokens import go_on
from nybble.pipelines.evaluate import run_eval


def tokens(seq_len: int = 12) -> Any:
    text = make_source([" ".join(WORDS[3:] * 4)], name="words", note="")
    return token_samples(text, tiny_tokenizer(), samples=None, seq_len=seq_len)


def sentences() -> SentenceSamples:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<unk>"
    text = make_source(["\n".join(" ".join(WORDS[i : i + 4 + i % 5]) for i in range(3, 40, 3))], name="lines", note="")
    return sentence_samples(text, tokenizer, samples=None, seq_len=12)


def encoder(seed: int = 0) -> Any:
    make: Any = transformers.BertConfig
    torch.manual_seed(seed)
    return transformers.BertModel(
        make(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    )


def pictures(labels: bool) -> ImageSamples:
    x = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    wanted = torch.arange(9) % 4 if labels else None
    return ImageSamples(pixel_values=x, labels=wanted, sha256="", available=9, source="made", note="")


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))


def test_language_models_in_memory() -> None:
    model, other, samples = tiny_model("llama"), tiny_model("llama", seed=1), tokens()
    model.train()
    found = run_eval({"a": model, "b": other}, samples, reference=model)
    assert model.training  # as it was
    for name, one in (("a", model), ("b", other)):
        wanted = evaluate(one, samples.input_ids, ("ppl", "kl", "agreement"), model)
        assert found["models"][name] == wanted.metrics
    assert found["models"]["a"]["kl"] == 0 < found["models"]["b"]["kl"]
    assert found["data"] == {**samples.manifest(), "predictions": wanted.tokens}
    assert run_eval({"a": model}, samples)["models"]["a"].keys() == {"ppl"}
    assert run_eval({"a": model}, samples, metrics=["nll"])["models"]["a"].keys() == {"nll"}


def test_texts_are_what_transformers_generates() -> None:
    model, tokenizer, ids = tiny_model("llama"), tiny_tokenizer(), tokens(40).input_ids
    (sample,) = go_on({"x": model}, tokenizer, ids, 1)
    made = model.generate(ids[:1, :24], max_new_tokens=40, do_sample=False, pad_token_id=2)
    assert sample["prompt"] == tokenizer.decode(ids[0, :24])
    assert sample["x"] == tokenizer.decode(made[0, 24:], skip_special_tokens=True)
    assert len(go_on({"x": model}, tokenizer, ids, 99)) == len(ids)


def test_encoders_in_memory() -> None:
    model, other, samples = encoder(), encoder(1), sentences()
    found = run_eval({"same": model, "other": other}, samples, reference=model)["models"]
    model.eval(), other.eval()
    with torch.no_grad():
        rows = [model, other]
        mask = samples.attention_mask[..., None].float()
        means = [(m(**samples.inputs).last_hidden_state * mask).sum(1) / mask.sum(1) for m in rows]
    by_hand = nn.functional.cosine_similarity(means[0], means[1], dim=-1)
    assert found["same"]["cosine"] == pytest.approx(1)
    assert found["other"]["cosine"] == pytest.approx(float(by_hand.mean()), abs=1e-5)
    assert found["other"]["cosine_min"] == pytest.approx(float(by_hand.min()), abs=1e-5)


def test_plain_networks_in_memory() -> None:
    model, other, samples = classifier(), classifier(1), pictures(labels=True)
    found = run_eval({"same": model, "other": other}, samples, reference=model)["models"]
    with torch.no_grad():
        classes = [m(samples.pixel_values).argmax(-1) for m in (model, other)]
    assert found["same"]["agreement"] == 1
    assert found["other"]["agreement"] == float((classes[0] == classes[1]).double().mean())
    assert found["other"]["top1"] == float((classes[1] == samples.labels).double().mean())
    assert run_eval({"x": model}, samples)["models"]["x"].keys() == {"top1"}
    assert run_eval({"x": model}, samples, metrics=["top1"], reference=other)["models"]["x"].keys() == {"top1"}
    assert run_eval({"x": model}, pictures(False), reference=other)["models"]["x"].keys() == {"agreement"}


def test_the_usual_metrics() -> None:
    assert chosen_metrics("tokens", None, compared=False) == ("ppl",)
    assert chosen_metrics("tokens", None, compared=True) == ("ppl", "kl", "agreement")
    assert chosen_metrics("sentences", None, compared=True) == ("cosine", "kl", "agreement")
    assert chosen_metrics("images", ["agreement"], compared=True) == ("agreement",)
    assert judge_of("sentences").wanted(None, 20).samples == 1000
    assert judge_of("tokens").wanted(None, 20).samples is None


class Broken(nn.Module):
    """Loads, and fails when it runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.parametrize(
    ("kind", "message", "arguments"),
    [
        (UsageError, "nothing to evaluate", lambda: ({}, tokens())),
        (UsageError, r"metric 'cosine' compares with the float model; give it \(--reference MODEL\)",
         lambda: ({"x": tiny_model("llama")}, tokens(), ["cosine"])),
        (UsageError, "no metric is named; there are agreement", lambda: ({"x": encoder()}, sentences(), [])),
        (UsageError, r"unknown metric 'pl'\. Did you mean 'ppl'", lambda: ({"x": encoder()}, sentences(), ["pl"])),
        (UsageError, "give it as the reference", lambda: ({"x": encoder()}, sentences())),
        (UsageError, "made has no labels, and no float model", lambda: ({"x": classifier()}, pictures(False))),
        (UsageError, "has no tokenizer here", lambda: ({"x": tiny_model("llama")}, "builtin")),
        (UsageError, "one reads tokens, two reads sentences",
         lambda: ({"one": tiny_model("llama"), "two": encoder()}, tokens())),
        (ModelError, "x loads, but can't run.*Input type", lambda: ({"x": classifier()}, tokens())),
        (DataError, "sequences of 66 tokens, and the model takes 64",
         lambda: ({"x": tiny_model("llama")}, tokens(66))),
        (ModelError, "x loads, but can't run.*shapes cannot be multiplied",
         lambda: ({"x": nn.Sequential(nn.Conv2d(3, 4, 3), Broken())}, pictures(True))),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_said(kind: Any, message: str, arguments: Any) -> None:
    models, data, *metrics = arguments()
    with pytest.raises(kind, match=message):
        run_eval(models, data, metrics=metrics[0] if metrics else None)


def test_judges_that_are_none() -> None:
    with pytest.raises(ModelError, match=r"nothing judges a model of sounds yet.*nybble\.eval\.judges"):
        judge_of("sounds")
    with pytest.raises(UsageError, match=r"a model of tokens is judged by agreement, kl, nll, ppl; not by cosine"):
        chosen_metrics("tokens", ["cosine"], compared=True)


HEADS: dict[str, Any] = {  # class -> (labels, what an encoder's output says, as [choices, classes])
    "BertForMaskedLM": (2, lambda out, real: out.logits[real]),
    "BertForSequenceClassification": (3, lambda out, real: out.logits),
    "BertForTokenClassification": (2, lambda out, real: out.logits[real]),
    "ElectraForPreTraining": (2, lambda out, real: torch.stack([out.logits[real], 0 * out.logits[real]], -1)),
    "BertForMultipleChoice": (2, lambda out, real: torch.cat([out.logits, 0 * out.logits], -1)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", HEADS)
def test_heads_are_judged_by_what_they_say(name: str) -> None:
    labels, choices = HEADS[name]
    cls: Any = getattr(transformers, name)
    config: Any = cls.config_class(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        num_labels=labels,
    )  # fmt: skip
    torch.manual_seed(2)
    model, other, samples = cls(config).eval(), cls(config).eval(), sentences()
    for parameter in (*model.parameters(), *other.parameters()):
        parameter.mul_(8 if parameter.ndim > 1 else 1)
    found = run_eval({"same": model, "other": other}, samples, reference=model)["models"]
    assert found["same"] == pytest.approx({"cosine": 1, "cosine_min": 1, "kl": 0, "agreement": 1}, abs=1e-6)
    real = samples.attention_mask.bool()
    several = {k: v[:, None] for k, v in samples.inputs.items()} if "Choice" in name else samples.inputs
    p, q = (choices(m(**several), real).log_softmax(-1) for m in (model, other))
    assert found["other"]["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found["other"]["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    hidden: Any = [m.base_model(**samples.inputs).last_hidden_state for m in (model, other)]
    means: Any = [torch.stack([h[i, real[i]].mean(0) for i in range(len(h))]) for h in hidden]
    assert found["other"]["cosine"] == pytest.approx(float(nn.functional.cosine_similarity(*means).mean()), abs=1e-5)


@torch.no_grad()
def test_answers_are_places_of_real_tokens() -> None:
    make: Any = transformers.BertConfig
    config = make(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    cls: Any = transformers.BertForQuestionAnswering
    model, other = (cls(config).eval() for _ in range(2))
    samples = sentences()
    found = run_eval({"other": other}, samples, reference=model, metrics=["kl"])["models"]["other"]
    values = []
    for name in ("start_logits", "end_logits"):
        for row, real in enumerate(samples.attention_mask.bool()):
            p, q = (m(**samples.inputs)[name][row][real].log_softmax(-1) for m in (model, other))
            values.append(float((p.exp() * (p - q)).sum()))
    assert found == {"kl": pytest.approx(sum(values) / len(values), rel=1e-4)}


def test_the_command_line_knows_which_metrics_compare() -> None:
    assert {name for judge in JUDGES.all().values() for name in judge.comparing} == COMPARING
