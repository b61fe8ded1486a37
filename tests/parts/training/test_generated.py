"""Texts that a model makes of itself: LLM-QAT's beginnings, draws by each text's own numbers, files gone on with."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.tiny import WORDS, save_tiny, tiny_model, tiny_tokenizer

from nybble.cli import main
from nybble.core.errors import FileError, ModelError, NybbleError, SchemeError, UsageError
from nybble.core.progress import Silent
from nybble.pipelines.dataset import generate_dataset
from nybble.training import generated as module
from nybble.training.generated import Generation, beginnings, generated, own_texts, vocabulary_of

REST = range(3, len(WORDS))
"""Tokens that aren't special; the model has 300 rows."""


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    made = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(0.4)  # it is less sure of itself
    return made


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    model.save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


def made_by(model: Any, start: int = 0, **options: Any) -> dict[int, list[int]]:
    batches = generated(model, tiny_tokenizer(), Generation(**{"count": 24, "length": 10, **options}), start)
    return dict(text for batch in batches for text in batch)


def greedy(model: Any, ids: list[int], length: int) -> list[int]:
    """By transformers; no token without a word."""
    rows = [[n] for n in range(len(WORDS), 300)]
    found = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False, min_length=0,
        max_length=length, bad_words_ids=rows, pad_token_id=0,
    )  # fmt: skip
    row: list[int] = found[0].tolist()
    return row


def test_the_first_tokens_are_the_likeliest_ones_and_the_rest_differs(model: Any) -> None:
    """The first counts among them: j - 1 more are the arg-max, as transformers finds it."""
    options = Generation(count=3 * len(REST) + 9, length=10, likeliest=(3, 4, 5))
    firsts = beginnings(options, vocabulary_of(model, tiny_tokenizer()))
    assert {(f.token, f.likeliest) for f in firsts[: 3 * len(REST)]} == {(t, j) for t in REST for j in (3, 4, 5)}
    assert firsts[3 * len(REST) :] == firsts[:9]
    found = made_by(model, count=options.count)
    for number, text in found.items():
        first = firsts[number]
        wanted = greedy(model, [first.token], first.likeliest)
        wanted = wanted[:-1] if wanted[-1] == 2 else wanted
        assert text[: len(wanted)] == wanted, (number, first)
    again = [(found[i], found[i + 3 * len(REST)], firsts[i].likeliest) for i in range(9)]
    assert all(a[:j] == b[:j] for a, b, j in again) and sum(a != b for a, b, _ in again) >= 8


def test_the_same_seed_gives_the_same_and_another_another(model: Any) -> None:
    assert made_by(model) == made_by(model) != made_by(model, seed=1)


def test_no_text_depends_on_its_batch(model: Any) -> None:
    whole = made_by(model, batch=24)
    assert made_by(model, batch=5) == whole
    assert made_by(model, start=10, batch=5) == {n: ids for n, ids in whole.items() if n >= 10}


def test_greedy_is_greedy_and_sample_draws_from_the_second_on(model: Any) -> None:
    found = made_by(model, strategy="greedy", count=12)
    for text in found.values():
        wanted = greedy(model, text[:1], 10)
        assert text == (wanted[: wanted.index(2)] if 2 in wanted else wanted)
    drawn = made_by(model, strategy="sample", count=4 * len(REST))
    seconds = {(text[0], text[1]) for text in drawn.values() if len(text) > 1}
    assert len(seconds) > 2 * len(REST)
    assert made_by(model, strategy="sample", top_k=1, count=4) == made_by(model, strategy="greedy", count=4)


