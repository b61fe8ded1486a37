"""Named presets: a rule with the states of its name, ``AdamW8bit``, ``Lion4bit``, ``SGDFp8``. Any rule has them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PAGED = "Paged"


@dataclass(frozen=True)
class Suffix:
    """What the end of a name stands for.

    Attributes:
        state: the preset pair of the states.
        bits: of a code.
        min_size: elements from which on states are quantized.
        about: for the class's docstring.
    """

    state: str | None
    bits: int
    min_size: int
    about: str

    def applied(self, rule: type[Any], name: str) -> type[Any]:
        """The rule's subclass of that name."""
        small = f"Parameters of fewer than {self.min_size:,} elements keep 32-bit states. " if self.min_size else ""
        about = f"""{rule.__name__} with its states in {self.about}.

{small}Takes what {rule.__name__} takes.
"""
        own = {"default_state": self.state, "default_min_size": self.min_size, "bits": self.bits}
        return type(name, (rule,), {**own, "__doc__": about, "__module__": "nybble.optim"})


SUFFIXES = {
    "8bit": Suffix("state8", 8, 4096, "8 bits, dynamic maps, blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861)"),
    # the paper leaves 4,096 elements alone, bitsandbytes (and this library in 8 bits) does not
    "4bit": Suffix(
        "state4",
        4,
        4097,
        "4 bits: both signs in the dynamic map, blocks of 128; others linear without a zero, scaled by rows and "
        "columns (Li et al. 2023, arXiv:2309.01507)",
    ),
    "Fp8": Suffix("state-fp8", 8, 4096, "E4M3, blocks of 256 (as torchao's)"),
    "32bit": Suffix(None, 32, 0, "float32"),
    "Companded8bit": Suffix("state8-companded", 8, 4096, "companded 8 bits, blocks of 256"),
}


def paged(kind: type[Any], name: str) -> type[Any]:
    """The optimizer's subclass of that name, whose states are paged."""
    about = f"""{kind.__name__} with the states of large parameters in the host's memory (``is_paged=True``)."""
    return type(name, (kind,), {"default_is_paged": True, "__doc__": about, "__module__": "nybble.optim"})


def rule_and_suffix(name: str) -> tuple[str, str]:
    """``AdamW4bit`` as ``("AdamW", "4bit")``, ``AdamW`` as ``("AdamW", "")``."""
    longest = max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")
    return name.removesuffix(longest), longest
