"""convert: what training came to, packed."""

from __future__ import annotations

from torch import nn

from nybble.checkpoint.save import mark_quantized
from nybble.core.errors import UsageError, within
from nybble.core.explicit import explicit_settings
from nybble.hard import check_finite
from nybble.nn.config import config_of
from nybble.nn.fake_attention import settled_cache
from nybble.nn.in_place import whole_or_not_at_all
from nybble.nn.kinds import prepare_quantized
from nybble.nn.kv_model import use_quantized_cache
from nybble.nn.twin import Twin


@explicit_settings()
def convert(model: nn.Module) -> nn.Module:
    """Put the quantized module where each :class:`~nybble.nn.twin.Twin` stands; outputs stay the same, bit for bit.

    What the twins of a KV cache rounded, the model caches from then on (``use_cache``, which ``generate`` has).

    The result is what ``nybble quantize`` gives: :func:`nybble.checkpoint.save.save` writes it, ``nybble.load`` and
    transformers read it.

    Args:
        model: from :func:`nybble.training.prepare.prepare`; changed in place, and left in eval mode. Of a model that is
            a single layer the packed one is returned.

    Raises:
        UsageError: nothing in it was prepared. DataError: training left NaN or Inf in a layer, named; nothing is
            changed then.
    """
    if isinstance(model, Twin):  # a single layer, which has no parent to be replaced in
        (alone,) = convert(nn.Sequential(model)).children()
        return alone
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Twin)]
    if not found:
        raise UsageError("nothing in this model was prepared for training; call nybble.training.prepare.prepare first.")
    for name, twin in found:
        with within(name):
            for part, tensor in twin.state_dict().items():
                check_finite(tensor, part)
    with whole_or_not_at_all(model):
        kv = settled_cache(model)
        for name, twin in sorted(found, key=lambda pair: pair[1].reads_another):
            twin.settle_in(model, name)
        prepare_quantized(model)
        if kv is not None:
            use_quantized_cache(model, kv)
        if config_of(model) is not None:
            mark_quantized(model)
    return model.eval()
