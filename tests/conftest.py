from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from tests.contracts import interpreted  # noqa: F401 - says how Triton is to run before anything loads it
from tests.shapes import check_contracts

from nybble.core.seeds import preserve_global_rng

check_contracts()

# The same examples in every run, no time limits, and no example data base left in the checkout.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same global random state, whichever worker runs it."""
    with preserve_global_rng():
        torch.manual_seed(0)
        yield
