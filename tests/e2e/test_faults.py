"""A few rows of the fault matrix (chaos/, docs/reliability.md): processes killed in mid-switch."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from chaos import rows, run
from chaos.stage import NAMESPACE
from lab.cluster import Cluster


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> Iterator[list[str]]:
    """Two nodes, and a namespace whose Redis goes from row to row."""
    cluster.empty_namespace(NAMESPACE)
    yield cluster.ready_nodes()[:2]
    cluster.kubectl("delete", "podmigrations", "--all", "-n", NAMESPACE, "--timeout=120s")
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


@pytest.mark.parametrize("name", rows.SAMPLE)
def test_a_fault_at_a_boundary(cluster: Cluster, nodes: list[str], name: str) -> None:
    row = next(row for row in rows.rows() if row.name == name)
    result = run.run_row(cluster, nodes, row)
    assert not result["violations"], json.dumps(result, indent=1)
