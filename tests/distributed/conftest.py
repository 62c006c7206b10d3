"""Clusters of 2, 3 and 4 processes, started when they are first needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.cluster import Cluster


@pytest.fixture(scope="session")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Cluster]]:
    folder = tmp_path_factory.mktemp("clusters")
    started: dict[int, Cluster] = {}

    def of_size(size: int) -> Cluster:
        if size not in started:
            started[size] = Cluster(size, folder)
        return started[size]

    yield of_size
    for cluster in started.values():
        cluster.close()


@pytest.fixture(params=[2, 3, 4], ids=lambda size: f"{size} ranks")
def cluster(request: pytest.FixtureRequest, clusters: Callable[[int], Cluster]) -> Cluster:
    return clusters(request.param)
