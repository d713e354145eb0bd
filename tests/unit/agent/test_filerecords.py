"""Records of the file copy: nothing from the other side leads out of its tree."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit_agent.hostops import filerecords
from godwit_agent.hostops.filerecords import Kind, Record
from godwit_api.errors import Rejected

_PART = st.binary(min_size=1, max_size=20).filter(
    lambda part: b"/" not in part and b"\0" not in part and part not in (b".", b"..")
)
_PATH = st.lists(_PART, min_size=1, max_size=6).map(b"/".join)
_OWNER, _NUMBER = st.integers(0, (1 << 32) - 2), st.integers(0, (1 << 62) - 1)


@given(
    st.builds(
        Record, st.sampled_from(Kind), st.text(max_size=30), _PATH,
        st.integers(0, 0o177777), _OWNER, _OWNER,
        st.integers(-(1 << 62), 1 << 62), _NUMBER, _NUMBER,
    )
)  # fmt: skip
def test_round_trip(record: Record) -> None:
    assert filerecords.decode(filerecords.encode(record)) == record


@pytest.mark.parametrize(
    "path", [b"", b"/etc", b"..", b"a/../b", b"a//b", b"a/", b"./a", b"a\0b", b"x" * 5000]
)
def test_paths_that_lead_elsewhere_are_refused(path: bytes) -> None:
    with pytest.raises(Rejected):
        filerecords.decode(filerecords.encode(Record(Kind.FILE, "upper", path)))


@given(st.binary(max_size=60))
def test_garbage_is_refused(data: bytes) -> None:
    try:
        filerecords.decode(data)
    except Rejected:
        return


def test_no_link_is_followed_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "tree/way").symlink_to("../outside")
    root = os.open(tmp_path / "tree", os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(OSError), filerecords.parent(root, b"way/file"):  # noqa: PT011
            raise AssertionError("not reached")
    finally:
        os.close(root)
