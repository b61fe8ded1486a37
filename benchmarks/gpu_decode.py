"""Decoding with a whole 8B-shaped llama on one GPU: tokens a second of packed models, of bfloat16 and of peers.

    python benchmarks/gpu_decode.py --out benchmarks/results/gpu_decode.json

A random llama of Llama 3's 8B shape is made on the device, one matrix at a time; each variant replaces the linears of
its 32 layers, all else (transformers' modules, embedding, head, static cache) is shared. A step (embedding to the next
token) is a CUDA graph and writes its own input; a rate is the median of turns of some steps, a ratio the median of the
ratios to the bfloat16 model's turn right before. ``modules`` are transformers' as they come; with ``fused`` each norm,
rotary embedding and gate is one kernel of torch.compile's, for every variant alike. Times without a graph stand beside.
The floor is what a step has to read over the bandwidth of this run's best copy.

Before a variant is timed, two of its layers with the head are compared with float32 of the same rounded weights (and
roundings of activations): its distance may be 1.5 times that of the readable way, which multiplies unpacked weights in
bfloat16. Without a GPU the script runs the same steps, uncaptured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache
from transformers.models.llama import modeling_llama as llama

from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.kv_model import cache_argument
from nybble.nn.linear import QuantLinear
from nybble.nn.swap import set_module
from nybble.quantizer import Quantizer

SHAPE = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
SMALL = SHAPE | {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
                 "num_key_value_heads": 2}  # fmt: skip
PACKED = {  # weights, inputs
    "INT4 g128": ("int4 group=128", ""),
    "NVFP4": ("nvfp4", ""),
    "MXFP4": ("mxfp4", ""),
    "NF4": ("nf4-bnb", ""),
    "INT4 g64": ("int4 group=64", ""),
    "FP8 x FP8": ("float8_e4m3fn channel", "float8_e4m3fn token"),
    "INT4 x INT8": ("int4 channel", "int8 token"),
    "E2M1 x FP8": ("float4_e2m1fn channel", "float8_e4m3fn token"),
    "NVFP4 x NVFP4": ("nvfp4", "nvfp4"),
    "MXFP4 x MXFP4": ("mxfp4", "mxfp4"),
}
BAR = 2.0
"""Times bfloat16, of 4-bit weights, batch 1, in a graph."""
FOUR_BITS = ("INT4 g128", "INT4 g64", "NVFP4", "MXFP4", "NF4")
FIRST = ("INT4 g128", "tinygemm INT4 g128", "NF4", "bitsandbytes NF4")
GLUE = ("modules", "fused")
CACHE, BEHIND = 256, 64
"""Tokens that the cache holds, and that are in it when a turn begins."""
WORSE = 1.5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Row = dict[str, Any]


# -------------------------------------------------------------------------------------------------------------- models
def drawn(name: str, *shape: int) -> Tensor:
    """Normal numbers in bfloat16, the same for a name and a shape."""
    generator = torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))
    return (torch.randn(shape, device=DEVICE, generator=generator) * shape[-1] ** -0.5).bfloat16()


class Shared:
    """The embedding and the head that all variants have."""

    def __init__(self, shape: Row) -> None:
        size = (shape["vocab_size"], shape["hidden_size"])
        self.table, self.head = drawn("embedding", *size) * size[1] ** 0.5, drawn("head", *size)


Linear = Callable[[Tensor], nn.Module]
"""A float weight [out, in] -> what stands for the linear."""


def model_of(shape: Row, layers: int, shared: Shared, linear: Linear, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A llama whose weights are made one by one."""
    config = AutoConfig.for_model("llama", **shape, num_hidden_layers=layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            set_module(model, name, linear(drawn(name, *module.weight.shape)))
        elif isinstance(module, llama.LlamaRMSNorm):
            module.weight = nn.Parameter(torch.ones(module.weight.shape, dtype=dtype, device=DEVICE))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(DEVICE)
    model.model.embed_tokens.weight = nn.Parameter(shared.table.to(dtype))
    model.lm_head.weight = nn.Parameter(shared.head.to(dtype))
    return model.requires_grad_(False).eval()


def plain(weight: Tensor) -> nn.Module:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


def packed(name: str, dense: torch.dtype | None = None) -> Linear:
    """Nybble's layer; with ``dense`` its weight is unpacked in that dtype."""
    weights, inputs = (Quantizer(line) if line else None for line in PACKED[name])
    assert weights is not None

    def made(weight: Tensor) -> nn.Module:
        found = weights.quantize(weight.float())
        own = None if inputs is None else ActivationQuantizer(inputs).to(DEVICE)
        return QuantLinear(found if dense is None else found.dequantize(dense), None, own)

    return made


class Peer(nn.Module):
    """Somebody else's product."""

    def __init__(self, call: Callable[[Tensor], Tensor], *held: Tensor) -> None:
        super().__init__()
        self.call = call
        for i, tensor in enumerate(held):
            self.register_buffer(f"held{i}", tensor)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.call(x)


def grouped(weight: Tensor, group: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric INT4 to the nearest: codes uint8 [n, k]; scales and least values, bfloat16 [n, k / group]."""
    blocks = weight.float().unflatten(1, (-1, group))
    low, high = blocks.amin(2), blocks.amax(2)
    scale = ((high - low) / 15).clamp_min(1e-8)
    codes = ((blocks - low[..., None]) / scale[..., None]).round().clamp(0, 15)
    return codes.flatten(1).to(torch.uint8), scale.bfloat16(), low.bfloat16()


def tinygemm(weight: Tensor) -> nn.Module:
    if DEVICE.type != "cuda":
        raise ImportError("torch._weight_int4pack_mm is a GPU's")
    codes, scale, low = grouped(weight)
    held = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    sides = torch.stack((scale, low + 8 * scale), 2).transpose(0, 1).contiguous()

    def call(x: Tensor) -> Tensor:
        y = torch._weight_int4pack_mm(x.view(-1, x.shape[-1]), held, 128, sides)
        return y.view(*x.shape[:-1], y.shape[-1])

    return Peer(call, held, sides)


def bitsandbytes(weight: Tensor) -> nn.Module:
    import bitsandbytes as bnb

    held, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    return Peer(lambda x: bnb.matmul_4bit(x, held.t(), quant_state=state), held, state.absmax)


def gemlite(weight: Tensor) -> nn.Module:
    from gemlite.helper import A16Wn

    codes, scale, low = grouped(weight)
    made: nn.Module = A16Wn(device=str(DEVICE), dtype=torch.bfloat16).from_weights(
        codes, scale, -low / scale, W_nbits=4, group_size=128
    )
    return made


PEERS: dict[str, tuple[str, Linear]] = {
    "tinygemm INT4 g128": ("torch", tinygemm),
    "bitsandbytes NF4": ("bitsandbytes", bitsandbytes),
    "gemlite INT4 g128": ("gemlite", gemlite),
}


# ---------------------------------------------------------------------------------------------------------------- glue
@contextmanager
def glue(kind: str) -> Iterator[None]:
    """Norms, rotary embeddings and gates as they come, or each in one kernel of torch.compile's."""
    norm, gates, rotary = llama.LlamaRMSNorm.forward, llama.LlamaMLP.forward, llama.apply_rotary_pos_emb
    if kind == "fused":
        llama.LlamaRMSNorm.forward = lambda self, x: _norm(x, self.weight, self.variance_epsilon)
        llama.LlamaMLP.forward = lambda self, x: self.down_proj(_gate(self.gate_proj(x), self.up_proj(x)))
        llama.apply_rotary_pos_emb = _rotary
    try:
        yield
    finally:
        llama.LlamaRMSNorm.forward, llama.LlamaMLP.forward, llama.apply_rotary_pos_emb = norm, gates, rotary


@torch.compile(dynamic=False)
def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@torch.compile(dynamic=False)
def _gate(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


@torch.compile(dynamic=False)
def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    found = []
    for x in (q, k):
        one, two = x.chunk(2, -1)
        found.append(x * cos + torch.cat((-two, one), -1) * sin)
    return found[0], found[1]


# ------------------------------------------------------------------------------------------------------------- decoding
class Decoder:
    """A model that writes a token for each of some sequences, behind random keys and values."""

    def __init__(self, model: Any, batch: int, kind: str = "modules") -> None:
        self.model, self.batch, self.kind, self.graph = model, batch, kind, None
        config, dtype = model.config, model.lm_head.weight.dtype
        self.ids = torch.arange(batch, device=DEVICE).view(-1, 1)
        self.position = torch.full((1, 1), BEHIND, device=DEVICE)
        self.places = torch.arange(CACHE, device=DEVICE)
        self.cache = StaticCache(config=config, max_cache_len=CACHE)
        self.named = {cache_argument(type(model)): self.cache}
        heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        for i, layer in enumerate(self.cache.layers):
            one = torch.zeros(batch, heads, 1, width, dtype=dtype, device=DEVICE)
            layer.lazy_initialization(one, one)
            for side, to in (("keys", layer.keys), ("values", layer.values)):
                to[:, :, :BEHIND] = drawn(f"{side}{i}", batch, heads, BEHIND, width) * width**0.5
        self.wide = torch.zeros((), dtype=dtype, device=DEVICE)
        self.least = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=DEVICE)
        self.reset()

    def reset(self) -> None:
        """Back to the first token behind those that the cache began with."""
        self.position.fill_(BEHIND)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(BEHIND)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Logits of the next token, which is what the next step reads."""
        mask = torch.where(self.places <= self.position, self.wide, self.least)
        found = self.model(
            input_ids=self.ids,
            position_ids=self.position.expand(self.batch, 1),
            attention_mask=mask.view(1, 1, 1, CACHE).expand(self.batch, 1, 1, CACHE),
            use_cache=True,
            **self.named,
        )
        logits: Tensor = found.logits[:, -1]
        self.ids.copy_(logits.argmax(-1, keepdim=True))
        self.position.add_(1)
        return logits

    def prepare(self) -> None:
        """Let the first calls make what they keep, then capture a step."""
        with glue(self.kind):
            if DEVICE.type != "cuda":
                self.step()
                return
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(aside)
            self.reset()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()
            self.graph.replay()
            wait()

    def turn(self, steps: int, eager: bool = False) -> float:
        """Milliseconds of a step."""
        self.reset()
        wait()
        start = time.perf_counter()
        if self.graph is not None and not eager:
            for _ in range(steps):
                self.graph.replay()
        else:
            with glue(self.kind):
                for _ in range(steps):
                    self.step()
        wait()
        return (time.perf_counter() - start) * 1e3 / steps


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def held() -> float:
    """GB of tensors on the device."""
    gc.collect()
    return torch.cuda.memory_allocated() / 1e9 if DEVICE.type == "cuda" else 0.0


def bandwidth() -> float:
    """Bytes a second, read and written, of the quickest copy of 1 GiB."""
    one = torch.ones(1 << (28 if DEVICE.type == "cuda" else 20), device=DEVICE)
    two, best = torch.empty_like(one), 0.0
    for copy in (lambda: two.copy_(one), lambda: torch.neg(one, out=two)) * 4:
        wait()
        start = time.perf_counter()
        for _ in range(10):
            copy()
        wait()
        best = max(best, 10 * 2 * one.nbytes / (time.perf_counter() - start))
    return best


def read_by_step(model: Any, batch: int) -> int:
    """Bytes of weights, of tokens' keys and values, and of what is written of them."""
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * 2 * model.model.layers[0].self_attn.head_dim
    embedding = model.model.embed_tokens.weight
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if t is not embedding}
    return sum(tensors.values()) + batch * (BEHIND * token + embedding.shape[1] * 2)


# --------------------------------------------------------------------------------------------------------------- checks
def distances(name: str, shape: Row, shared: Shared) -> Row:
    """Of two layers' logits from float32's: the packed model's, and the readable way's; relative to their norm.

    Raises:
        ArithmeticError: the packed model's is too far.
    """
    made = {"packed": (None, torch.bfloat16), "plain": (torch.bfloat16,) * 2, "exact": (torch.float32,) * 2}
    found = {}
    for kind, (dense, dtype) in made.items():
        model = model_of(shape, 2, shared, packed(name, dense), dtype)  # type: ignore[arg-type]
        found[kind] = Decoder(model, 8).step().double()
    exact = found.pop("exact")
    far = {kind: float((y - exact).norm() / exact.norm()) for kind, y in found.items()}
    if not far["packed"] <= WORSE * far["plain"] + 1e-6:
        raise ArithmeticError(f"logits are {far['packed']:.3g} from float32's, the readable way's {far['plain']:.3g}")
    return {"error": round(far["packed"], 6), "error_unpacked": round(far["plain"], 6)}


def sane(linear: Linear, shape: Row) -> Row:
    """Whether a peer's product is one of a weight in four bits."""
    width = shape["hidden_size"]
    weight, x = drawn("sane", width, width), drawn("x", 8, 1, width)
    exact = functional.linear(x, weight).float()
    error = float((linear(weight)(x).float() - exact).norm() / exact.norm())
    if not error < 0.2:
        raise ArithmeticError(f"a product is {error:.3g} from the float weight's")
    return {"error_of_a_product": round(error, 4)}


# ----------------------------------------------------------------------------------------------------------- measuring
class Bench:
    """The bfloat16 model's decoders, and what is measured beside them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.shape, self.layers, self.options = SMALL if options.small else SHAPE, options.layers, options
        self.shared = Shared(self.shape)
        self.speed, self.begin = bandwidth(), time.perf_counter()
        before = held()
        self.floats = model_of(self.shape, self.layers, self.shared, plain)
        self.bf16_gb = held() - before
        self.decoders: dict[tuple[int, str], Decoder] = {}
        self.glue = list(GLUE)

    def spent(self) -> float:
        """Seconds since the bandwidth was measured."""
        return time.perf_counter() - self.begin

    def floats_rows(self) -> Iterator[Row]:
        """Capture and time the bfloat16 model; glue that can't be compiled is left out, and said."""
        for batch in self.options.batches:
            for kind in list(self.glue):
                made = Decoder(self.floats, batch, kind)
                try:
                    made.prepare()
                except Exception as problem:
                    if kind == "modules":
                        raise
                    self.glue.remove(kind)
                    yield {"variant": "bfloat16", "glue": kind, "failed": said(problem)}
                    continue
                self.decoders[batch, kind] = made
                ms = [made.turn(self.options.steps) for _ in range(self.options.rounds)]
                row = {"variant": "bfloat16", "batch": batch, "glue": kind}
                yield row | self.figures(made, ms) | {"model_gb": round(self.bf16_gb, 3)}

    def figures(self, made: Decoder, ms: list[float]) -> Row:
        """Of turns of so many milliseconds a step."""
        floor = read_by_step(made.model, made.batch) / self.speed * 1e3
        middle = statistics.median(ms)
        eager = statistics.median(made.turn(4, eager=True) for _ in range(2)) if made.kind == "modules" else None
        return {
            "tokens_per_s": round(made.batch * 1e3 / middle, 1), "ms": round(middle, 4), "floor_ms": round(floor, 4),
            "times_floor": round(middle / floor, 3),
        } | ({} if eager is None else {"eager_ms": round(eager, 3)})  # fmt: skip

    def variant(self, name: str, linear: Linear, check: Callable[[], Row]) -> Iterator[Row]:
        """Rows of a model, beside the bfloat16 one."""
        facts = check()
        before = held()
        model = model_of(self.shape, self.layers, self.shared, linear)
        model_gb = held() - before
        for batch in self.options.batches:
            for kind in self.glue:
                if DEVICE.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                made = Decoder(model, batch, kind)
                made.prepare()
                own, ratios = [], []
                for _ in range(self.options.rounds):
                    beside = self.decoders[batch, kind].turn(self.options.steps)
                    own.append(made.turn(self.options.steps))
                    ratios.append(beside / own[-1])
                row = {"variant": name, "batch": batch, "glue": kind} | self.figures(made, own)
                row |= {"times_bf16": round(statistics.median(ratios), 3), "model_gb": round(model_gb, 3)}
                if DEVICE.type == "cuda":
                    row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9 - before, 3)
                if name in FOUR_BITS and batch == 1:
                    row |= {"bar": BAR, "met": row["times_bf16"] >= BAR}
                yield row | facts
                del made


