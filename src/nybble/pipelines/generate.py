"""Text from a model: load, apply the chat template if there is one, decode what is new."""

from __future__ import annotations

from typing import Any

import torch

from nybble.core.errors import ModelError
from nybble.core.explicit import explicit_settings
from nybble.core.seeds import derive_seed, preserve_global_rng
from nybble.data.kinds import data_kind
from nybble.models.adapter import reads_of
from nybble.nn.decoding import Decoding, decoding_of
from nybble.nn.kv_model import use_quantized_cache
from nybble.nn.swap import hold_slow
from nybble.pipelines.load import load_with_origin
from nybble.pipelines.request import check_prompt

_HARMLESS = frozenset({
    "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "do_sample",
    "temperature", "top_k", "top_p", "max_length", "max_new_tokens", "use_cache", "output_attentions",
    "output_hidden_states",
})  # fmt: skip


@explicit_settings()
def generate(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    chat: bool = True,
    sample: bool = False,
    seed: int = 0,
    device: str = "cpu",
    kv: str | None = None,
) -> str:
    """Answer or continue ``prompt``.

    Args:
        model: what :func:`nybble.checkpoint.load.load` takes; packed weights are dequantized
            once, where no kernel multiplies with them as they are.
        prompt: some text.
        max_new_tokens: at most so many.
        chat: use the tokenizer's chat template, if it has one.
        sample: draw from the model's distribution instead of taking the likeliest token.
        seed: for ``sample``; the caller's random state stays as it is.
        device: where to run.
        kv: what to cache keys and values in, a line of :class:`nybble.kv_format.KVFormat`; ``none`` is float. Default
            is what a quantized folder says, else float.

    Returns:
        The new text alone.
    """
    cached = check_prompt(prompt, max_new_tokens, device, kv)
    loaded, origin = load_with_origin(model, device=device)
    hold_slow(loaded, loaded.dtype)
    tokenizer = data_kind(reads_of(loaded)).tokenizer(origin) if loaded.can_generate() else None
    if tokenizer is None:
        raise ModelError(f"{model} is a {type(loaded).__name__}, which generates no text.")
    if cached is not None:
        use_quantized_cache(loaded, cached if cached.stores else None)
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        inputs: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"].to(device)
    decoding = None if sample or not _plain(loaded) else decoding_of(loaded, 1, ids.shape[1] + max_new_tokens)
    if decoding is not None:
        new = torch.tensor(_likeliest(decoding, ids, max_new_tokens, _ends(loaded)))
    else:
        new = _generated(loaded, tokenizer, ids, max_new_tokens, sample, seed)
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


def _generated(loaded: Any, tokenizer: Any, ids: torch.Tensor, count: int, sample: bool, seed: int) -> torch.Tensor:
    """What transformers' ``generate`` adds."""
    with preserve_global_rng(), torch.no_grad():
        torch.manual_seed(derive_seed(seed, "generate"))
        made = loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=sample,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    found: torch.Tensor = made[0] if loaded.config.is_encoder_decoder else made[0, ids.shape[1] :]
    return found


def _plain(loaded: Any) -> bool:
    """Whether the likeliest token is what the model's settings for generating ask for, and nothing else."""
    return set(loaded.generation_config.to_diff_dict()) <= _HARMLESS


def _ends(loaded: Any) -> frozenset[int]:
    found = loaded.generation_config.eos_token_id
    return frozenset([] if found is None else [found] if isinstance(found, int) else found)


def _likeliest(decoding: Decoding, ids: torch.Tensor, count: int, ends: frozenset[int]) -> list[int]:
    """At most ``count`` tokens behind a prompt [1, tokens], up to the first that ends the text."""
    found = [int(decoding.read(ids).argmax(-1))]
    while len(found) < count and found[-1] not in ends:
        found.append(int(decoding.step(torch.tensor(found[-1:])).argmax(-1)))
    return found
