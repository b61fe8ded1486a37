"""Calibration and evaluation data: where it comes from, and how it becomes what a model is called with."""

from __future__ import annotations

from nybble.data.images import ImageSamples, image_samples, preparation_for
from nybble.data.samples import InMemory, Origin, Samples, Wanted
from nybble.data.sentences import SentenceSamples, sentence_samples
from nybble.data.text import SOURCES, Part, Source, TextSource, load_text, make_source
from nybble.data.tokens import TokenSamples, token_samples

__all__ = [
    "SOURCES",
    "ImageSamples",
    "InMemory",
    "Origin",
    "Part",
    "Samples",
    "SentenceSamples",
    "Source",
    "TextSource",
    "TokenSamples",
    "Wanted",
    "image_samples",
    "load_text",
    "make_source",
    "preparation_for",
    "sentence_samples",
    "token_samples",
]
