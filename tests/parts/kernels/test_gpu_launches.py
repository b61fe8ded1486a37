"""What Triton compiled is kept by what its caller says decides that."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


class Kernel:
    """Stands for Triton's, and for what it gives: a thing that is launched with constants too."""

    arg_names = ("x", "y", "n", "SIZE", "FLAG")

    def __init__(self, interpreted: bool = False) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.interpreted = interpreted

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **meta: Any) -> Any:
            self.calls.append(("compiled", grid, args, meta))
            return None if self.interpreted else Compiled(self.calls)

        return run


class Compiled:
    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.calls.append(("launched", grid, args))


def test_a_kept_kernel_gets_its_numbers_and_constants_in_order() -> None:
    from nybble.kernels._gpu import Launches

    launches, kernel = Launches(), Kernel()
    meta = {"FLAG": True, "SIZE": 64, "num_warps": 4}
    for key, x in ((1, "a"), (1, "b"), (2, "c"), (1, "d")):
        launches(key, kernel, (x, "y"), lambda key=key: ((7,), (key, 1, 1), meta))  # type: ignore[misc]
    assert kernel.calls == [
        ("compiled", (1, 1, 1), ("a", "y", 7), meta),
        ("launched", (1, 1, 1), ("b", "y", 7, 64, True)),
        ("compiled", (2, 1, 1), ("c", "y", 7), meta),
        ("launched", (1, 1, 1), ("d", "y", 7, 64, True)),
    ]


def test_the_interpreter_compiles_nothing() -> None:
    from nybble.kernels._gpu import Launches

    launches, kernel = Launches(), Kernel(interpreted=True)
    for _ in range(2):
        launches(1, kernel, ("x", "y", 7), lambda: ((), (1, 1, 1), {"FLAG": True, "SIZE": 64}))
    assert [call[0] for call in kernel.calls] == ["compiled"] * 2
