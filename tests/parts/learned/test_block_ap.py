"""Block-AP: its closed-form gradients, whole zero points, and that training all beats training the scales alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.learned import make_part
from nybble.learned.block_ap import AllTrained
from nybble.qtensor import dense
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

LINE = "int2 group=16 symmetric=false scale_format=float32"


def learned(line: str, x: Tensor) -> AllTrained:
    found = make_part("block-ap", {}).make(Quantizer(line), x)
    assert isinstance(found, AllTrained)
    return found.train()


def test_closed_form_gradients() -> None:
    """The sheet's, of clipped and unclipped weights, in float64; and the value itself."""
    x, upstream = torch.randn(4, 32), torch.randn(4, 32)
    part = learned("int3 group=16 symmetric=false scale_format=float32", x)
    scale, zero = part.held.get_parameter("scale"), part.held.get_parameter("zero_point")
    with torch.no_grad():
        scale.mul_(0.6)
        zero.add_(torch.rand(zero.shape) - 0.5)  # a real number, as training leaves it
    found = part(x)
    (found * upstream).sum().backward()
    w, out = x.double().reshape(8, 16), upstream.double().reshape(8, 16)
    s, z = scale.detach().double().reshape(8, 1), zero.detach().double().reshape(8, 1).round()
    q = (w / s).round() + z
    inside, code = (q >= -4) & (q <= 3), q.clamp(-4, 3)
    assert 0.5 < inside.double().mean() < 0.95
    torch.testing.assert_close(found.detach().double().reshape(8, 16), (code - z) * s, rtol=2e-6, atol=1e-7)
    assert part.weight.grad is not None and scale.grad is not None and zero.grad is not None
    torch.testing.assert_close(part.weight.grad.double().reshape(8, 16), out * inside, rtol=1e-6, atol=1e-7)
    to_scale = (torch.where(inside, code - z - w / s, code - z) * out).sum(1)
    torch.testing.assert_close(scale.grad.double().flatten(), to_scale, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(zero.grad.double().flatten(), (-s * ~inside * out).sum(1), rtol=1e-5, atol=1e-6)


def train(part: AllTrained, x: Tensor, inputs: Tensor, groups: tuple[str, ...]) -> Tensor:
    optimizer = torch.optim.AdamW([p for name in groups for p in part.groups()[name]], lr=1e-2, weight_decay=0)
    for _ in range(200):
        optimizer.zero_grad()
        loss: Tensor = (inputs @ (part(x) - x).T).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    reached: Tensor = part.eval()(x)
    return reached


def test_all_is_better_than_scales_alone_which_are_better_than_nearest() -> None:
    """Sheet, 3 and 4, at 2 bits and on inputs it has not seen; packed, zero points are whole and within the codes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 64, generator=generator)
    mixing = torch.randn(8, 64, generator=generator)  # a few directions carry most, as in a language model
    noise = [0.2 * torch.randn(512, 64, generator=generator) for _ in range(2)]
    seen, unseen = (torch.randn(512, 8, generator=generator) @ mixing + each for each in noise)
    part = learned(LINE, x)
    everything = train(part, x, seen, ("weights", "scales"))
    scales = train(learned(LINE, x), x, seen, ("scales",))
    nearest = Quantizer(LINE).fake_quantize(x)
    errors = [float((unseen @ (w - x).T).square().mean()) for w in (everything, scales, nearest)]
    assert errors[0] < 0.8 * errors[1] and errors[1] < 0.9 * errors[2]
    packed = part.settle(x)
    assert isinstance(packed, BlockQTensor)
    zero = dense(packed.params.zero_point)  # type: ignore[arg-type]
    assert torch.equal(zero, zero.round()) and zero.min() >= -2 and zero.max() <= 1
    assert torch.equal(packed.dequantize(), everything)


@pytest.mark.parametrize(
    "line", ["float4_e2m1fn group=16", "nvfp4", "float4_e2m1fn group=16 scale=minmax(offset=true)"]
)
def test_other_formats_learn_what_they_have(line: str) -> None:
    x = torch.randn(8, 32)
    part = learned(line, x)
    (part(x) * torch.randn(x.shape)).sum().backward()
    names = [name for name, p in part.held.named_parameters() if p.grad is not None and p.grad.count_nonzero()]
    assert names == (["scale", "offset"] if "offset" in line else ["scale"])