@pytest.mark.parametrize("eos", [2, [2, 7, 9], None])
def test_it_stops_at_any_end_and_leaves_it_out(model: Any, eos: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it goes on, it is what it would be without."""
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    endless = made_by(model, length=40, count=30)
    assert {len(text) for text in endless.values()} == {40}
    monkeypatch.setattr(model.generation_config, "eos_token_id", eos)
    ends = [] if eos is None else [eos] if isinstance(eos, int) else eos
    found = made_by(model, length=40, count=30)
    for number, text in found.items():
        cut = next((at for at, token in enumerate(endless[number]) if at and token in ends), 40)
        assert text == endless[number][:cut]
    assert (min(map(len, found.values())) < 40) == bool(ends)


@pytest.mark.parametrize(("top_k", "temperature"), [(5, 1.0), (50, 0.7), (1000, 1.6)])
def test_what_is_drawn_has_the_models_distribution(top_k: int, temperature: float) -> None:
    """Chi-square against transformers' own warpers, at 20,000 draws; the numbers are the text's own."""
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(4)) * 2
    warped = transformers.TemperatureLogitsWarper(temperature)(torch.zeros(1, 1, dtype=torch.long), logits)
    wanted = transformers.TopKLogitsWarper(min(top_k, 60))(torch.zeros(1, 1, dtype=torch.long), warped).softmax(-1)[0]
    count = 20_000
    at = torch.rand(count, generator=torch.Generator().manual_seed(6))
    found = module._draw(logits.expand(count, -1), at, Generation(top_k=top_k, temperature=temperature))
    seen = torch.bincount(found, minlength=60).double()
    assert bool((seen[wanted == 0] == 0).all())
    often = wanted.double() * count >= 5
    rest = torch.stack([seen[~often].sum(), wanted[~often].double().sum() * count])
    square = ((seen - wanted * count) ** 2 / (wanted * count))[often].sum() + (rest[0] - rest[1]) ** 2 / (
        rest[1] + 1e-9
    )
    freedom = int(often.sum())
    bound = freedom * (1 - 2 / (9 * freedom) + 3.1 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson, Hilferty: 0.1 %
    assert float(square) < bound


def test_nothing_is_made_that_could_not_be_read(model: Any) -> None:
    """The model has rows for 300 tokens, its tokenizer words for 53; with an order of its own it begins with all."""
    texts = made_by(model, count=100, length=12)
    assert max(max(text) for text in texts.values()) < len(WORDS)
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_tokens(["added"])  # number 53: it stands in texts as it is, so none begins with it
    assert vocabulary_of(model, tokenizer) == list(REST)


# --------------------------------------------------------------------------------------------------------------- files
SMALL = Generation(count=11, length=9, batch=4)


class _Stops(Silent):
    """Killed behind so many texts."""

    def __init__(self, behind: int) -> None:
        self.left = behind

    def advance(self, n: int = 1, note: str = "") -> None:
        self.left -= n
        if self.left <= 0:
            raise KeyboardInterrupt


def test_killed_and_gone_on_with_it_has_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """With a line that was cut; and between the file and its notes."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    first = generate_dataset(str(folder), whole, SMALL, dtype="float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.jsonl"]
    with pytest.raises(KeyboardInterrupt):
        generate_dataset(str(folder), out, SMALL, dtype="float32", progress=_Stops(5))
    partial, note = tmp_path / "out.jsonl.begun", tmp_path / "out.jsonl.begun.json"
    assert len(partial.read_bytes().splitlines()) == 8 and not out.exists()
    lines = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join(lines[:6]) + lines[6][:9])
    with pytest.raises(FileError, match=r"begun with top_k = 50; now it is 3"):
        generate_dataset(
            str(folder), out, Generation(count=11, length=9, batch=4, top_k=3), dtype="float32", resume=True
        )
    request = note.read_bytes()
    second = generate_dataset(str(folder), out, SMALL, dtype="float32", resume=True)
    assert out.read_bytes() == whole.read_bytes() and {**second, "out": ""} == {**first, "out": ""}
    note.write_bytes(request)
    assert generate_dataset(str(folder), out, SMALL, dtype="float32", resume=True) == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "whole.jsonl"]
    assert first["tokens"] == sum(len(json.loads(line)["text"].split()) for line in whole.read_text().splitlines())


