"""What is in no block sees its inputs: the model runs with every block passing on what the last one gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.calibration.trace import (
    HIDDEN,
    BlockCall,
    Tensors,
    replace_forward,
    returned,
    returned_by_name,
    tuple_widths,
)
from nybble.core.errors import ModelError
from nybble.models.adapter import Adapter
from nybble.nn.kv_model import no_cache


class _AllSeenError(Exception):
    """Stops the model's forward once every module in question has its input: logits of a long text are large."""


@dataclass(frozen=True, kw_only=True)
class TailCall(BlockCall):
    """A call of the whole model in which the blocks do nothing.

    ``adapter``: knows the blocks. ``inputs``: what the model is called with. ``modules``: names of those that are
    watched.
    """

    adapter: Adapter
    inputs: Mapping[str, Tensor]
    modules: frozenset[str]

    def run(self, block: nn.Module, given: Tensors) -> dict[str, Tensor]:
        """Run the model (``block``) on its inputs, the last block's output being ``given``."""
        problem: Exception | None = None
        for width in tuple_widths(self.adapter.flows):
            try:
                self._run(block, given, width)
            except (torch.OutOfMemoryError, MemoryError, ModelError):
                raise
            except Exception as error:
                problem = problem or error
                continue
            return dict(given)
        raise ModelError(
            f"{type(block).__name__} can't run from its last block on ({type(problem).__name__}: {problem}), so "
            "what is outside the blocks gets no calibrated inputs; leave it in float (ignore), or use a recipe "
            "without data."
        ) from problem

    def _run(self, model: nn.Module, given: Tensors, width: int) -> None:
        left, named = set(self.modules), returned_by_name(given)

        def passed(*args: Any, **kwargs: Any) -> Any:
            return returned(given[HIDDEN], width, self.adapter.flows, {}) if named is None else named

        def seen(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                left.discard(name)
                if not left:
                    raise _AllSeenError

            return hook

        with ExitStack() as undo:
            for stack in self.adapter.stack_names(model):
                for name in stack:
                    replace_forward(model.get_submodule(name), passed, undo)
            for name in self.modules:  # behind the hooks of those who watch
                handle = model.get_submodule(name).register_forward_pre_hook(seen(name), with_kwargs=True)
                undo.callback(handle.remove)
            try:
                model(**self.inputs, **no_cache(model))
            except _AllSeenError:
                return


def tail(adapter: Adapter, inputs: Mapping[str, Tensor], real: Tensor | None, modules: Sequence[str]) -> TailCall:
    """See :class:`TailCall`; ``real``: bool [samples, tokens], as of other calls."""
    return TailCall(
        index=0, args=(), kwargs={}, keyword=None, start=None, mask=real,
        adapter=adapter, inputs=inputs, modules=frozenset(modules),
    )  # fmt: skip