def said(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"[:400]


def build(names: list[str]) -> str:
    """Compile what the CUDA kernels need for these formats, all at once; what there was to say."""
    if DEVICE.type != "cuda":
        return "no GPU"
    from nybble.kernels import _few_rows
    from nybble.kernels._gpu_weights import Weight, weight_of

    weights = [weight_of(Quantizer(PACKED[name][0]).quantize(drawn(name, 64, 256).float())) for name in names]
    found = {_few_rows.kind_of(w, torch.bfloat16, m) for w in weights if isinstance(w, Weight) for m in (1, 8)}
    kinds = [kind for kind in found if not isinstance(kind, str)]
    start, device = time.perf_counter(), torch.cuda.current_device()

    def one(kind: Any) -> bool:
        torch.cuda.set_device(device)
        return _few_rows.library(kind) is not None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(one, kinds))
    return f"{sum(made)} of {len(kinds)} CUDA kernels compiled in {time.perf_counter() - start:.1f} s"


def variants(options: argparse.Namespace, shape: Row, shared: Shared) -> Iterator[tuple[str, str, Linear, Any]]:
    """Name, what has to be installed, its linears, its check."""
    every: dict[str, tuple[str, Linear, Any]] = {
        name: ("torch", packed(name), lambda name=name: distances(name, shape, shared)) for name in PACKED
    }
    every |= {name: (needs, linear, lambda of=linear: sane(of, shape)) for name, (needs, linear) in PEERS.items()}
    for name in [*FIRST, *(name for name in every if name not in FIRST)]:
        if not options.variants or name in options.variants:
            yield (name, *every[name])


