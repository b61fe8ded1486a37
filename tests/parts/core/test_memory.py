from __future__ import annotations

import pytest

from nybble.core import memory


def test_what_the_library_keeps() -> None:
    """Every other of many small blocks given back: half of them is kept, and trimming may take place at any time."""
    if memory._asker() is None:
        pytest.skip("the C library doesn't say")
    blocks = [bytearray(50_000) for _ in range(2_000)]
    full = memory._freed()
    del blocks[::2]
    assert memory._freed() > full + 40_000_000
    memory.trim_memory()
    assert all(len(block) == 50_000 for block in blocks)


def test_only_much_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(memory, "trim_memory", lambda: calls.append(1))
    for size in (0, memory.KEPT, memory.KEPT + 1):
        monkeypatch.setattr(memory, "_freed", lambda size=size: size)
        memory.trim_much()
    assert calls == [1]
