"""Fisher information of layer outputs: squared gradients of the model's log likelihood, from one backward a batch.

The labels are drawn from the model itself, so the squares estimate the (diagonal) Fisher information and not the error
on some task: a model with logits is a categorical distribution, one with hidden states alone a Gaussian of unit
variance around them (Kunstner et al. 2019, arXiv:1905.12558, on why not the data's own labels). LLM-FP4 and its
predecessors take the gradient of their task's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nybble.calibration.statistics import InputSample, row_groups
from nybble.core import ranks
from nybble.core.errors import DataError
from nybble.core.seeds import derive_seed
from nybble.data.kinds import Batch, data_kind
from nybble.models.adapter import Adapter, under


def fisher_of(
    model: nn.Module,
    adapter: Adapter,
    layers: Mapping[str, int],
    inputs: Mapping[str, Tensor],
    *,
    batch: int,
    tokens: int,
    most: int,
    seed: int,
) -> dict[str, Tensor]:
    """Squared gradients of the outputs of some layers.

    Args:
        model: float, all of it loaded; its parameters get no gradients.
        adapter: the model's.
        layers: linear modules by full name, and the width of their outputs.
        inputs: what the model is called with, all samples.
        batch: samples a forward takes.
        tokens: how many real tokens those have.
        most: how many to keep, spread as the inputs that solvers see.
        seed: of the labels.

    Returns:
        float32 [tokens, rows] a layer, the rows of padding left out.

    Raises:
        DataError: no gradient reached a layer, so the model's output doesn't depend on it.
    """
    found = {name: InputSample(rows, tokens, most) for name, rows in layers.items()}
    samples = len(next(iter(inputs.values())))
    starts = range(0, samples, batch)
    own = [starts[number] for number in ranks.share(len(starts))]

    def see(names: Sequence[str], own: Sequence[int]) -> None:
        for _, batch_, gradients in _passes(model, adapter, names, inputs, batch, seed, own):
            for name, gradient in ((leaf, each) for leaf, calls in gradients.items() for each in calls):
                padded = batch_.real is not None and gradient.shape[:2] == batch_.real.shape
                kept = gradient[batch_.real] if padded and batch_.real is not None else gradient
                found[name].add(kept.float().square())

    for sample in found.values():
        sample.begin(ranks.share(len(starts)).start * batch / samples)
    see(list(found), own)
    device = next(model.parameters()).device
    again = [name for name, sample in found.items() if not sample.merge(device)]
    if again:
        see(again, starts)
    result = {}
    for name, sample in found.items():
        squares = sample.all()
        if squares is None:
            raise DataError(
                f"no gradient of the model's output reached {name}, so it has no Fisher weights; ignore it."
            )
        result[name] = squares
    return result


def guides_of(
    model: nn.Module,
    adapter: Adapter,
    layers: Mapping[str, int],
    inputs: Mapping[str, Tensor],
    *,
    batch: int,
    groups: int,
    seed: int,
) -> dict[str, Tensor]:
    """How much the outputs of some layers matter to the loss, token by token: means over groups of channels.

    Args:
        model: float, all of it loaded; its parameters get no gradients.
        adapter: the model's.
        layers: linear modules by full name, and the width of their outputs.
        inputs: what the model is called with, all samples.
        batch: samples a forward takes, as the walk's: a layer that is called twice sees them in that order.
        groups: of neighbouring output channels, that are wanted (:func:`row_groups`).
        seed: of the labels.

    Returns:
        bfloat16 [tokens, groups] a layer, squared gradients of this process's share of batches, the rows of padding
        left out; nothing of a layer that no gradient reached. Only they are kept: a layer's gradients go as soon as
        they are there.
    """
    found: dict[str, list[Tensor]] = {}

    def means(name: str, gradient: Tensor) -> Tensor:
        wide = gradient.detach().float()
        shape = (*wide.shape[:-1], row_groups(layers[name], groups), -1)
        return wide.reshape(shape).square_().mean(-1)

    starts = range(0, len(next(iter(inputs.values()))), batch)
    own = [starts[number] for number in ranks.share(len(starts))]
    for _, batch_, gradients in _passes(model, adapter, list(layers), inputs, batch, seed, own, means):
        for name, calls in gradients.items():
            for each in calls:
                padded = batch_.real is not None and each.shape[:2] == batch_.real.shape
                kept = each[batch_.real] if padded and batch_.real is not None else each.reshape(-1, each.shape[-1])
                found.setdefault(name, []).append(kept.bfloat16())
    widths = ranks.gather({name: {part.shape[1] for part in parts} for name, parts in found.items()})
    device, result = next(model.parameters()).device, {}
    for name, rows in layers.items():
        seen, wanted = set[int]().union(*(each.get(name, ()) for each in widths)), row_groups(rows, groups)
        if seen == {wanted}:
            none = torch.zeros(0, wanted, dtype=torch.bfloat16, device=device)  # of a process without a share
            result[name] = torch.cat([none, *found.get(name, ())])
    return result


def block_gradients(
    model: nn.Module,
    adapter: Adapter,
    blocks: Sequence[str],
    inputs: Mapping[str, Tensor],
    *,
    batch: int,
    seed: int,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Gradients of the model's log likelihood by what some blocks give, batch by batch of this process's share.

    Args:
        model: float, all of it loaded; its parameters get no gradients.
        adapter: the model's.
        blocks: their full names.
        inputs: what the model is called with, all samples.
        batch: samples a forward takes.
        seed: of the labels.

    Yields:
        A batch's first sample, and by block the gradient, of the hidden states' shape and dtype.

    Raises:
        DataError: no gradient reached a block, so the model's output doesn't depend on it.
    """
    starts = range(0, len(next(iter(inputs.values()))), batch)
    own = [starts[number] for number in ranks.share(len(starts))]
    for start, _, gradients in _passes(model, adapter, blocks, inputs, batch, seed, own):
        for name in blocks:
            if name not in gradients:
                raise DataError(f"no gradient of the model's output reached {name}, so it has no Fisher weights.")
        yield start, {name: gradients[name][0] for name in blocks}


