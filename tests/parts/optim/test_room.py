"""What LowBitOptimizer does for every rule: groups, exemptions, steps that are odd, loading, refusals."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nybble.optim
from nybble.core.errors import FileError, FormatError, GranularityError, NybbleError, SchemeError, UsageError
from nybble.optim import NonFiniteWarning, flatten, split_embeddings, unflatten
from nybble.optim._states import decode, encode
from nybble.optim.adamw import AdamW
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

EIGHT = {"exp_avg": str(Quantizer("state8")), "exp_avg_sq": str(Quantizer("state8-unsigned"))}


def stepped(optimizer: AdamW, steps: int = 1) -> AdamW:
    for step in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(p.device, p.dtype)
        optimizer.step()
    return optimizer


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (64, 64), dtype=dtype))


def kinds(optimizer: AdamW) -> list[str]:
    return [type(state["exp_avg"]).__name__ for state in optimizer.state.values()]


# ------------------------------------------------------------------------------------------------------------ exports
def test_lazy() -> None:
    """``from nybble.optim import AdamW`` works, imports it then, and brings torch and numpy alone."""
    assert nybble.optim.AdamW is AdamW
    for name in ("Adamw", "adamw2", "Sgdx"):
        with pytest.raises(AttributeError, match=name):
            getattr(nybble.optim, name)
    code = (
        "import sys, nybble.optim; assert 'nybble.optim.adamw' not in sys.modules; from nybble.optim import AdamW;"
        "print(sorted({'transformers', 'yaml', 'safetensors', 'typer', 'gguf', 'bitsandbytes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---------------------------------------------------------------------------------------------- who keeps what in what
def test_groups_have_their_own() -> None:
    groups: list[dict[str, Any]] = [
        {"params": [weight()]},
        {"params": [weight()], "state": None},
        {"params": [weight()], "state": {"exp_avg": "state4", "exp_avg_sq": None}},
        {"params": [weight(10, 10)], "min_size": 100, "state": "float8_e4m3fn tensor"},
        {"params": [weight(10, 10)]},
    ]
    optimizer = stepped(AdamW(groups))
    quantized, plain = "BlockQTensor", "Tensor"
    assert kinds(optimizer) == [quantized, plain, quantized, quantized, plain]
    assert optimizer.param_groups[0]["state"] == EIGHT
    four = optimizer.state[groups[2]["params"][0]]
    assert four["exp_avg"].format.name == "dynamic4" and isinstance(four["exp_avg_sq"], Tensor)
    assert optimizer.state[groups[3]["params"][0]]["exp_avg_sq"].format.name == "float8_e4m3fn"


@pytest.mark.parametrize(
    ("choice", "second"),
    [
        ("state8", "udynamic8 flat=256"),
        (" state8 flat=64", "udynamic8 flat=64"),
        ("state4", "linear4 rank1"),
        (Quantizer("float8_e5m2 tensor"), "float8_e5m2"),
        ("dynamic8 flat=256", "dynamic8 flat=256"),
        ({"exp_avg": None, "exp_avg_sq": "linear8 flat=64"}, "linear8 flat=64"),
    ],
)
def test_pairs(choice: Any, second: str) -> None:
    """A preset with an unsigned half gives it to the second moment; another line serves both."""
    lines = AdamW([weight()], state=choice).param_groups[0]["state"]
    assert lines["exp_avg_sq"].startswith(second)
    assert lines["exp_avg"] is None or "udynamic" not in lines["exp_avg"]


def test_size_at_the_threshold() -> None:
    assert kinds(stepped(AdamW([weight(4095), weight(4096), weight(4097)]))) == ["Tensor"] + ["BlockQTensor"] * 2


class Tied(nn.Module):
    """A language model's ends: a table that the head shares, a frozen part, positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.bags = nn.Embedding(100, 64), nn.EmbeddingBag(100, 64)
        self.middle, self.frozen = nn.Linear(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.tokens.weight
        self.frozen.requires_grad_(False)


def test_embeddings_keep_32_bits() -> None:
    """Of a module; bare parameters don't say what they are."""
    model = Tied()
    optimizer = stepped(AdamW(model, min_size=0))
    named = {
        name: p
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    assert set(named) == {"tokens.weight", "bags.weight", "middle.weight", "middle.bias"}
    for name, p in named.items():
        assert isinstance(optimizer.state[p]["exp_avg"], BlockQTensor) == name.startswith("middle")
    assert set(kinds(stepped(AdamW([p for p in model.parameters() if p.requires_grad], min_size=0)))) == {
        "BlockQTensor"
    }
    assert len(split_embeddings(model.middle)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "linear4 flat=100",
        "linear8 channel",
        "linear4 rank1",
        "udynamic4_de0 flat=50 scale_format=float16",
        "binary channel",
    ],
)
def test_zeros_in_formats_without_a_zero(line: str) -> None:
    """A block without any magnitude comes back as 0 by a scale of 0; the others are the Quantizer's own."""
    x = torch.rand(6, 100, generator=torch.Generator().manual_seed(0)) + 0.01
    plain = Quantizer(line).fake_quantize(x)
    x[2] = 0
    kept = encode(x, str(Quantizer(line)))
    assert isinstance(kept, BlockQTensor)
    values = kept.dequantize()
    assert (values[2] == 0).all()
    assert torch.equal(values[[0, 1, 3, 4, 5]], plain[[0, 1, 3, 4, 5]]) or "rank1" in line  # whose columns lost a row


# ---------------------------------------------------------------------------------------------------------- odd steps
def test_closure_and_hooks() -> None:
    p = weight()
    optimizer = AdamW([p])
    seen: list[str] = []
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> float:
        optimizer.zero_grad()
        loss = (p * 3).square().sum()
        torch.autograd.backward(loss)
        seen.append("closure")
        return float(loss.detach())

    assert optimizer.step(closure) == 9 * 64 * 64 and seen == ["closure", "after"]
    assert (p < 1).all()
    assert optimizer.step() is None


def test_grad_scaler() -> None:
    """An overflow leaves all as it was; other steps are the unscaled ones."""
    p, twin = weight(), weight()
    optimizer, other = AdamW([p]), AdamW([twin])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
        p.grad, twin.grad = scaler.scale(gradient), gradient
        if step == 1:
            assert p.grad is not None
            p.grad[0, 0] = torch.inf
        else:
            other.step()
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(p, twin) and float(optimizer.state[p]["step"]) == 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_what_is_not_finite_stays_alone(bad: float) -> None:
    """Its parameter stays, its states are 0; all others are as without it. (1e30 squared is infinite.)"""
    p, twin = weight(), weight()
    optimizer, other = stepped(AdamW([("w", p)])), stepped(AdamW([twin]))
    gradient = torch.randn(64, 64)
    p.grad, twin.grad = gradient.clone(), gradient.clone()
    p.grad[3, 5] = bad
    before = p[3, 5].item()
    with pytest.warns(NonFiniteWarning, match=r"1 element\(s\) of w\. They kept"):
        optimizer.step()
    other.step()
    assert p[3, 5].item() == before and optimizer.set_aside() == {"w": 1} and not other.set_aside()
    p.data[3, 5] = twin.data[3, 5]
    assert torch.equal(p, twin)
    for name in EIGHT:
        ours, theirs = (o.state[q][name].unpacked() for o, q in ((optimizer, p), (other, twin)))
        assert optimizer.state[p][name].dequantize()[3, 5] == 0
        ours[3, 5] = theirs[3, 5]
        assert torch.equal(ours, theirs)
    p.grad[4, :3] = bad
    optimizer.step()  # said once; the counts go on
    assert optimizer.set_aside() == {"w": 5}


def test_without_a_quantizer_nan_is_torchs() -> None:
    p = weight(4, 4)
    optimizer = AdamW([p])
    p.grad = torch.full((4, 4), torch.nan)
    optimizer.step()
    assert p.isnan().all()


def test_empty_scalar_and_strided() -> None:
    """No elements, no dimensions, not contiguous: blocks run in row-major order whatever the memory's."""
    params = [
        weight(0, 3),
        nn.Parameter(torch.tensor(2.0)),
        nn.Parameter(torch.randn(40, 30).T),
        weight(40, 30).detach(),
    ]
    params[3] = nn.Parameter(params[2].detach().clone(memory_format=torch.contiguous_format))
    optimizer = stepped(AdamW(params, min_size=0), 3)
    assert torch.equal(params[2], params[3]) and not params[2].is_contiguous()
    assert optimizer.state_bytes()["exp_avg"] == 0 + (1 + 4) + 2 * (1200 + 4 * 5)


def test_sparse_gradient() -> None:
    """Named, and nothing has moved."""
    table, p = nn.Embedding(10, 4, sparse=True), weight()
    optimizer = AdamW([("p", p), ("table", table.weight)])
    p.grad = torch.ones(64, 64)
    torch.autograd.backward(table(torch.tensor([1])).sum())
    with pytest.raises(UsageError, match=r"table has a sparse gradient.*SparseAdam"):
        optimizer.step()
    assert (p == 1).all() and not optimizer.state


def test_stochastic_rounding_draws_anew() -> None:
    """At every step, for every parameter and state, and by the seed; on average it is the state itself."""
    gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    codes, means = [], []
    for seed in (0, 0, 1):
        params = [weight(), weight()]
        optimizer = AdamW(params, betas=(0.0, 0.0), state="state8 rounding=stochastic", seed=seed)
        mean = torch.zeros(64, 64)
        for _ in range(60):
            for p in params:
                p.grad = gradient.clone()
            optimizer.step()
            codes += [optimizer.state[p]["exp_avg"].codes for p in params]
            mean += optimizer.state[params[0]]["exp_avg"].dequantize() / 60
        means.append(mean)
    assert not torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])  # parameters; steps
    assert all(torch.equal(a, b) for a, b in zip(codes[:120], codes[120:240], strict=True))
    assert not torch.equal(codes[0], codes[240])
    top = gradient.view(-1, 256).abs().amax(1, keepdim=True)
    inside = (gradient.view(-1, 256) / top).clamp(min=-0.99296875)  # the map has no -1
    error = means[0].view(-1, 256) / top - inside  # of one draw at most half of the largest gap, 0.0141, in the mean
    assert error.abs().max() < 5 * 0.0141 / 2 / 60**0.5


