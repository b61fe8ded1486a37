"""What quantization did to an encoder's embeddings: the cosine to those of the float model.

A sentence's embedding is the mean of its tokens' last hidden states, padding left out (Reimers & Gurevych 2019,
arXiv:1908.10084), in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError


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
        given = {name: tensor[start : start + batch_size].to(device) for name, tensor in inputs.items()}
        hidden = model(**given).last_hidden_state.float()
        mask = given["attention_mask"].unsqueeze(-1)
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
