"""The command line in processes of its own that start quickly: forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["nybble.cli.quantize", "nybble.pipelines.quantize", "transformers.models.llama", "nybble.pipelines.train",
     "nybble.training.loop", "nybble.training.adapters"]  # the last two only where their packages are
)  # fmt: skip


def start(arguments: list[str], errors: Path) -> ForkServerProcess:
    """Run ``nybble ARGUMENTS`` in a new process; standard error goes to a file, standard output to ``errors.out``."""
    process = CONTEXT.Process(target=_main, args=(arguments, str(errors)))
    process.start()
    return process


def _main(arguments: list[str], errors: str) -> None:
    import torch

    from nybble.cli import main

    torch.set_num_threads(1)
    for target, path in ((2, errors), (1, f"{errors}.out")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target)
    sys.argv = ["nybble", *arguments]
    main()
