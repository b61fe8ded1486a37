"""Rows of a benchmark in several processes, each with its own copy of what they need.

A small network's quantization is thousands of small kernels, so that a GPU waits for one processor core most of the
time; several processes keep it busy. Every row fixes its seeds, so their order changes nothing.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch


def rows(work: Callable[[Any], dict[str, Any]], tasks: Iterable[Any], jobs: int) -> Iterator[dict[str, Any]]:
    """The row of every task, as they come; with one job here, in order.

    Args:
        work: a function of a module, of one picklable task.
        tasks: what to do.
        jobs: processes.
    """
    if jobs == 1:
        yield from map(work, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in as_completed([pool.submit(work, each) for each in tasks]):
            yield done.result()
