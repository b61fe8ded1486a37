"""convert: what training came to, packed."""

from __future__ import annotations

from torch import nn

from nybble.checkpoint.save import mark_quantized
from nybble.core.errors import UsageError, within
from nybble.core.explicit import explicit_settings
from nybble.hard import check_finite
from nybble.nn.config import config_of
from nybble.nn.fake import FakeLayer
from nybble.nn.in_place import whole_or_not_at_all
from nybble.nn.swap import set_module


@explicit_settings()
def convert(model: nn.Module) -> nn.Module:
    """Put the packed layer where each :class:`~nybble.nn.fake.FakeLayer` stands; outputs stay the same, bit for bit.

    The result is what ``nybble quantize`` gives: :func:`nybble.checkpoint.save.save` writes it, ``nybble.load`` and
    transformers read it.

    Args:
        model: from :func:`nybble.training.prepare.prepare`; changed in place, and left in eval mode. Of a model that is
            a single layer the packed one is returned.

    Raises:
        UsageError: nothing in it was prepared. DataError: training left NaN or Inf in a layer, named; nothing is
            changed then.
    """
    if isinstance(model, FakeLayer):  # a single layer, which has no parent to be replaced in
        (alone,) = convert(nn.Sequential(model)).children()
        return alone
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, FakeLayer)]
    if not found:
        raise UsageError("nothing in this model was prepared for training; call nybble.training.prepare.prepare first.")
    for name, fake in found:
        with within(name):
            for part, tensor in fake.state_dict().items():
                check_finite(tensor, part)
    with whole_or_not_at_all(model):
        for name, fake in found:
            set_module(model, name, fake.settle())
        if config_of(model) is not None:
            mark_quantized(model)
    return model.eval()
