"""What quantization did to an encoder: the cosine of its embeddings to the float model's, and what its head says.

A sentence's embedding is pooled of its tokens' last hidden states in float32, as each model's own folder says
(:mod:`nybble.eval._pooling`). A model in memory has no folder and is pooled as the other side is. A head's logits
(classes of a token or a sentence, the vocabulary of a masked language model) are compared as probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError, UsageError
from nybble.core.progress import Progress, task
from nybble.data.kinds import Batch
from nybble.data.kinds.sentences import PART as SENTENCES
from nybble.data.samples import InMemory, Origin, Wanted
from nybble.eval._heads import HEAD_METRICS, Heads
from nybble.eval._pooling import Pooling, read_pooling
from nybble.eval.judges import Judge, Panel, Verdict

MOST_SENTENCES = 1000
BATCH = 32
"""Sentences that a forward takes; fewer where logits over a vocabulary are wide."""
_LOGIT_BYTES = 256 * 2**20  # of a forward's logits in float32


@dataclass(frozen=True)
class Said:
    """What an encoder makes of some sentences: last hidden states [B, T, W] in float32, and logits by head."""

    hidden: Tensor | None
    logits: dict[str, Tensor]


def call_encoder(model: Any, inputs: Mapping[str, Tensor]) -> Any:
    """The output of an encoder; one that chooses among several gets a single one."""
    if type(model).__name__.endswith("ForMultipleChoice"):
        inputs = {name: tensor[:, None] for name, tensor in inputs.items()}
    return model(**inputs)


def ask(model: Any, inputs: Mapping[str, Tensor]) -> Said:
    """Run an encoder, with or without a head; the bare one inside is listened to.

    Raises:
        ModelError: it gives neither hidden states nor logits; or they hold NaN or infinity.
    """
    seen: list[Any] = []
    handle = getattr(model, "base_model", model).register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        output = call_encoder(model, inputs)
    finally:
        handle.remove()
    hidden = getattr(seen[-1], "last_hidden_state", None) if seen else None
    named = dict(output) if isinstance(output, Mapping) else {}
    logits = {name: t for name, t in named.items() if name.endswith("logits") and isinstance(t, Tensor)}
    if hidden is None and not logits:
        raise ModelError(f"{type(model).__name__} gives neither hidden states nor logits, so it can't be judged.")
    if not all(bool(torch.isfinite(t).all()) for t in logits.values()):
        raise ModelError("the logits hold NaN or infinity. Look for NaN weights, or try another dtype.")
    return Said(None if hidden is None else hidden.float(), logits)


@torch.no_grad()
def embed(
    model: nn.Module, inputs: Mapping[str, Tensor], batch_size: int = BATCH, pooling: Pooling | None = None
) -> Tensor:
    """Embeddings of sentences, float32 [sentences, width].

    Args:
        model: an encoder that gives ``last_hidden_state``, or one with a head on it.
        inputs: ``input_ids`` and ``attention_mask``, int64 [sentences, tokens].
        batch_size: sentences a forward takes.
        pooling: from token vectors to a sentence's; default, their mean.

    Raises:
        ModelError: no hidden states.
    """
    found = []
    for start in range(0, len(inputs["input_ids"]), batch_size):
        batch = SENTENCES.batch(inputs, start, start + batch_size, _device(model))
        hidden = ask(model, batch.inputs).hidden
        if hidden is None:
            raise ModelError(f"{type(model).__name__} gives no last hidden states, so it has no embeddings.")
        found.append((pooling or Pooling())(hidden, batch.real))
    return torch.cat(found).cpu()


def embedding_cosine(reference: Tensor, embeddings: Tensor) -> dict[str, float]:
    """Cosine to the float embeddings: ``cosine``, the mean over sentences, and ``cosine_min``, the worst.

    Raises:
        ModelError: embeddings of another width, NaN or infinity.
    """
    if reference.shape != embeddings.shape:
        raise ModelError(
            f"embeddings of {embeddings.shape[-1]} values, and the float model's have {reference.shape[-1]}."
        )
    cosine = nn.functional.cosine_similarity(reference, embeddings, dim=-1)
    if not bool(torch.isfinite(cosine).all()):
        raise ModelError("the embeddings hold NaN or infinity. Look for NaN weights, or try another dtype.")
    return {"cosine": float(cosine.double().mean()), "cosine_min": float(cosine.min())}


class Sentences(Judge):
    """By the embeddings' cosine, and by what a head says."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The first stands for the mean and the worst; the others need a head."""
        return ("cosine", *HEAD_METRICS)

    @property
    def comparing(self) -> tuple[str, ...]:
        """It is a cosine between two models."""
        return self.metrics

    def wanted(self, samples: int | None, seq_len: int) -> Wanted:
        """At most a thousand sentences, if nothing is said."""
        return replace(super().wanted(samples or MOST_SENTENCES, seq_len), fewer=True)

    def call(self, model: Any, inputs: Mapping[str, Tensor]) -> Any:
        """As an encoder."""
        return call_encoder(model, inputs)

    @torch.no_grad()
    def judge(self, panel: Panel, progress: Progress) -> Verdict:
        """Some sentences at a time, by the float model and all others; what they don't give is left out."""
        if panel.reference is None:
            raise UsageError("an encoder's embeddings are compared with the float model's; give it as the reference.")
        pooling, inputs = _poolings(panel), panel.samples.inputs
        size = _at_once(panel.reference, inputs["input_ids"].shape[1])
        starts = range(0, len(inputs["input_ids"]), size)
        embedded: dict[str | None, list[Tensor]] = {name: [] for name in pooling}
        heads = {name: Heads() for name in panel.models}
        with task(progress, len(starts), "evaluate") as bar:
            for start in starts:
                batch = SENTENCES.batch(inputs, start, start + size, _device(panel.reference))
                exact = ask(panel.reference, batch.inputs)
                for name, model in [(None, panel.reference), *panel.models.items()]:
                    said = exact if model is panel.reference else ask(model, batch.inputs)
                    if said.hidden is not None:
                        embedded[name].append(pooling[name](said.hidden, batch.real).cpu())
                    if name is not None:
                        heads[name].add(said.logits, exact.logits, _real(batch), _labels(panel.reference))
                bar.advance()
        found = {name: _results(embedded[None], embedded[name], heads[name], panel.metrics) for name in panel.models}
        if not all(found.values()):
            raise UsageError(f"{type(panel.reference).__name__} gives nothing for {' or '.join(panel.metrics)}.")
        return Verdict(metrics=found, counts={"pooling": "; ".join(dict.fromkeys(p.words for p in pooling.values()))})


