"""The trainable twins of what an attention rounds: the operands of its products, and what it caches.

Both hang on the attention as submodules that its implementation asks (:mod:`nybble.nn.attention`,
:mod:`nybble.nn.cached_attention`). A cache that trains stores nothing: keys and values are rounded where attention uses
them, whatever holds them, so that forwards with and without a cache, checkpointed ones too, compute the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError, SchemeError
from nybble.kv_format import KVFormat
from nybble.learned import Learned
from nybble.matmul_format import OPERANDS
from nybble.nn import attention, cached_attention
from nybble.nn.activation import relearned
from nybble.nn.attention import CACHED, MatmulQuantizers, use_quantized_attention
from nybble.nn.cached_attention import use_cached_attention
from nybble.nn.config import config_of
from nybble.nn.kv_basis import Rotated
from nybble.nn.kv_model import KVRecord, cached_attentions
from nybble.nn.swap import set_module
from nybble.nn.twin import Twin, settled_activation
from nybble.qtensor import dense


class FakeOperands(Twin):
    """Rounds the operands of an attention's products.

    Args:
        parts: by the names of :data:`nybble.matmul_format.OPERANDS`.
    """

    def __init__(self, parts: Mapping[str, Learned]) -> None:
        super().__init__()
        for name in OPERANDS:
            self.add_module(name, parts[name])

    def forward(self, name: str, x: Tensor) -> Tensor:
        """The operand ``name``, rounded."""
        rounded: Tensor = self.get_submodule(name)(x)
        return rounded

    def operands(self) -> dict[str, Learned]:
        """What learns each."""
        found = {name: self.get_submodule(name) for name in OPERANDS}
        return {name: part for name, part in found.items() if isinstance(part, Learned)}

    def learned(self) -> list[tuple[str, Learned]]:  # noqa: D102
        return [("matmuls", part) for part in self.operands().values()]

    def settle_in(self, root: nn.Module, name: str) -> None:  # noqa: D102
        settled = {operand: settled_activation(part) for operand, part in self.operands().items()}
        set_module(root, name, MatmulQuantizers(settled).train(self.training))


class FakeCache(Twin):
    """Rounds keys and values as a cache will hold them when the tokens of one call were cached at once.

    Args:
        kv: of the layer. With a residual the newest tokens stay in float, for all queries of a call.
        parts: of ``keys`` and ``values``, those that are not in float.

    Raises:
        SchemeError: a part learns more than a scale; an order of channels, which would follow the weights.
    """

    def __init__(self, kv: KVFormat, parts: Mapping[str, Learned]) -> None:
        super().__init__()
        if kv.sort:
            raise SchemeError(
                f"{kv}: sort goes by the weights, which training moves; leave it out, and give it to what is trained."
            )
        self.kv = kv
        self.keys, self.values = parts.get("keys"), parts.get("values")
        for side, part in parts.items():
            params = part.fixed()
            if params is not None and relearned(params):
                raise SchemeError(
                    f"a cache keeps codes and scales, and what learns {side} learns thresholds too; take lsq, elastic "
                    "with threshold: none, or ste."
                )

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, heads, tokens, width] each."""
        return self._stored("keys", key), self._stored("values", value)

    def _stored(self, side: str, x: Tensor) -> Tensor:
        part: Learned | None = getattr(self, side)
        first, last = self.kv.rounded(side, x.shape[2])
        if part is None or last == first:
            return x
        old = x if last - first == x.shape[2] else x[:, :, first:last]
        if side in self.kv.rotate:
            basis = Rotated.of(x.shape[3], x.device)
            rounded: Tensor = basis.back(part(basis.into(old))).to(x.dtype)
        else:
            rounded = part(old)
        return rounded if old is x else torch.cat([x[:, :, :first], rounded, x[:, :, last:]], 2)

    def format(self) -> KVFormat:
        """What training came to."""
        return self.kv.calibrated(_scale(self.keys), _scale(self.values))

    def learned(self) -> list[tuple[str, Learned]]:  # noqa: D102
        return [("kv", part) for part in (self.keys, self.values) if part is not None]

    def settle_in(self, root: nn.Module, name: str) -> None:
        """Nothing is left: what the model caches in is recorded on the model."""
        path, _, leaf = name.rpartition(".")
        delattr(root.get_submodule(path), leaf)

    def extra_repr(self) -> str:  # noqa: D102
        return str(self.kv)


def _scale(part: Learned | None) -> float | None:
    """Of a static part; None of others."""
    params = None if part is None else part.fixed()
    return None if params is None else float(dense(params.scale))  # type: ignore[arg-type]  # static ones have tensors


def use_fake_cache(model: Any) -> None:
    """Let a model's attention ask :class:`FakeCache`.

    Raises:
        ModelError: its attention is neither torch's nor eager.
    """
    use_cached_attention(model, True)
    configs: list[Any] = [config for module in model.modules() if (config := config_of(module)) is not None]
    ours = {attention.IMPLEMENTATION, cached_attention.IMPLEMENTATION}
    used = {str(getattr(config, "_attn_implementation", None)) for config in configs} - ours - {"None"}
    if not used <= {"eager", "sdpa"}:
        raise ModelError(
            f"a cache in few bits is trained with eager or torch's attention, and {type(model).__name__} has "
            f"{', '.join(sorted(used))}; load it with attn_implementation='sdpa'."
        )
    if used:
        use_quantized_attention(model)


def settled_cache(model: nn.Module) -> KVRecord | None:
    """What a model with :class:`FakeCache` twins will cache in; None if it has none."""
    own = cached_attentions(model)
    twins = {name: getattr(model.get_submodule(name), CACHED, None) for name in own}
    found = {name: twin.format() for name, twin in twins.items() if isinstance(twin, FakeCache)}
    formats = [*found.values()]
    same = len(found) == len(own) and all(each == formats[0] for each in formats)
    return (formats[0] if same else found) if found else None
