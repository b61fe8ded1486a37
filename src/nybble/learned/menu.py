"""A menu: several quantizers of one tensor, of which one is in use at a time; what a search in training draws from.

The scheme's own line is the first, ``others`` follow. All of them round the one float32 weight, anew at every forward:
nothing that is rounded is rounded again. A callback (:mod:`nybble.training.callbacks.policy`) says which is in use;
without one the first is, and the others cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.learned import Learned, Menu, Part, make_part
from nybble.qtensor import QuantParams
from nybble.quantizer import Quantizer


@dataclass(frozen=True, kw_only=True)
class MenuPart(Part):
    """Each is learned straight through (``ste``): scales follow the tensor.

    Attributes:
        others: quantizer lines beside the scheme's own.
    """

    others: tuple[str, ...] = ()

    takes_start = False

    def check_more(self, quantizer: Quantizer, side: str) -> None:  # noqa: D102
        part, lines = make_part("ste", {}), [quantizer]
        for line in self.others:
            made = Quantizer(line)
            if made in lines:
                raise SchemeError(f"the menu has {line!r} twice; leave one out.")
            part.check(made, side)
            lines.append(made)

    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:  # noqa: D102
        part = make_part("ste", {})
        return Menu([part.make(line, x, None, side) for line in (quantizer, *map(Quantizer, self.others))])


PART = MenuPart
