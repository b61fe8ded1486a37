"""Padded sentences with special tokens: what encoders read. :mod:`nybble.data.sentences` says how text is split."""

from __future__ import annotations

from nybble.data.kinds._text import TextKind
from nybble.data.sentences import sentence_samples

PART = TextKind(cut=sentence_samples)