def rows_of(bench: Bench) -> Iterator[Row]:
    yield from bench.floats_rows()
    for name, needs, linear, check in variants(bench.options, bench.shape, bench.shared):
        if find_spec(needs) is None:
            yield {"variant": name, "absent": f"{needs} isn't installed"}
            continue
        if bench.spent() > bench.options.seconds:
            yield {"variant": name, "absent": f"not begun after {bench.spent():.0f} s"}
            continue
        try:
            yield from bench.variant(name, linear, check)
        except Exception as problem:
            yield {"variant": name, "failed": said(problem)}
        gc.collect()


def installed(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--steps", type=int, default=32, help="of a turn (at most 190)")
    parser.add_argument("--rounds", type=int, default=3, help="turns")
    parser.add_argument("--seconds", type=float, default=90, help="no variant is begun after these (default 90)")
    parser.add_argument("--small", action="store_true", help="256 wide, to try the script")
    options = parser.parse_args()
    names = [name for name in PACKED if not options.variants or name in options.variants]
    print(build(names), flush=True)
    bench = Bench(options)
    report: Row = {
        "what": (__doc__ or "").partition("\n")[0],
        "command": " ".join(["python", "benchmarks/gpu_decode.py", *(a.rpartition("/")[2] for a in sys.argv[1:])]),
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
        "versions": versions() | installed("triton", "bitsandbytes", "gemlite") | {"cuda": torch.version.cuda},
        "copy_bytes_a_second": round(bench.speed),
        "model": bench.shape | {"num_hidden_layers": options.layers},
        "steps": options.steps, "rounds": options.rounds, "behind": BEHIND, "rows": [],
    }  # fmt: skip
    print(f"{report['device']}, copies {bench.speed / 1e12:.3f} TB/s, bfloat16 {bench.bf16_gb:.2f} GB", flush=True)
    for row in rows_of(bench):
        report["rows"].append(row)
        report["seconds"] = round(bench.spent())
        print(f"{bench.spent():5.0f} s  {json.dumps(row)}", flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(options.out, report)
    print(f"{bench.spent():.0f} s")


if __name__ == "__main__":
    main()
