"""Calibration and evaluation data: where it comes from, and how it becomes what a model is called with.

Names are imported when they are asked for: whether a file of text is there is known without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nybble.core.imports import lazily

if TYPE_CHECKING:
    from nybble.data.images import ImageSamples as ImageSamples
    from nybble.data.images import image_samples as image_samples
    from nybble.data.images import preparation_for as preparation_for
    from nybble.data.pairs import PairSamples as PairSamples
    from nybble.data.pairs import pair_samples as pair_samples
    from nybble.data.samples import InMemory as InMemory
    from nybble.data.samples import Origin as Origin
    from nybble.data.samples import Samples as Samples
    from nybble.data.samples import Wanted as Wanted
    from nybble.data.sentences import SentenceSamples as SentenceSamples
    from nybble.data.sentences import sentence_samples as sentence_samples
    from nybble.data.text import SOURCES as SOURCES
    from nybble.data.text import Part as Part
    from nybble.data.text import Source as Source
    from nybble.data.text import TextSource as TextSource
    from nybble.data.text import load_text as load_text
    from nybble.data.text import make_source as make_source
    from nybble.data.tokens import TokenSamples as TokenSamples
    from nybble.data.tokens import token_samples as token_samples

_NAMES = {
    "ImageSamples": "nybble.data.images",
    "image_samples": "nybble.data.images",
    "preparation_for": "nybble.data.images",
    "PairSamples": "nybble.data.pairs",
    "pair_samples": "nybble.data.pairs",
    "InMemory": "nybble.data.samples",
    "Origin": "nybble.data.samples",
    "Samples": "nybble.data.samples",
    "Wanted": "nybble.data.samples",
    "SentenceSamples": "nybble.data.sentences",
    "sentence_samples": "nybble.data.sentences",
    "SOURCES": "nybble.data.text",
    "Part": "nybble.data.text",
    "Source": "nybble.data.text",
    "TextSource": "nybble.data.text",
    "load_text": "nybble.data.text",
    "make_source": "nybble.data.text",
    "TokenSamples": "nybble.data.tokens",
    "token_samples": "nybble.data.tokens",
}

__all__ = [*_NAMES]
__getattr__ = lazily(__name__, _NAMES)
