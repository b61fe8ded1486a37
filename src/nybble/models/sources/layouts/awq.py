"""AWQ (AutoAWQ's ``gemm`` files): four bits with zero points, eight outputs in a word, interleaved.

``qweight`` int32 [in, out / 8], ``qzeros`` int32 [groups, out / 8], ``scales`` float16 [groups, out]. The nibbles of a
word, lowest first, are those of its outputs 0, 2, 4, 6, 1, 3, 5, 7; auto-round has 5 to 7 bits too, eights of outputs
in the same order. x = scale * (code - zero point).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nybble.core.errors import ModelError
from nybble.models.sources.layouts import Files, Layout, PackedWeight, whole
from nybble.models.sources.layouts._words import Words, awq_weight


class Awq(Layout):
    """See the module."""

    def weights(self, config: Mapping[str, Any], files: Files) -> Iterator[PackedWeight]:  # noqa: D102
        bits = config.get("bits", config.get("w_bit", 4))
        version = str(config.get("format") or config.get("version") or "gemm").lower()
        if bits not in (4, 5, 6, 7) or version != "gemm":
            raise ModelError(
                f"{files.place} is AWQ of {bits!r:.20} bits in the version {version!r:.20}; 4 to 7 bits of gemm are "
                "read. AutoAWQ writes those of 4 with version='GEMM'."
            )
        bits = whole(bits, 4, 7, "bits of quantization_config")
        size = whole(config.get("group_size", config.get("q_group_size", 128)), -1, 1 << 30, "group_size")
        for module in files.ending("qweight"):
            yield awq_weight(module, Words(bits=bits, size=size), files)


PART = Awq()
