"""Documents to sequences: how they are joined, cut and picked."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from tests.parts.data.tiny import tiny_tokenizer

from nybble.core.errors import DataError, UsageError
from nybble.data import TextSource, make_source, token_samples

EOS, BOS = 2, 1


def source(*documents: str) -> TextSource:
    return make_source(documents, name="mine.txt", note="a note")


def test_documents_are_joined_by_eos_and_the_rest_is_dropped() -> None:
    found = token_samples(source("a b c", "d e", "f g"), tiny_tokenizer(), samples=None, seq_len=4)
    assert found.input_ids.tolist() == [[3, 4, 5, EOS], [6, 7, EOS, 8]]
    assert (found.tokens, found.available, found.input_ids.dtype) == (8, 2, torch.int64)
    by_hand = b"".join(number.to_bytes(8, "little") for number in [3, 4, 5, EOS, 6, 7, EOS, 8])
    assert found.manifest() == {
        "source": "mine.txt",
        "note": "a note",
        "source_sha256": hashlib.sha256(b"a b c\0d e\0f g").hexdigest(),
        "tokens_sha256": hashlib.sha256(by_hand).hexdigest(),
        "samples": 2,
        "seq_len": 4,
    }


def test_every_window_starts_with_bos_where_the_tokenizer_adds_one() -> None:
    found = token_samples(source("a b c", "d e"), tiny_tokenizer(bos=True), samples=None, seq_len=4)
    assert found.input_ids.tolist() == [[BOS, 3, 4, 5], [BOS, EOS, 6, 7]]


def test_a_tokenizer_without_eos_joins_directly() -> None:
    found = token_samples(source("a b", "c d"), tiny_tokenizer(eos=False), samples=None, seq_len=2)
    assert found.input_ids.tolist() == [[3, 4], [5, 6]]


def test_samples_are_spread_evenly_and_a_seed_picks_at_random() -> None:
    text, tokenizer = source(" ".join("abcdefgh" * 5)), tiny_tokenizer()
    everything = token_samples(text, tokenizer, samples=None, seq_len=2).input_ids
    assert everything.shape == (20, 2)
    spread = token_samples(text, tokenizer, samples=4, seq_len=5)
    assert spread.available == 8
    assert spread.input_ids.tolist() == everything.reshape(8, 5)[[0, 2, 4, 6]].tolist()
    state = torch.get_rng_state()
    drawn = [token_samples(text, tokenizer, samples=6, seq_len=5, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn[0].sha256 == drawn[1].sha256 != drawn[2].sha256
    whole = token_samples(text, tokenizer, samples=8, seq_len=5, seed=1).input_ids  # a permutation, nothing twice
    assert sorted(whole.tolist()) == sorted(everything.reshape(8, 5).tolist())


def test_too_little_text_names_both_numbers() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match=r"'mine.txt' has 3 tokens, fewer than one sequence of 8 .* at most 3\."):
        token_samples(source("a b c"), tokenizer, samples=None, seq_len=8)
    with pytest.raises(DataError, match=r"has 2 sequences of 2 tokens, fewer than the 3 asked for. Ask for 2"):
        token_samples(source("a b c d e"), tokenizer, samples=3, seq_len=2)
    with pytest.raises(DataError, match=r"has 1 tokens.*Give more text\.$"):
        token_samples(source("a"), tokenizer, samples=None, seq_len=8)


@pytest.mark.parametrize(("samples", "seq_len"), [(0, 4), (-1, 4), (1, 1), (1, 0)])
def test_sizes_that_make_no_sense(samples: int, seq_len: int) -> None:
    with pytest.raises(UsageError, match=r"Give [12] or more"):
        token_samples(source("a b c d"), tiny_tokenizer(), samples=samples, seq_len=seq_len)


def test_importing_data_loads_no_transformers() -> None:
    code = "import sys, nybble.data, nybble.eval; assert not {'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
