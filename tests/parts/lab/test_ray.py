"""A sweep on a Ray cluster of two nodes, one of which dies in the middle; the store is in PostgreSQL."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.parts.lab.drawn import filled

from nybble.core.errors import UsageError
from nybble.lab.executors.ray import OnRay, _check_reach
from nybble.lab.worker import Patience

ray: Any = pytest.importorskip("ray", reason="Ray isn't installed: pip install 'nybble[test-lab]'")


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.lost = made.add_node(num_cpus=1)
        ray.init(address=made.address, log_to_driver=False)
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_node_that_dies_loses_no_run(cluster: Any, postgres: str) -> None:
    looks = 0

    def kill() -> None:
        nonlocal looks
        done = store.counts().get("done", 0)
        if cluster.lost is not None and done > 10 and store.counts().get("running", 0) > 1:
            cluster.remove_node(cluster.lost, allow_graceful=False)
            cluster.lost = None
        looks += 1

    with filled(postgres, seed=list(range(300))) as store:
        OnRay(workers=2).run(store, "drawn", Patience(lease=3600.0), kill)
        assert cluster.lost is None and store.counts() == {"done": 900}
        attempts = [row["attempt"] for row in store.runs()]
        assert max(attempts) <= 2 and sum(attempts) - 900 <= 1  # what the dead worker held, and nothing else


def test_a_file_is_refused_where_a_cluster_has_several_machines(tmp_path: Path) -> None:
    class Nodes:
        @staticmethod
        def nodes() -> list[dict[str, Any]]:
            return [{"NodeManagerAddress": f"10.0.0.{i}", "Alive": True} for i in (1, 2)]

    with filled(str(tmp_path / "lab.sqlite")) as store, pytest.raises(UsageError, match=r"2 machines.*postgresql://"):
        _check_reach(store, Nodes)
