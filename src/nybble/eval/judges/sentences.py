"""What quantization did to an encoder's embeddings: the cosine to those of the float model.

A sentence's embedding is the mean of its tokens' last hidden states, padding left out (Reimers & Gurevych 2019,
arXiv:1908.10084), in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError, UsageError
from nybble.core.progress import Progress, task
from nybble.data.kinds.sentences import PART as SENTENCES
from nybble.data.samples import Wanted
from nybble.eval.judges import Judge, Panel, Verdict

MOST_SENTENCES = 1000


@torch.no_grad()
def embed(model: nn.Module, inputs: Mapping[str, Tensor], batch_size: int = 32) -> Tensor:
    """Embeddings of sentences, float32 [sentences, width].

    Args:
        model: an encoder that gives ``last_hidden_state``.
        inputs: ``input_ids`` and ``attention_mask``, int64 [sentences, tokens].
        batch_size: sentences a forward takes.
    """
    device = next(iter(model.parameters())).device
    found = []
    for start in range(0, len(inputs["input_ids"]), batch_size):
        batch = SENTENCES.batch(inputs, start, start + batch_size, device)
        hidden = model(**batch.inputs).last_hidden_state.float()
        if batch.real is None:
            found.append(hidden.mean(1))
            continue
        mask = batch.real.unsqueeze(-1)
        found.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(found).cpu()


def embedding_cosine(reference: Tensor, embeddings: Tensor) -> dict[str, float]:
    """Cosine to the float embeddings: ``cosine``, the mean over sentences, and ``cosine_min``, the worst.

    Raises:
        ModelError: NaN or infinity.
    """
    cosine = nn.functional.cosine_similarity(reference, embeddings, dim=-1)
    if not bool(torch.isfinite(cosine).all()):
        raise ModelError("the embeddings hold NaN or infinity. Look for NaN weights, or try another dtype.")
    return {"cosine": float(cosine.double().mean()), "cosine_min": float(cosine.min())}


class Sentences(Judge):
    """By the embeddings' cosine."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """One name, which stands for the mean and the worst."""
        return ("cosine",)

    @property
    def comparing(self) -> tuple[str, ...]:
        """It is a cosine between two models."""
        return self.metrics

    def wanted(self, samples: int | None, seq_len: int) -> Wanted:
        """At most a thousand sentences, if nothing is said."""
        return replace(super().wanted(samples or MOST_SENTENCES, seq_len), fewer=True)

    def judge(self, panel: Panel, progress: Progress) -> Verdict:
        """Embed everything with the float model, then with each of the others."""
        if panel.reference is None:
            raise UsageError("an encoder's embeddings are compared with the float model's; give it as the reference.")
        inputs, found = panel.samples.inputs, {}
        with task(progress, len(panel.models) + 1, "evaluate") as bar:
            exact = embed(panel.reference, inputs)
            bar.advance()
            for name, model in panel.models.items():
                found[name] = embedding_cosine(exact, embed(model, inputs))
                bar.advance()
        return Verdict(metrics=found)


PART = Sentences()
