"""llm-compressor's GPTQ as rows of the quality results, from what ../../gptq_vs_llm_compressor.py measured.

    PYTHONPATH=src:benchmarks/quality python benchmarks/quality/peers/llm_compressor.py
        --calibration python3.11-doc.jsonl [--results FILE]

Nothing is run again: model, calibration text, number of tokens and version are the same. That benchmark spreads its
128 sequences evenly over the text, where run.py draws them, and judges one text only; so its rows stand by themselves.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from run import RESULTS, named, record

from nybble.data import load_text, token_samples
from nybble.models.sources.open import open_source

MEASURED = Path(__file__).parents[2] / "results" / "gptq_vs_llm_compressor_h100.json"
NAMES = {"int4-g64": ("llm-compressor GPTQ INT4 g64", "16/4/16"), "nvfp4": ("llm-compressor GPTQ NVFP4", "16/4/4")}
TEXT = "debian-reference-en"


def main() -> None:
    """One line a scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--results", type=Path, default=MEASURED)
    args = parser.parse_args()
    tokenizer = open_source("demo:smollm2").tokenizer()
    rows = json.loads(args.results.read_text(encoding="utf-8"))["rows"]
    for ours, peer in zip(rows[::2], rows[1::2], strict=True):
        samples, seq_len = peer["calibration_shape"]
        text = load_text(args.calibration, "calibration", tokenizer)
        calibration = named(token_samples(text, tokenizer, samples=samples, seq_len=seq_len))
        name, bits = NAMES[peer["scheme"]]
        found = {"nll": math.log(peer["ppl"]), "ppl": peer["ppl"], "predictions": ours["predictions"]}
        row = {
            "name": name, "tool": peer["tool"], "version": peer["versions"]["llmcompressor"], "bits": bits,
            "layer_bits": ours["bits"], "seconds": round(peer["seconds"], 2), "device_memory": peer["peak_cuda_bytes"],
            "model": "demo:smollm2", "hardware": peer["hardware"], "versions": peer["versions"],
            "calibration": calibration, "texts": {TEXT: found},
        }  # fmt: skip
        record(RESULTS, row)


if __name__ == "__main__":
    main()