def test_copies() -> None:
    """deepcopy and torch's own pickling for processes carry the states along."""
    p = weight()
    optimizer = stepped(AdamW([p]), 2)
    twin = copy.deepcopy(optimizer)
    stepped(optimizer), stepped(twin)
    q = twin.param_groups[0]["params"][0]
    assert q is not p and torch.equal(p, q)
    assert torch.equal(optimizer.state[p]["exp_avg"].codes, twin.state[q]["exp_avg"].codes)


def test_states_follow_their_parameter() -> None:
    """A model that is cast after the optimizer was made goes on."""
    model = nn.Linear(64, 64)
    optimizer = stepped(AdamW(model.parameters()))
    model.bfloat16()
    stepped(optimizer)
    assert model.weight.dtype == torch.bfloat16 and kinds(optimizer) == ["BlockQTensor", "Tensor"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_moves_between_devices() -> None:
    """Codes stay codes both ways, by load_state_dict and by moving the parameters under the optimizer."""
    p = weight()
    saved = stepped(AdamW([p]), 2).state_dict()
    q = nn.Parameter(p.detach().cuda())
    there = AdamW([q])
    there.load_state_dict(saved)
    kept = there.state[q]["exp_avg"]
    assert kept.codes.is_cuda and torch.equal(kept.codes.cpu(), saved["state"][0]["exp_avg"]["codes"])
    q.data = q.data.cpu()
    stepped(there)
    assert there.state[q]["exp_avg"].codes.device.type == "cpu"


# ------------------------------------------------------------------------------------------------------------- loading
def test_another_quantizer_is_refused_or_converted() -> None:
    p = weight()
    optimizer = stepped(AdamW([p]), 3)
    saved = optimizer.state_dict()
    choices: list[dict[str, Any]] = [
        {"state": None},
        {"state": "state8 flat=64"},
        {"min_size": 10**6},
        {"state": "state4"},
    ]
    for options in choices:
        q = weight()
        other = AdamW([("w", q)], **options)
        with pytest.raises(SchemeError, match=r"w: exp_avg: .*saved as 'dynamic8 flat=256.*convert=True"):
            other.load_state_dict(saved)
        assert not other.state and other.param_groups[0]["lr"] == 1e-3
        other.load_state_dict(saved, convert=True)
        assert other.param_groups[0].get("state") == AdamW([weight()], **options).param_groups[0]["state"]
        for name in EIGHT:
            values, line = optimizer.state[p][name].dequantize(), other._lines(other.param_groups[0], q)[name]
            kept = other.state[q][name]
            if line is None:
                assert torch.equal(kept, values)
            else:
                assert torch.equal(kept.codes, Quantizer(line).quantize(values).codes)
        assert float(other.state[q]["step"]) == 3


def test_from_torch() -> None:
    """torch.optim.AdamW's states, quantized on demand; its switches that we lack are refused."""
    p = weight()
    theirs = torch.optim.AdamW([p], lr=0.5)
    p.grad = torch.randn(64, 64)
    theirs.step()
    ours = AdamW([weight()])
    with pytest.raises(SchemeError, match=r"saved as 'float32'.*kept here as 'dynamic8"):
        ours.load_state_dict(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), convert=True)
    (state,) = ours.state.values()
    assert torch.equal(state["exp_avg"].codes, Quantizer("state8").quantize(theirs.state[p]["exp_avg"]).codes)
    assert ours.param_groups[0]["lr"] == 0.5 and float(state["step"]) == 1
    with pytest.raises(SchemeError, match="no maximize"):
        ours.load_state_dict(torch.optim.AdamW([weight()], maximize=True).state_dict())


