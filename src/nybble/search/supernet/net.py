"""A model at its largest sizes that runs as any architecture of a space: every tensor is cut to its leading part.

The architecture's own network, without weights, says what shapes its tensors have; it runs on slices of the supernet's.
So any class of transformers is a supernet whose smaller configs have a part of its tensors, each the leading rows and
columns of the larger one; and the network that is taken out at the end (:meth:`Supernet.collapsed`) is an ordinary one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nybble.core.errors import GranularityError, ModelError, SchemeError
from nybble.models.adapter import adapter_for
from nybble.models.build.skeleton import fill_buffers_, meta_model, model_class
from nybble.quantizer import Quantizer
from nybble.scheme import matches
from nybble.search.evolution import Encoding
from nybble.search.supernet.mixture import Mixture, Router
from nybble.search.supernet.space import Space

FEED_FORWARD = (r"re:.*\.fc[12]", r"re:.*\.intermediate\.dense", r"re:.*\blayer(\.\d+)?\.output\.dense")
"""The two linears of a feed-forward network, as BART and BERT and their kin call them."""
KEPT = 64
"""Networks without weights that are kept: the same architectures come again in every update."""


class Supernet(nn.Module):
    """See the module.

    Args:
        model: float, at its largest sizes; it becomes part of the supernet.
        space: of its config.
        experts: of each mixed layer; 1 is plain sharing.
        router: one distribution a layer, or one a neuron.
        mixed: which linears are mixed, as targets of a scheme.
        hidden, dropout: of routers.

    Raises:
        SchemeError: nothing is of ``mixed``. ModelError: an architecture has a tensor that the model lacks, or a larger
            one.
    """

    supports_gradient_checkpointing = False  # blocks have no weights outside a call, so they can't be run again

    def __init__(
        self, model: Any, space: Space, *, experts: int = 1, router: Router = "neuron",
        mixed: Sequence[str] = FEED_FORWARD, hidden: int = 128, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.space, self.active = model, space, space.largest
        self.config, self._networks = model.config, dict[Encoding, Any]()
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self.mixed = [name for name in linears if any(matches(pattern, name, ()) for pattern in mixed)]
        if not self.mixed:
            raise SchemeError(f"nothing is mixed: no linear layer is of {', '.join(mixed)}. Name others under 'mixed'.")
        numbers = len(space.numbers(space.largest))
        made = [] if experts == 1 else self.mixed
        self.mixtures = nn.ModuleList(Mixture(linears[n], numbers, experts, router, hidden, dropout) for n in made)
        self._own = dict(model.named_parameters()) | dict(model.named_buffers())
        for encoding in (space.largest, space.smallest):
            self.network(encoding)

    def network(self, encoding: Encoding) -> Any:
        """The architecture's network without weights, in the supernet's mode.

        Raises:
            UsageError: it isn't of the space. ModelError: it is no part of the supernet.
        """
        shape = encoding[: len(self.space.genes)]
        if shape not in self._networks:
            if len(self._networks) >= KEPT:
                self._networks.pop(next(iter(self._networks)))
            made = meta_model(self.space.config_of(encoding), torch.float32, self._own)
            fill_buffers_(made)
            for name, _ in made.named_non_persistent_buffers():
                owner, _, leaf = name.rpartition(".")
                module = made.get_submodule(owner)
                module._buffers[leaf] = module.get_buffer(leaf).to(self.model.device)
            self._check(made)
            self._networks[shape] = made
        return self._networks[shape].train(self.training)

    def _check(self, network: Any) -> None:
        for name, tensor in _tensors(network).items():
            whole = self._own.get(name)
            if whole is None:
                raise ModelError(f"an architecture has {name}, which the largest model lacks: it is no part of that.")
            if tensor.dim() != whole.dim() or any(a > b for a, b in zip(tensor.shape, whole.shape, strict=True)):
                raise ModelError(
                    f"{name} is {list(tensor.shape)} in an architecture, and {list(whole.shape)} in the largest model."
                )

    def weights(self, encoding: Encoding, rounded: bool = True) -> dict[str, Tensor]:
        """All tensors of an architecture, by its network's names; of tied ones the first. They have gradients.

        Args:
            encoding: of the space.
            rounded: in its format, behind the mixing: scales are of what is deployed.
        """
        network = self.network(encoding)
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        found = {  # in memory as they are deployed: products of strided ones differ in their last bits
            n: own[n][tuple(slice(size) for size in t.shape)].contiguous() for n, t in _tensors(network).items()
        }
        numbers = self.space.numbers(encoding)
        for name, mixture in zip(self.mixed, self.mixtures, strict=False):
            if (at := f"{name}.weight") in found:  # a layer that the architecture has
                rows, columns = found[at].shape
                found[at], bias = mixture(own[at], own.get(f"{name}.bias"), numbers, (rows, columns))
                if bias is not None:
                    found[f"{name}.bias"] = bias
        quantizer = self.space.quantizer(encoding) if rounded else None
        if quantizer is not None:
            for name in self.quantized(network):
                found[f"{name}.weight"] = _straight(quantizer, found[f"{name}.weight"])
        return found

    def quantized(self, network: Any) -> list[str]:
        """Linear layers in blocks, whose weights a format is for."""
        inside = adapter_for(network).inside
        return [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and inside(name)]

    def check_rounded(self, encoding: Encoding) -> None:
        """Refuse an architecture that is no part of the supernet, or that no format of the space fits.

        Raises:
            ModelError: as of :meth:`network`. GranularityError: a layer's rows in a format; names both.
        """
        network = self.network(encoding)
        for line in self.space.formats:
            quantizer = self.space.quantizer_of(line)
            if quantizer is None:
                continue
            for name in self.quantized(network):
                try:
                    quantizer.stored_bytes(tuple(network.get_submodule(name).weight.shape))
                except GranularityError as error:
                    values = self.space.values(encoding)
                    raise GranularityError(f"{name} of {values} in {line!r}: {error}") from error

    def parameters_of(self, encoding: Encoding) -> int:
        """How many parameters an architecture has, tied ones once."""
        return sum(parameter.numel() for parameter in self.network(encoding).parameters())

    @contextmanager
    def running(self, encoding: Encoding) -> Iterator[None]:
        """Inside, the supernet runs as this architecture."""
        self.space.check(encoding)
        before, self.active = self.active, encoding
        try:
            yield
        finally:
            self.active = before

    def forward(self, **batch: Any) -> Any:
        """The output of the architecture that is active."""
        return functional_call(self.network(self.active), self.weights(self.active), kwargs=batch, tie_weights=True)

    @torch.no_grad()
    def collapsed(self, encoding: Encoding, rounded: bool = True) -> Any:
        """The architecture's network alone, in evaluation mode: mixed once, without experts and routers.

        Args:
            encoding: of the space.
            rounded: with weights in its format; False: before they are rounded.
        """
        self.eval()
        config = self.space.config_of(encoding)
        kind: Any = model_class(config)
        with torch.random.fork_rng(devices=[]):
            made = kind._from_config(config, dtype=torch.float32)
        device = self.model.device
        given = made.state_dict(keep_vars=True)
        for name, tensor in self.weights(encoding, rounded).items():
            given[name].copy_(tensor)
        if getattr(self.model, "generation_config", None) is not None:
            made.generation_config = self.model.generation_config
        return made.to(device).eval()


def _straight(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """Rounded, with a gradient as if it weren't."""
    return quantizer.fake_quantize(weight.detach().float()) + (weight - weight.detach())


def _tensors(network: Any) -> dict[str, Tensor]:
    """Parameters, and buffers that are stored; of tied ones the first."""
    computed = {name for name, _ in network.named_non_persistent_buffers()}
    return dict(network.named_parameters()) | {n: b for n, b in network.named_buffers() if n not in computed}
