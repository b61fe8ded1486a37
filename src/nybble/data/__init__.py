"""Calibration and evaluation data: where text comes from, and how it becomes sequences of tokens."""

from __future__ import annotations

from nybble.data.images import ImageSamples, image_samples, preparation_for
from nybble.data.sentences import SentenceSamples, sentence_samples
from nybble.data.text import SOURCES, Part, Source, TextSource, load_text, make_source
from nybble.data.tokens import TokenSamples, token_samples

Samples = TokenSamples | SentenceSamples | ImageSamples
"""What a model can be calibrated on."""

__all__ = [
    "SOURCES",
    "ImageSamples",
    "Part",
    "Samples",
    "SentenceSamples",
    "Source",
    "TextSource",
    "TokenSamples",
    "image_samples",
    "load_text",
    "make_source",
    "preparation_for",
    "sentence_samples",
    "token_samples",
]