def _whole(name: str, gradient: Tensor) -> Tensor:
    return gradient.detach()


def _passes(
    model: nn.Module,
    adapter: Adapter,
    names: Sequence[str],
    inputs: Mapping[str, Tensor],
    batch: int,
    seed: int,
    starts: Sequence[int],
    kept: Callable[[str, Tensor], Tensor] = _whole,
) -> Iterator[tuple[int, Batch, dict[str, list[Tensor]]]]:
    """For some batches the first sample, the batch, and what is ``kept`` of gradients by these modules' outputs."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    device, kind = next(iter(asked)).device, data_kind(adapter.reads)
    generator = torch.Generator(device)
    handles = [
        model.get_submodule(stack[0]).register_forward_pre_hook(_ask_for_gradients, with_kwargs=True)
        for stack in adapter.stack_names(model)
    ]
    if adapter.whole:  # token ids have no gradients
        tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
        handles += [table.register_forward_hook(lambda _, __, rows: rows.requires_grad_(True)) for table in tables]
    try:
        model.requires_grad_(False)
        for start in starts:
            generator.manual_seed(derive_seed(seed, "fisher", str(start)))
            given = kind.batch(inputs, start, start + batch, device)
            yield start, given, _gradients(model, given, names, generator, kept)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, was in asked.items():
            parameter.requires_grad_(was)


def _ask_for_gradients(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden: Any = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    if hidden.is_leaf and hidden.is_floating_point():
        hidden.requires_grad_(True)


def _gradients(
    model: nn.Module, batch: Batch, names: Sequence[str], generator: Any, kept: Callable[[str, Tensor], Tensor]
) -> dict[str, list[Tensor]]:
    """One batch forth and back; a module that is called twice has a gradient of each call, in their order."""
    calls: dict[str, list[Tensor]] = {}
    reached: set[str] = set()

    def watch(name: str) -> Callable[..., None]:
        def see(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple | list) else output
            own = calls.setdefault(name, [])
            own.append(torch.zeros((), dtype=hidden.dtype, device=hidden.device).expand(hidden.shape))
            number = len(own) - 1

            def note(gradient: Tensor) -> None:
                own[number] = kept(name, gradient)
                reached.add(name)

            if hidden.requires_grad:
                keep: Any = hidden.register_hook
                keep(note)

        return see

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        with torch.enable_grad():
            log_likelihood(model(**batch.inputs), batch.real, generator).backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    return {name: own for name, own in calls.items() if name in reached}


def log_likelihood(output: Any, real: Tensor | None, generator: Any) -> Tensor:
    """The log likelihood of labels drawn from the model's own distribution, summed."""
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is None:
        hidden: Tensor = output.last_hidden_state.float()
        noise = torch.randn(hidden.shape, generator=generator, dtype=torch.float32, device=hidden.device)
        total = hidden * noise  # the gradient of -|h - y|^2 / 2 at y = h + noise
        return (total if real is None else total[real]).sum()
    chances = torch.log_softmax(logits.float(), -1)
    flat = chances.reshape(-1, chances.shape[-1])
    labels = torch.multinomial(flat.detach().exp(), 1, generator=generator)
    picked = flat.gather(1, labels)
    if real is not None and chances.dim() == 3:
        picked = picked[real.reshape(-1)]
    return picked.sum()


def layers_with_weights(blocks: Sequence[tuple[str, Sequence[Any]]]) -> dict[str, int]:
    """Full name -> rows of every linear target; ``blocks``: a block's name and its targets."""
    return {
        f"{under(name)}{t.name}": t.shape[0]
        for name, targets in blocks
        for t in targets
        if t.rule.weights and t.kind.by_rows
    }
