"""One function called many times on a GPU: captured once, so that all its kernels are launched at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
WORTH = 16  # a capture takes as long as about ten calls


def replayed(function: Function, example: Tensor, calls: int) -> Function:
    """``function`` as a CUDA graph where that pays: searches try hundreds of candidates of a few small kernels each.

    Args:
        function: from a tensor to a tensor on the same device; every other tensor that it reads stays as it is.
        example: an argument.
        calls: how many are coming.

    Returns:
        the function, or its replay on a GPU; there a result holds until the next call. Where a step can't be captured
        (it waits for the device, say), the function itself.
    """
    if example.device.type != "cuda" or calls < WORTH:
        return function
    given, main, side = example.clone(), torch.cuda.current_stream(example.device), _side(example.device)
    graph = torch.cuda.CUDAGraph()
    side.stream.wait_stream(main)
    with torch.cuda.stream(side.stream):
        function(given)  # libraries and kernels are loaded at their first call, which can't be captured
        found = _capture(graph, function, given, side.pool.pool())
    main.wait_stream(side.stream)
    if found is None:
        return function

    def replay(argument: Tensor) -> Tensor:
        given.copy_(argument)
        graph.replay()
        return found

    replay.keeps = function  # type: ignore[attr-defined]  # the graph reads the tensors in its closure
    return replay


def _capture(graph: torch.cuda.CUDAGraph, function: Function, given: Tensor, pool: Any = None) -> Tensor | None:
    # Not torch.cuda.graph: it empties the allocator's cache before every capture.
    found = None
    graph.capture_begin(pool, capture_error_mode="thread_local")
    try:
        try:
            found = function(given)
        finally:
            graph.capture_end()
    except RuntimeError:
        return None
    return found


class _Side(NamedTuple):
    """Where captures happen: one stream, as cuBLAS keeps a workspace for each, and one pool of memory.

    The pool is that of a graph which lives as long as the process: a pool without a graph is given up, not used again.
    """

    stream: torch.cuda.Stream
    pool: torch.cuda.CUDAGraph


@cache
def _side(device: torch.device) -> _Side:
    stream: Any = torch.cuda.Stream
    side = _Side(stream(device), torch.cuda.CUDAGraph())
    with torch.cuda.stream(side.stream):
        _capture(side.pool, torch.neg, torch.ones(1, device=device))
    return side
