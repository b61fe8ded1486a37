"""Whether every recipe still gives the bytes that another version of nybble gave, on tiny models of all families.

    python benchmarks/same_bytes.py --before COMMIT            writes benchmarks/results/same_bytes.json

Both versions run here, one after the other, on the same model folders and text: bytes of bfloat16 products differ
between processors, so hashes of one machine say nothing about another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "same_bytes.json"
GROUPED = "float4_e2m1fn group=16 scale_format=float16"
#: case -> recipe and changes to its scheme
CASES: dict[str, tuple[str, dict[str, str]]] = {
    "rtn": ("rtn", {"weights": GROUPED}),
    "rtn nvfp4, fp8 tokens": ("rtn", {"weights": "nvfp4", "activations": "float8_e4m3fn token"}),
    "mse": ("mse", {"weights": GROUPED}),
    "minmax-fp": ("minmax-fp", {}),
    "minmax-int": ("minmax-int", {}),
    "gptq": ("gptq", {"weights": "int4 group=16"}),
    "gptq, int8 tensors, embeddings": (
        "gptq",
        {"weights": "int4 group=16", "activations": "int8 tensor static", "embeddings": "int4 channel"},
    ),
    "fp-baseline": ("fp-baseline", {"effort": "quick"}),
    "llm-fp4": ("llm-fp4", {"effort": "quick"}),
    "llm-fp4, matmuls": ("llm-fp4", {"effort": "quick", "matmuls": "float8_e4m3fn tensor static"}),
    "smoothquant": ("smoothquant", {}),
}


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", help="the commit to compare with")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_models(work)
        tree = work / "before"
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), arguments.before],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        try:
            before, after = run(tree, work), run(ROOT, work)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    rows = [{"case": case, "before": before[case], "after": after[case]} for case in before]
    differ = [row for row in rows if row["before"] != row["after"]]
    for row in differ:
        print(f"differs: {row['case']}: {row['before'][:60]} | {row['after'][:60]}")
    print(f"{len(rows) - len(differ)} of {len(rows)} are the same")
    commit = subprocess.run(
        ["git", "rev-parse", arguments.before], cwd=ROOT, check=True, capture_output=True, text=True
    )
    head = {"before": commit.stdout.strip(), "processor": platform.processor() or platform.machine()}
    RESULT.write_text(json.dumps(head | {"same": len(rows) - len(differ), "rows": rows}, indent=1) + "\n")


def make_models(work: Path) -> None:
    """A folder for every family, and a text."""
    sys.path.insert(0, str(ROOT))
    from tests.parts.models.test_encoders import made
    from tests.tiny import FAMILIES, save_text, save_tiny, tiny_tokenizer

    for family in FAMILIES:
        save_tiny(work / "models" / family, family)
    for family in ("bert", "bart", "t5"):
        made(family).save_pretrained(work / "models" / family)
        tiny_tokenizer().save_pretrained(work / "models" / family)
    save_text(work / "text.txt", 3000)


def run(tree: Path, work: Path) -> dict[str, str]:
    """The child's answer under one version of nybble."""
    found = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--child", str(work)],
        env=os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"},
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    answer: dict[str, str] = json.loads(found.stdout)
    return answer


def child(work: Path) -> None:
    """Quantize every model in every way; print hashes of the files, or errors."""
    import nybble

    found: dict[str, str] = {}
    for folder in sorted((work / "models").iterdir()):
        for case, (recipe, changes) in CASES.items():
            out = Path(tempfile.mkdtemp(dir=work)) / "out"
            key = f"{folder.name}: {case}"
            try:
                quantize(nybble, folder, out, recipe, changes, work / "text.txt")
                found[key] = digest(out)
            except Exception as error:  # a fault of either version is a row like any other
                found[key] = f"{type(error).__name__}: {error}".replace(f"{work}/", "")
            print(key, found[key][:70], file=sys.stderr)
    print(json.dumps(found))


def quantize(nybble: Any, model: Path, out: Path, recipe: str, changes: dict[str, Any], text: Path) -> None:
    """One run."""
    try:
        from nybble.recipe import build_recipe
    except ImportError:
        from nybble.pipelines.request import build_recipe  # where it was
    made = build_recipe(recipe, **changes)
    nybble.quantize(str(model), made, str(text), out=out, settings=nybble.Settings(samples=8, seq_len=24, batch=4))


def digest(out: Path) -> str:
    """sha256 of all weights and of config.json."""
    total = hashlib.sha256()
    for path in sorted(out.glob("*.safetensors")):
        total.update(path.read_bytes())
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"].pop("nybble_version")
    total.update(json.dumps(config, sort_keys=True).encode())
    return total.hexdigest()


if __name__ == "__main__":
    main()
