"""Plain networks: classifiers, as those of images are."""

from __future__ import annotations

from nybble.eval.judges.images import PART as PART
