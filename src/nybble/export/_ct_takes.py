"""Which vLLM, and which transformers, take which of compressed-tensors' schemes, and where that is said.

vLLM's versions are what its published packages show (0.5.0.post1, 0.5.1 to 0.5.5, 0.8.4, 0.8.5, 0.8.5.post1, 0.9.0,
0.14.1 and 0.15.0 were looked at): the first whose code chooses the scheme, "or earlier" where the one before that was
looked at is many versions older. Where only its source of November 2026 shows that a scheme is taken, none is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nybble.export import Takes

_PULL = "https://github.com/vllm-project/vllm/pull/"
_AT = "https://github.com/vllm-project/vllm/blob/{}/vllm/model_executor/layers/quantization/compressed_tensors/"
_SCHEMES = f"{_AT.format('main')}schemes/compressed_tensors_"


def _chosen(version: str) -> str:
    """Where a version chooses a scheme."""
    return f"{_AT.format(f'v{version}')}compressed_tensors.py"


@dataclass(frozen=True)
class _Said:
    """What a scheme is, for the rows below."""

    form: str
    bits: int
    strategy: str
    symmetric: bool
    inputs: str


def _inputs(args: Mapping[str, Any] | None) -> str:
    if not args:
        return "float"
    local = args["dynamic"] == "local"  # NVFP4's: a calibrated scale over those of the groups
    scale = "mx" if args.get("scale_dtype") is not None and not local else ""
    dynamic = " local" if local else "" if args["dynamic"] else " static"
    return f"{scale}{args['type']}{args['num_bits']} {args['strategy']}{dynamic}"


def _said(scheme: Mapping[str, Any]) -> _Said | None:
    weights = scheme.get("weights")
    if not weights:
        return None
    return _Said(
        scheme["format"],
        weights["num_bits"],
        weights["strategy"],
        weights["symmetric"],
        _inputs(scheme.get("input_activations")),
    )


def _vllm(weights: str, inputs: str, form: str, since: str, source: str, note: str = "") -> Takes:
    return Takes(weights=weights, inputs=inputs, form=form, runtime="vllm", since=since, source=source, note=note)


_ROWS: tuple[tuple[Callable[[_Said], bool], Takes], ...] = (
    (
        lambda s: s.form == "pack-quantized" and s.bits in (4, 8) and s.symmetric
        and s.strategy in ("group", "channel"),
        _vllm("int4, int8; group or channel", "float", "pack-quantized", "0.5.1", _chosen("0.5.1")),
    ),
    (
        lambda s: s.form == "pack-quantized" and s.bits in (4, 8) and not s.symmetric
        and s.strategy in ("group", "channel"),
        _vllm("int4, int8 symmetric=false; group or channel", "float", "pack-quantized", "0.8.5", f"{_PULL}14211"),
    ),
    (
        lambda s: s.form == "int-quantized" and s.bits == 8 and s.symmetric and s.strategy in ("tensor", "channel")
        and s.inputs in ("int8 token", "int8 tensor static"),
        _vllm("int8; tensor or channel", "int8; token, or tensor static", "int-quantized", "0.5.1", _chosen("0.5.1")),
    ),
    (
        lambda s: s.form == "int-quantized" and s.bits == 4 and s.strategy in ("group", "channel")
        and s.inputs == "int8 token",
        _vllm("int4; group or channel", "int8 token", "int-quantized", "0.14.1 or earlier", _chosen("0.14.1"),
              "on CPUs"),
    ),
    (
        lambda s: s.form == "float-quantized" and s.strategy in ("tensor", "channel")
        and s.inputs in ("float8 token", "float8 tensor", "float8 tensor static"),
        _vllm(
            "float8_e4m3fn; tensor or channel", "float8_e4m3fn; token, or tensor static", "float-quantized",
            "0.5.3", _chosen("0.5.3"),
        ),
    ),
    (
        lambda s: s.form == "float-quantized" and s.strategy == "block" and s.inputs == "float8 group",
        _vllm(
            "float8_e4m3fn block=128x128", "float8_e4m3fn group=128", "float-quantized", "0.14.1 or earlier",
            _chosen("0.14.1"),
        ),
    ),
    (
        lambda s: s.form == "naive-quantized" and s.bits == 8 and s.strategy in ("tensor", "channel", "block")
        and s.inputs == "float",
        _vllm("float8_e4m3fn; tensor, channel or block", "float", "naive-quantized", "0.5.4", _chosen("0.5.4"),
              "blocks later"),
    ),
    (
        lambda s: s.form == "nvfp4-pack-quantized" and s.inputs == "float",
        _vllm("nvfp4", "float", "nvfp4-pack-quantized", "0.9.0", f"{_PULL}17914"),
    ),
    (
        lambda s: s.form == "nvfp4-pack-quantized" and s.inputs == "float4 tensor_group local",
        _vllm(
            "nvfp4", "nvfp4-ct static", "nvfp4-pack-quantized", "", f"{_SCHEMES}w4a4_nvfp4.py",
            "inputs are rounded on Blackwell; elsewhere they stay in float",
        ),
    ),
    (
        lambda s: s.form == "mxfp4-pack-quantized" and s.inputs in ("float", "mxfloat4 group"),
        _vllm(
            "mxfp4", "float, or mxfp4", "mxfp4-pack-quantized", "0.14.1 or earlier", _chosen("0.14.1"),
            "that version leaves inputs in float",
        ),
    ),
    (
        lambda s: s.form == "mxfp8-quantized" and s.inputs == "mxfloat8 group",
        _vllm("mxfp8", "mxfp8", "mxfp8-quantized", "", f"{_SCHEMES}w8a8_mxfp8.py"),
    ),
)  # fmt: skip

HEAD = _vllm(
    "every scheme above, of `lm_head`", "as there", "all", "", f"{_PULL}37291",
    "came with that pull request, merged on 30 March 2026; earlier versions take the head for one in float",
)  # fmt: skip
_TRANSFORMERS = Takes(
    weights="every scheme of this table, int2 to int8 of any of its granularities, mxfp6",
    inputs="int, float8_e4m3fn, nvfp4, mxfp4, mxfp6, mxfp8; token, tensor, group",
    form="all",
    runtime="transformers",
    since="",
    source="https://huggingface.co/docs/transformers/quantization/compressed_tensors",
    note="opened with 5.23 and compressed-tensors 0.20; weights are dequantized at the first forward; several schemes "
    "in one model of fused experts are not loaded",
)

TAKES: tuple[Takes, ...] = (*(row for _, row in _ROWS), HEAD, _TRANSFORMERS)


def rows_for(scheme: Mapping[str, Any], *, head: bool = False) -> tuple[Takes, ...]:
    """The rows of vLLM that a layer's scheme is of; none where no vLLM is known to take it.

    Args:
        scheme: arguments by side, and the format.
        head: whether the layer gives logits: vLLM has packed ones since a later version, of any scheme.
    """
    said = _said(scheme)
    rows = () if said is None else tuple(row for fits, row in _ROWS if fits(said))
    return (HEAD,) if head and rows else rows