def test_users_hooks_see_plain_states() -> None:
    """torch's own load would make floats of codes; hooks before see what was saved, hooks after what is kept."""
    optimizer = stepped(AdamW([weight()]))
    seen: list[type] = []
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: seen.append(type(saved["state"][0]["exp_avg"])))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(type(next(iter(o.state.values()))["exp_avg"])))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [dict, BlockQTensor] * 2


def broken(what: str, saved: dict[str, Any]) -> Any:
    entry = saved["state"][0]
    match what:
        case "floats":
            entry["exp_avg"] = {**entry["exp_avg"], "codes": entry["exp_avg"]["codes"].float()}
        case "bytes alone":
            entry["exp_avg"] = entry["exp_avg"]["codes"]
        case "short":
            entry["exp_avg"] = {**entry["exp_avg"], "codes": entry["exp_avg"]["codes"][:-1]}
        case "narrow scale":
            entry["exp_avg"] = {**entry["exp_avg"], "scale": entry["exp_avg"]["scale"].bfloat16()}
        case "no scale":
            entry["exp_avg"] = {k: v for k, v in entry["exp_avg"].items() if k != "scale"}
        case "says otherwise":
            entry["exp_avg"] = entry["exp_avg_sq"] | {"quantizer": entry["exp_avg"]["quantizer"]}
        case "shape":
            entry["exp_avg"] = torch.zeros(3)
        case "names":
            entry["momentum_buffer"] = entry.pop("exp_avg")
        case "step":
            entry["step"] = torch.tensor(1.5)
        case "text":
            entry["exp_avg"] = "codes"
        case "not one":
            return {"model": {}}
    return saved


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("floats", "4096 bytes; found .* of torch.float32"),
        ("bytes alone", "found torch.uint8"),
        ("short", "4096 bytes; found \\[4095\\]"),
        ("narrow scale", "float32 .* found torch.bfloat16"),
        ("no scale", "'scale' is missing"),
        ("says otherwise", "its description says otherwise"),
        ("shape", "shape \\[3\\]; the parameter here needs \\[64, 64\\]"),
        ("names", "exp_avg_sq, momentum_buffer, step were saved"),
        ("step", "number of steps taken"),
        ("text", "found str"),
        ("not one", "not an optimizer's state dict"),
    ],
)
def test_broken_state_dicts(what: str, message: str) -> None:
    """Each is one FileError, and the optimizer is as it was."""
    optimizer = stepped(AdamW([weight()]))
    other = stepped(AdamW([weight()]), 2)
    before = other.state_dict()
    with pytest.raises(FileError, match=message):
        other.load_state_dict(broken(what, optimizer.state_dict()))
    after = other.state_dict()
    assert torch.equal(before["state"][0]["exp_avg"]["codes"], after["state"][0]["exp_avg"]["codes"])
    assert float(after["state"][0]["step"]) == 2