def test_two_runs_into_one_file(folder: Path, tmp_path: Path) -> None:
    """The second is refused, whatever it wants to do with what there is; the first one's texts are whole."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    generate_dataset(str(folder), whole, SMALL, dtype="float32")

    class Again(Silent):
        def advance(self, n: int = 1, note: str = "") -> None:
            for resume in (False, True):
                with pytest.raises(FileError, match=r"out\.jsonl: another process is writing it\. Wait, or"):
                    generate_dataset(str(folder), out, SMALL, dtype="float32", resume=resume)

    generate_dataset(str(folder), out, SMALL, dtype="float32", progress=Again())
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "whole.jsonl"]


def test_blank_texts_are_left_out(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blanks:
        def __getattr__(self, name: str) -> Any:
            return getattr(tiny_tokenizer(), name)

        def decode(self, ids: list[int], **more: Any) -> str:
            return " \n" if ids[0] % every == 0 else "a\u2028b"

    class Kind:
        def tokenizer(self, origin: Any) -> Any:
            return Blanks()

    monkeypatch.setattr("nybble.pipelines.dataset.data_kind", lambda name: Kind())
    every = 2
    found = generate_dataset(str(folder), tmp_path / "some.jsonl", SMALL, dtype="float32")
    lines = [json.loads(line) for line in (tmp_path / "some.jsonl").read_bytes().splitlines()]
    assert 0 < found["texts"] == len(lines) < 11 and {line["text"] for line in lines} == {"a\u2028b"}
    every = 1
    with pytest.raises(ModelError, match="nothing but white space in 11 texts"):
        generate_dataset(str(folder), tmp_path / "none.jsonl", SMALL, dtype="float32")
    assert [path.name for path in tmp_path.iterdir()] == ["some.jsonl"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no texts": ({"count": 0}, "count is 0"),
    "no room to draw": ({"length": 5}, "length is 5, and the first 5 tokens are given"),
    "nothing likeliest": ({"likeliest": ()}, "likeliest is"),
    "likeliest none": ({"likeliest": (0, 3)}, "likeliest is"),
    "cold": ({"temperature": 0.0}, "temperature is 0.0; it must be a number above 0"),
    "no number": ({"temperature": float("nan")}, "temperature is a finite number"),
    "no candidates": ({"top_k": 0}, "top_k is 0"),
    "another way": ({"strategy": "beam"}, "strategy is hybrid or greedy or sample"),
}


@pytest.mark.parametrize("case", BAD)
def test_requests_that_make_no_sense(case: str) -> None:
    with pytest.raises((UsageError, SchemeError), match=BAD[case][1]):
        Generation(**BAD[case][0])


def test_sources_of_own_texts() -> None:
    assert own_texts("self:12", 16, 3) == Generation(count=12, length=16, seed=3)
    assert own_texts("self", 16, 3) == Generation(length=16, seed=3) and own_texts("data.jsonl", 16, 3) is None
    for src in ("self:", "self:-1", "self:1e3", "self: 5"):
        with pytest.raises(UsageError, match=r"self is followed by the number of texts, as in self:4096"):
            own_texts(src, 16, 0)


def test_one_error_and_nothing_written(folder: Path, tmp_path: Path) -> None:
    bert: Any = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertForSequenceClassification(bert).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    save_tiny(tmp_path / "gpt2", "gpt2")
    (tmp_path / "there.jsonl").write_text("mine")
    before = sorted(tmp_path.iterdir())
    for place, out, length, wrong in (
        (tmp_path / "bert", "x.jsonl", 9, "is a BertForSequenceClassification, which generates no text"),
        (tmp_path / "gpt2", "x.jsonl", 65, r"length is 65, and .*gpt2 has positions for 64 tokens"),
        (folder, "there.jsonl", 9, r"there\.jsonl exists already"),
        (folder, "bert", 9, "is a folder; name a file in it"),
        (folder, "no/x.jsonl", 9, "there is no folder"),
    ):
        for resume in (False, True):
            with pytest.raises(NybbleError, match=wrong):
                generate_dataset(str(place), tmp_path / out, Generation(count=2, length=length), resume=resume)
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "there.jsonl").read_text() == "mine"
    with pytest.raises(ModelError, match="nothing but special tokens"):
        beginnings(SMALL, [])


def test_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*given: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["nybble", "generate", str(folder), *given])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.err if ended.value.code else said.out

    out = tmp_path / "out.jsonl"
    sizes = ["--count", "5", "--length", "9", "--batch", "2", "--temperature", "0.8", "--top-k", "7"]
    code, text = call("--dataset", str(out), *sizes, "--strategy", "sample", "--seed", "4", "--json")
    found = json.loads(text)
    other = tmp_path / "other.jsonl"
    options = Generation(count=5, length=9, batch=2, temperature=0.8, top_k=7, strategy="sample", seed=4)
    assert code == 0 and found == {**generate_dataset(str(folder), other, options), "out": str(out)}
    assert out.read_bytes() == other.read_bytes()
    new = str(tmp_path / "new.jsonl")
    for given, wrong in (
        (("--dataset", str(out)), "out.jsonl exists already"),
        (("--dataset", new, "a prompt"), "give a PROMPT to go on from, or --dataset FILE"),
        ((), "give a PROMPT to go on from, or --dataset FILE"),
        (("--dataset", new, "--kv", "int4"), "--kv is for an answer to a PROMPT"),
        (("--dataset", new, "--sample"), "--sample is for an answer to a PROMPT"),
        (("ba be", "--top-k", "3"), "--top-k is for --dataset FILE"),
    ):
        code, text = call(*given)
        assert code and wrong in text
    assert not Path(new).exists()
