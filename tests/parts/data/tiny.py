"""A tokenizer of a few words, made on the spot."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["<unk>", "<bos>", "<eos>", *"abcdefgh"]


def tiny_tokenizer(*, bos: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """A token per word a to h (ids 3 to 10); ``bos``: like Llama 2, it starts every text with <bos>."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>" if eos else None
    )
