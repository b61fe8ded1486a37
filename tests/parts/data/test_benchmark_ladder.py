"""benchmarks/ladder: the corpus, the sizes, the plan, and a training of some steps."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from benchmarks.ladder import __main__ as command
from benchmarks.ladder import bundle, sizes, text, train
from benchmarks.texts import SHORTEST_DOCUMENT

SENTENCE = "the file that a program reads when it starts holds lines of words which mean what their manual says"


def documents(count: int, seed: int = 0) -> list[str]:
    drawn = random.Random(seed)
    return [f"Page {i}. " + " ".join(drawn.choices(SENTENCE.split(), k=120)) for i in range(count)]


def uses() -> dict[str, list[str]]:
    held = {name: documents(12, seed=i) for i, name in enumerate(text.HELD_OUT)}
    return text.split(documents(400)) | held


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ladder") / "ladder"
    text.write(folder, uses(), {"a-package": {"documents": 100}}, {})
    return folder


@pytest.mark.parametrize("name", sizes.names())
def test_a_size_has_the_parameters_that_it_declares(name: str) -> None:
    architecture, size = name.split("-", 1)
    with torch.device("meta"):
        model = sizes.build(architecture, size, text.VOCABULARY)
    declared = sizes.SIZES[size].parameters
    assert sizes.without_embeddings(model) == pytest.approx(declared, rel=0.05)
    embeddings = {"llama": 1, "neox": 2}[architecture] * text.VOCABULARY * sizes.SIZES[size].width
    assert sum(p.numel() for p in model.parameters()) == sizes.without_embeddings(model) + embeddings
    widths = {side for p in model.parameters() if p.ndim == 2 for side in p.shape}
    assert all(width % (32 if size == "0.3m" else 64) == 0 for width in widths)


def test_whole_documents_are_split_without_overlap() -> None:
    given = documents(150)
    parts = text.split(given)
    assert parts["held-out"] == [given[49], given[99], given[149]]
    assert sorted(parts["train"] + parts["held-out"]) == sorted(given)
    assert set(parts["calibration"]) <= set(parts["train"])
    assert len(parts["calibration"]) == 3


WRITE = """
import json, pathlib, sys
from benchmarks.ladder import text
text.write(pathlib.Path(sys.argv[1]), json.load(sys.stdin), {"a-package": {"documents": 100}}, {})
"""


def test_the_corpus_has_the_same_bytes_in_every_process(corpus: Path, tmp_path: Path) -> None:
    root = Path(text.__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": paths}
    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    subprocess.run(command, input=json.dumps(uses()), env=environment, text=True, check=True)
    files = [path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file() and "models" not in path.parts]
    assert {path.name for path in files} >= {"corpus.json", "tokenizer.json", "train.npy.xz", "calibration.jsonl.xz"}
    for path in files:
        assert (tmp_path / path).read_bytes() == (corpus / path).read_bytes(), path


def test_ids_decode_to_the_documents_in_their_order(corpus: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    ids = text.read_ids(corpus, "train")
    assert str(ids.dtype) == "uint16"
    whole = tokenizer.decode(ids.tolist())
    assert isinstance(whole, str)
    assert whole.split(text.END)[1:] == text.split(documents(400))["train"]


def test_dictionary_entries_are_read_by_their_index(tmp_path: Path) -> None:
    entries = [
        "Cat \\Cat\\ (k[a^]t), n. [AS. cat.]\n   1. An animal of the\n   {genus Felis}.\n      [1913 Webster]\n",
        "Dog \\Dog\\, n.\n   A quadruped of the genus {Canis}, kept by people in their houses. [PJC]\n",
    ]
    heads = "an entry about the database\n"
    whole = (heads + "".join(entries)).encode()
    first, second = len(heads), len(heads) + len(entries[0])

    def digits(value: int) -> str:
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        return (digits(value // 64) if value >= 64 else "") + alphabet[value % 64]

    lines = [
        ("00-database-info", 0, first), ("dog", second, len(entries[1])), ("cat", first, len(entries[0])),
        ("felis", first, len(entries[0])),
    ]  # fmt: skip
    (tmp_path / "x.index").write_text("".join(f"{w}\t{digits(s)}\t{digits(n)}\n" for w, s, n in lines))
    (tmp_path / "x.dict.dz").write_bytes(gzip.compress(whole))
    assert text.dictionary(tmp_path, "x") == [
        "Cat, (k[a^]t), n. [AS. cat.] 1. An animal of the genus Felis.\n"
        "Dog, n. A quadruped of the genus Canis, kept by people in their houses."
    ]


def test_a_sense_and_a_line_come_once() -> None:
    entries = ["tin n 1: a metal [syn: tin, Sn] 2: a vessel v 1: plate with tin", "Sn n 1: a metal [syn: tin, Sn]"]
    assert list(text.senses(entries)) == [
        "tin (n): a metal [syn: tin, Sn]",
        "tin (n): a vessel",
        "tin (v): plate with tin",
    ]
    foot, long = "© Somebody, who wrote this and all pages", "x" * SHORTEST_DOCUMENT
    assert text.once([f"a {long}\n{foot}", f"b {long}\n{foot}", foot]) == [f"a {long}\n{foot}", f"b {long}"]


def test_windows_pass_over_the_text_before_one_comes_again() -> None:
    drawn = list(train.starts(10 * 16 + 3, 4, 10, seed=0, context=16))
    again = list(train.starts(10 * 16 + 3, 4, 10, seed=0, context=16))
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    whole = torch.cat(drawn)
    first = whole[:9].sort().values  # nine or ten windows, 16 apart
    assert ((first - first[0]) % 16 == 0).all() and len(set(first.tolist())) == 9
    assert int(whole.max()) + 16 <= 10 * 16 + 3
    with pytest.raises(ValueError, match="20 tokens"):
        next(train.starts(20, 1, 1, seed=0, context=16))


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    clock = train.Clock(planned=1000, started=0.0, deadline=100.0)
    assert clock.factor(0) == pytest.approx(0.01)
    assert clock.factor(99) == clock.factor(750) == 1.0
    assert clock.factor(875) == pytest.approx(0.5)
    assert clock.factor(999) == pytest.approx(1 / 250)


def test_less_time_means_fewer_steps_but_not_before_its_last_quarter() -> None:
    clock = train.Clock(planned=1000, started=0.0, deadline=100.0)
    clock.look(300, 70.0, 0.2)
    assert clock.end == 1000
    clock.look(380, 80.0, 0.2)
    assert clock.end == 480
    assert clock.factor(430) == pytest.approx(0.2)
    clock.look(440, 85.0, 0.02)  # others have ended, and there is time again
    assert clock.end == 1000


def test_a_plan_gives_each_model_the_same_share() -> None:
    whole = sizes.plan(sizes.names(), 1e9)
    half = sizes.plan(sizes.names(), 0.5 * sum(s.tokens / s.speed for s in sizes.SIZES.values()) * 2)
    assert sizes.names()[:2] == ["llama-30m", "neox-30m"]
    for name, steps in whole.items():
        rung = sizes.SIZES[name.split("-", 1)[1]]
        assert steps * rung.batch * sizes.CONTEXT == pytest.approx(rung.tokens, rel=0.01)
        assert half[name] == pytest.approx(steps / 2, rel=0.01)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--minutes 0", "--minutes: 0 is no number above 0"),
        ("--minutes nan", "--minutes: nan"),
        ("--steps -1", "--steps: -1"),
        ("--jobs 0", "--jobs: 0"),
        ("--sizes 5m", "invalid choice: '5m'"),
        ("--device cuda", "finds no GPU here"),
        ("--sizes 30m --device cpu", "more than --minutes 25: choose fewer"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_text_is_made(
    tmp_path: Path, options: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["ladder", str(tmp_path / "ladder"), *options.split()])
    monkeypatch.setattr(command, "prepare", lambda folder: pytest.fail("the text was made first"))
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code not in (0, None)
    assert said in capsys.readouterr().err + str(stopped.value.code)


def test_a_size_named_twice_is_one() -> None:
    asked = command.arguments(["build", "--sizes", "0.3m", "0.3m", "--architectures", "neox", "--device", "cpu"])
    assert (asked.sizes, asked.architectures, asked.jobs) == (["0.3m"], ["neox"], 1)


def test_what_does_not_compile_trains_as_it_is(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = sizes.build("llama", "0.3m", text.VOCABULARY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = train.Training(model, text.read_ids(corpus, "train"), 1e-3, "cpu")
    assert training.compile(1, ("no such mode", None)) == "eager"
    assert "no such mode" in capsys.readouterr().out
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not training.optimizer.state


@pytest.mark.parametrize("architecture", sizes.ARCHITECTURES)
def test_a_training_lowers_the_loss_and_its_folder_loads(
    corpus: Path, tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    tiny = sizes.Size(
        parameters=1e5,
        width=64,
        layers=1,
        heads=2,
        keys=1,
        llama=128,
        neox=128,
        tokens=1e6,
        batch=2,
        rate=5e-3,
        speed=1,
    )
    monkeypatch.setitem(sizes.SIZES, "tiny", tiny)
    name = f"{architecture}-tiny"
    record = train.train(corpus, name, 25, float("inf"), "cpu", compiles=False)
    assert record["tokens"] == 25 * 2 * sizes.CONTEXT
    assert record["curve"][-1][1] < record["curve"][0][1] - 0.5
    assert set(record["held_out"]) == {"held-out", *text.HELD_OUT}
    model = AutoModelForCausalLM.from_pretrained(corpus / "models" / name, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert train.held_out(model, text.read_ids(corpus, "perl-doc"), "cpu") == record["held_out"]["perl-doc"]
    parts = bundle.bundle(corpus, tmp_path, [name], part=50_000)
    assert len(parts) > 1 and max(path.stat().st_size for path in parts) <= 50_000
    whole = lzma.decompress(b"".join(path.read_bytes() for path in parts))
    with tarfile.open(fileobj=BytesIO(whole)) as tar:
        member = tar.extractfile(f"models/{name}/model.safetensors")
        assert member is not None
        assert member.read() == (corpus / "models" / name / "model.safetensors").read_bytes()
