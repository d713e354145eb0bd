"""What is the testbed's on a command line, and what is kubectl's."""

from __future__ import annotations

import pytest

from godwit_testbed.cli import parse


@pytest.mark.parametrize(
    ("line", "name", "words"),
    [
        ("kubectl get pods -A", "here", ["get", "pods", "-A"]),
        ("kubectl -n kube-system get pods", "here", ["-n", "kube-system", "get", "pods"]),
        ("kubectl --name two -n a get pods", "two", ["-n", "a", "get", "pods"]),
        ("kubectl --name=two get pods --name x", "two", ["get", "pods", "--name", "x"]),
        ("kubectl -- get pods", "here", ["get", "pods"]),
        ("kubectl", "here", []),
        ("helm -n a list", "here", ["-n", "a", "list"]),
        ("client exec -- ip -4 route", "here", ["ip", "-4", "route"]),
    ],
)
def test_options_of_others_are_theirs(
    line: str, name: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GODWIT_TESTBED", "here")
    options = parse(line.split())
    assert (options.name, options.words) == (name, words)
