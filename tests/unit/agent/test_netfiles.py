"""Open files on network file systems that cannot follow."""

from __future__ import annotations

import pytest

from godwit_agent.hostops.files import netfiles

MOUNTINFO = """\
22 1 253:0 / / rw - ext4 /dev/vda rw
21 22 0:49 / /plain rw - fuse /dev/fuse rw
90 22 0:50 / /data rw,relatime - nfs4 192.0.2.1:/export rw,vers=4.2
91 22 0:51 / /ssh rw - fuse.sshfs host:/ rw
92 22 0:52 /sub /data/sub rw shared:3 - tmpfs tmpfs rw
"""
LOCK = "lock:\t1: POSIX  ADVISORY  WRITE 100 00:32:5 0 EOF\n"


def info(mount: int, more: str = "") -> str:
    return f"pos:\t0\nflags:\t0100002\nmnt_id:\t{mount}\nino:\t5\n{more}"


def test_which_mounts_lie_on_the_network() -> None:
    assert netfiles.mounts(MOUNTINFO) == {21: "fuse", 90: "nfs4", 91: "fuse.sshfs"}


@pytest.mark.parametrize(
    ("target", "fdinfo", "said"),
    [
        ("/data/file", info(90), None),
        ("/data/file", info(90, LOCK), "holds a lock on /data/file"),
        ("/ssh/file", info(91, LOCK), "fuse.sshfs"),
        ("/file", info(22, LOCK), None),
        ("/data/sub/file", info(92, LOCK), None),
        ("/data/.nfs0000000000000005", info(90), "removed file"),
        ("/.nfs0000000000000005", info(22), None),
        ("/ssh/file (deleted)", info(91), "removed file"),
        ("/file (deleted)", info(22), None),
        ("socket:[5]", "", None),
    ],
)
def test_open_files(target: str, fdinfo: str, said: str | None) -> None:
    found = list(netfiles.faults(target, fdinfo, netfiles.mounts(MOUNTINFO)))
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