def _poolings(panel: Panel) -> dict[str | None, Pooling]:
    """Each model's, by name, and the reference's under None; of a model in memory the other side's."""
    origins: dict[str | None, Origin | None] = {None: panel.reference_origin}
    origins |= {name: panel.origins.get(name) for name in panel.models}
    known = {name: read_pooling(o) for name, o in origins.items() if o is not None and not isinstance(o, InMemory)}
    usual = next((pooling for pooling in known.values()), Pooling())
    return {name: known.get(name, usual) for name in origins}


def _results(exact: list[Tensor], own: list[Tensor], heads: Heads, metrics: Sequence[str]) -> dict[str, float]:
    found = heads.results()
    if exact and own and "cosine" in metrics:
        found |= embedding_cosine(torch.cat(exact), torch.cat(own))
    return {name: value for name, value in found.items() if name.partition("_")[0] in metrics}


def _at_once(model: Any, tokens: int) -> int:
    """Sentences that a forward takes: few where there is a logit for every word."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    words = 1 if head is None else model.config.get_text_config().vocab_size
    return max(1, min(BATCH, _LOGIT_BYTES // (4 * tokens * words)))


def _real(batch: Batch) -> Tensor:
    return torch.ones_like(batch.inputs["input_ids"], dtype=torch.bool) if batch.real is None else batch.real


def _labels(model: Any) -> int:
    return int(getattr(model.config, "num_labels", 0))


def _device(model: nn.Module) -> torch.device:
    return next(iter(model.parameters())).device


PART = Sentences()
