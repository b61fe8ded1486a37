"""The other side of the GPTQ benchmark: llm-compressor on the same tokens, judged by the same ruler.

Runs in its own environment (`pip install llmcompressor`), never beside nybble: the two only share token tensors
and a float model folder. One run quantizes one model with one scheme and one method, times the quantization alone
(loading, evaluation and saving stay outside), and writes a JSON record.

Schemes, in llm-compressor's own terms:
    int4-g64   weights int4, symmetric, one scale per 64 columns; activations untouched (W4A16). 64 and not the
               usual 128, because SmolLM2's 576 columns are not divisible by 128 and llm-compressor refuses then.
    nvfp4      its `NVFP4` preset: weights and input activations float4 in groups of 16 (W4A4), with calibrated
               per-tensor scales.
`lm_head` stays float. Everything else is llm-compressor's default, its activation ordering included
(`--actorder none` gives the plain column order).

Perplexity: exp of the mean negative log-likelihood over windows of L tokens, each giving L - 1 predictions;
forward in the model's dtype, log-softmax in float32. The float model is judged by the same code, so that the
other side of the benchmark can check its own evaluation against the number in the record.

    python benchmarks/peers/llm_compressor_gptq.py --model FOLDER --calibration calib.safetensors \
        --heldout heldout.safetensors --scheme int4-g64 --method gptq --device cpu --json record.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with a float model (safetensors)")
    parser.add_argument("--calibration", type=Path, required=True, help="safetensors with input_ids, int64 [N, L]")
    parser.add_argument("--heldout", type=Path, help="safetensors with input_ids, int64 [N, L]: report perplexity")
    parser.add_argument("--scheme", choices=("int4-g64", "nvfp4"), required=True)
    parser.add_argument("--method", choices=("gptq", "rtn"), default="gptq")
    parser.add_argument("--actorder", choices=("default", "none"), default="default", help="GPTQ's column order")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of model and forwards")
    parser.add_argument("--samples", type=int, help="use only the first calibration sequences (default: all)")
    parser.add_argument("--batch", type=int, default=1, help="calibration sequences a forward (llm-compressor's: 1)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--out", type=Path, help="save the compressed checkpoint here")
    parser.add_argument("--json", type=Path, help="write the record here (default: print it)")
    return parser.parse_args()


def load_tokens(path: Path, samples: int | None = None) -> torch.Tensor:
    """Return `input_ids` of a safetensors file, int64 [N, L], or its first `samples` rows."""
    import torch
    from safetensors.torch import load_file

    ids = load_file(path)["input_ids"]
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise SystemExit(f"{path}: input_ids must be int64 [N, L], got {ids.dtype} {list(ids.shape)}")
    return ids if samples is None else ids[:samples]


def load_model(args: argparse.Namespace) -> Any:
    """Load the float model on the CPU; llm-compressor moves the layer it works on to the accelerator itself."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()


def modifier(scheme: str, method: str, actorder: str) -> Any:
    """Build llm-compressor's recipe: one modifier, lm_head ignored, its defaults for all that is not named here."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    options: dict[str, Any] = {"ignore": ["lm_head"]}
    if scheme == "int4-g64":
        weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=64)
        options["config_groups"] = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    else:
        options |= {"scheme": "NVFP4", "targets": ["Linear"]}
    if method == "rtn":
        return QuantizationModifier(**options)
    return GPTQModifier(**options) if actorder == "default" else GPTQModifier(**options, actorder=None)


def calibration_loader(ids: torch.Tensor, batch: int) -> Any:
    """Wrap the token rows as the batches that llm-compressor reads, in order, with nothing padded or cut."""
    from torch.utils.data import DataLoader

    rows = [{"input_ids": row} for row in ids]
    return DataLoader(rows, batch_size=batch)  # type: ignore[arg-type]


def perplexity(model: Any, ids: torch.Tensor, device: str) -> float:
    """Return exp(mean NLL) of token windows [N, L]: L - 1 predictions each, log-softmax in float32."""
    import torch

    total, count = 0.0, 0
    with torch.inference_mode():
        for window in ids.split(1):
            window = window.to(device)
            logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum")
            total += nll.item()
            count += window.shape[1] - 1
    return math.exp(total / count)


def peak_rss_bytes() -> int:
    """Return this process's largest resident size so far, in bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cpu_name() -> str:
    """Return the processor's name as Linux tells it, else the platform's word."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def environment(device: str) -> dict[str, Any]:
    """Describe what the numbers were measured with."""
    import torch

    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "hardware": {"cpu": cpu_name(), "cpu_count": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu},
    }


def quantize(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Run llm-compressor on the model in place; return seconds and peak memory of that alone."""
    import torch
    from llmcompressor import oneshot

    ids = load_tokens(args.calibration, args.samples)
    loader = calibration_loader(ids, args.batch)
    recipe = modifier(args.scheme, args.method, args.actorder)
    before = peak_rss_bytes()
    if args.device == "cuda":
        torch.zeros(1, device="cuda")  # the context's start is not llm-compressor's time
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    oneshot(model=model, dataset=loader, recipe=recipe, num_calibration_samples=len(ids))
    if args.device == "cuda":
        torch.cuda.synchronize()
    return {
        "seconds": time.perf_counter() - start,
        "calibration_shape": list(ids.shape),
        "peak_rss_before_bytes": before,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
    }


def evaluate(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Judge the fake-quantized model in memory and a fresh float model on the held-out windows."""
    ids = load_tokens(args.heldout)
    if args.device == "cuda":
        from compressed_tensors.offload import dispatch_model

        dispatch_model(model)  # llm-compressor leaves the layers on the CPU, to be moved at each forward
    start = time.perf_counter()
    quantized = perplexity(model, ids, args.device)
    seconds = time.perf_counter() - start
    return {
        "ppl": quantized,
        "ppl_float": perplexity(load_model(args).to(args.device), ids, args.device),
        "heldout_shape": list(ids.shape),
        "eval_seconds": seconds,
    }


def main() -> None:
    """Quantize, evaluate, save, and write the record."""
    args = parse_arguments()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # llm-compressor takes any accelerator that torch shows it
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here; use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    keys = ("scheme", "method", "actorder", "device", "dtype", "batch")
    record: dict[str, Any] = {"tool": "llm-compressor"} | {key: getattr(args, key) for key in keys}
    record["model"] = args.model.name
    model = load_model(args)
    record |= quantize(model, args)
    if args.heldout:
        record |= evaluate(model, args)
    record |= environment(args.device)
    if args.out:
        model.save_pretrained(args.out, save_compressed=True)
        record["file_bytes"] = sum(path.stat().st_size for path in args.out.glob("*.safetensors"))
    text = json.dumps(record, indent=2) + "\n"
    if args.json:
        args.json.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
