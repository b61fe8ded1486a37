"""Shapes and dtypes in the signatures of contracts: ``Float32[Tensor, "rows columns"]``, in jaxtyping's language.

To a type checker each is ``Annotated``, so a plain Tensor. Annotations are text until somebody evaluates them; then
they are jaxtyping's types or, where that isn't installed, the class before the comma: nybble itself never needs the
package, and checks nothing when it is used. The tests do check every call of a contract (``tests/shapes.py``).

A name means one size within a call: rows, columns (inputs) of a matrix; tokens; blocks, elements of a tensor that was
cut. ``*shape`` is any number of dimensions, ``#blocks`` that size or 1, ``_rows`` a name for the reader alone. What
Python could parse begins with a space (``" tokens"``, ``" ..."``), so that linters don't take it for code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["KINDS", "Bool", "Float", "Float32", "Int64", "Integer", "Shaped"]

#: Bool; any float; float32; int64; any integer, signed or not; any dtype.
KINDS = ("Bool", "Float", "Float32", "Int64", "Integer", "Shaped")

if TYPE_CHECKING:
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Float32
    from typing import Annotated as Int64
    from typing import Annotated as Integer
    from typing import Annotated as Shaped
else:

    class _Kind:
        def __init__(self, name: str) -> None:
            self.name = name

        def __repr__(self) -> str:
            return self.name

        def __getitem__(self, item: tuple[type, str]) -> Any:
            """``[Tensor, "rows columns"]``."""
            try:
                import jaxtyping
            except ImportError:
                return item[0]
            return getattr(jaxtyping, self.name)[item]

    Bool, Float, Float32, Int64, Integer, Shaped = map(_Kind, KINDS)
