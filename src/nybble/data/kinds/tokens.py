"""Running text in windows of one length: what language models read. :mod:`nybble.data.tokens` says how it is cut."""

from __future__ import annotations

from nybble.data.kinds._text import TextKind
from nybble.data.tokens import token_samples

PART = TextKind(cut=token_samples)
