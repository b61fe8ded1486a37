"""Descriptions in a checkpoint that say nothing, or nonsense, are one clear error."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from nybble.checkpoint.describe import check_version, renumber
from nybble.core.errors import FileError, ModelError
from nybble.nn.kinds import restore
from nybble.nn.layouts import Layouts


@pytest.mark.parametrize("entry", [{}, [], None, "linear", {"class": []}, {"class": "linear", "weight": "x"}])
def test_malformed_descriptions(entry: Any) -> None:
    network = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(FileError, match=r"0 is described as a|malformed description of 0"):
        restore(network, "0", entry, Layouts())
    assert isinstance(network[0], nn.Linear)


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(ModelError, match="7, which this model does not have"):
        restore(nn.Sequential(nn.Linear(4, 4)), "7", {"class": "linear"}, Layouts())


@pytest.mark.parametrize("version", [0, 2, -1, True, "1", 1.0, None])
def test_versions_that_are_not_read(version: Any) -> None:
    check_version({"format_version": 1, "modules": {}, "layouts": []})
    with pytest.raises(FileError, match=rf"format version {version!r}; this nybble reads up to 1\."):
        check_version({"format_version": version, "modules": {}, "layouts": []})


def test_numbers_of_layouts_follow_when_parts_are_joined() -> None:
    entry = {"class": "linear", "weight": 1, "inputs": {"weight": 1}}
    assert renumber(entry, [5, 3]) == {"class": "linear", "weight": 3, "inputs": {"weight": 1}}
    assert renumber({"weights": [0, 1, 1]}, [5, 3]) == {"weights": [5, 3, 3]}
    assert entry["weight"] == 1  # the part's own stays
