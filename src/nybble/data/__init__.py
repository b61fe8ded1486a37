"""Calibration and evaluation data: where text comes from, and how it becomes sequences of tokens."""

from __future__ import annotations

from nybble.data.text import SOURCES, Part, Source, TextSource, load_text, make_source
from nybble.data.tokens import TokenSamples, token_samples

__all__ = ["SOURCES", "Part", "Source", "TextSource", "TokenSamples", "load_text", "make_source", "token_samples"]