def test_other_groups() -> None:
    saved = AdamW([weight(), weight()]).state_dict()
    for params in ([weight()], [{"params": [weight()]}, {"params": [weight()]}]):
        with pytest.raises(UsageError, match="same parameters in the same groups"):
            AdamW(params).load_state_dict(saved)


def test_flattened_states_that_are_none() -> None:
    optimizer = stepped(AdamW([weight()]))
    tensors, metadata = flatten(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = np.float32(0.5)  # as some schedules leave it
    assert unflatten(*flatten(optimizer.state_dict()))["param_groups"][0]["lr"] == 0.5
    assert set(tensors) == {f"0.{n}.{k}" for n in EIGHT for k in ("codes", "scale")} | {"0.step"}
    for bad in ({}, {"nybble.optim": "{"}, {"nybble.optim": '{"state": 3}'}):
        with pytest.raises(FileError, match="flattened"):
            unflatten(tensors, bad)
    del tensors["0.step"]
    with pytest.raises(FileError, match="flattened"):
        unflatten(tensors, metadata)


def test_an_offset_makes_no_second_moment_negative() -> None:
    """Whose square root would be NaN; a state of both signs keeps it."""
    kept = encode(torch.zeros(1, 256), "uint8 flat=256 scale_format=float32")
    assert isinstance(kept, BlockQTensor)
    below = replace(kept, params=replace(kept.params, offset=torch.full((1, 1), -1e-9)))
    assert bool((decode(below, "signed", torch.device("cpu")) < 0).all())
    assert torch.equal(decode(below, "nonnegative", torch.device("cpu")), torch.zeros(1, 256))


def test_a_loaded_state_is_not_shared() -> None:
    """Going on does not change what was loaded."""
    optimizer = stepped(AdamW([weight(), weight(8)]))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    stepped(optimizer)
    file.seek(0)
    for index, entry in torch.load(file, weights_only=True)["state"].items():
        assert float(saved["state"][index]["step"]) == 1
        ours, theirs = (x["exp_avg"] for x in (saved["state"][index], entry))
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else torch.equal(ours["codes"], theirs["codes"])


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ("state8 static", SchemeError, "calibrated once"),
        ("udynamic8 flat=256", SchemeError, r"exp_avg.*both signs.*udynamic8 has no negative.*each state its own"),
        ({"exp_avg": "state8", "exp_avg_sq": "binary tensor"}, SchemeError, "exp_avg_sq.*never negative.*binary"),
        ({"exp_avg": "state8", "exp_avg_sq": "dynamic8 flat=256 center=mean"}, SchemeError, "center=mean"),
        ("nf4-dq", SchemeError, "exp_avg_sq.*center=mean"),
        ({"exp_avg": None, "exp_avg_sq": "linear8 tensor scale=one"}, SchemeError, "linear8 has no zero"),
        ({"exp_avg": None, "exp_avg_sq": "linear8 flat=8 scale_format=(float8_e4m3fn tensor)"}, SchemeError, "no zero"),
        ("float8_e4m3fn tensor floor=normal", SchemeError, "floor=normal stores no zero"),
        ("int8 flat=8 scale_format=(float8_e4m3fn tensor rounding=stochastic)", SchemeError, "stochastically"),
        (
            {"exp_avg": None, "exp_avg_sq": "uint8 flat=8 scale=extreme"},
            FormatError,
            "state 'exp_avg_sq'.*uint8 has none",
        ),
        ("state9", UsageError, "Did you mean"),
        ("", UsageError, "empty quantizer line"),
        (8, UsageError, "quantizer line such as 'state8'"),
        ({"exp_avg": "state8"}, UsageError, "leaves out 'exp_avg_sq'"),
        ({"exp_avg": "state8", "exp_avg_sqr": None}, UsageError, "Did you mean 'exp_avg_sq'"),
        ("int8 group=100", GranularityError, "w: 64 columns, and group=100 does not divide them"),
        ("int8 group=64 scale_format=(float8_e4m3fn group=3)", GranularityError, "w: 1 columns, and group=3"),
    ],
)
def test_illegal_quantizers(choice: Any, error: type[NybbleError], message: str) -> None:
    with pytest.raises(error, match=message):
        AdamW([("w", weight())], state=choice)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr is a number >= 0; got -1"),
        ({"lr": 1e39}, "lr is a number >= 0 and <= 3.40282e.38, float32's largest; got 1e.39"),
        ({"lr": torch.tensor(1e-3)}, "lr is a number"),
        ({"lr": float("nan")}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas is 2 numbers >= 0 and < 1; got 0.9, 1.0"),
        ({"betas": 0.9}, "betas is 2 numbers"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": "1"}, "weight_decay"),
        ({"min_size": 0.5}, "min_size is a whole number"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        AdamW([weight()], **options)
    optimizer = AdamW([weight()])
    with pytest.raises(UsageError, match=message):
        optimizer.add_param_group({"params": [weight()], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([], "empty parameter list"),
        (torch.ones(3), "iterable"),
        ([torch.ones(3, requires_grad=True) * 2], "non-leaf"),
        ([nn.Parameter(torch.ones(3, dtype=torch.float64))], "parameter 0 of group 0: .*torch.float64"),
        ([nn.Parameter(torch.ones(3, dtype=torch.complex64))], "torch.complex64"),
    ],
)
def test_parameters_that_are_none(params: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AdamW(params)


def test_a_schedule_gone_wrong_changes_nothing() -> None:
    p = weight()
    optimizer = AdamW([p])
    optimizer.param_groups[0]["lr"] = -1.0
    p.grad = torch.ones(64, 64)
    with pytest.raises(UsageError, match="lr"):
        optimizer.step()
    assert (p == 1).all()
