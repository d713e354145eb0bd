"""An NFS server for tests: the kernel's, version 4.2, in a network namespace of the lab."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from host.lab import Lab, Node

ADDRESS = "10.99.0.1"
_PROGRAMS = ("rpc.nfsd", "rpc.mountd", "exportfs")

# State of the programs is of this mount namespace alone; `echo` comes when the server serves.
_SERVE = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /var/lib/nfs
mkdir -p /var/lib/nfs/v4recovery /var/lib/nfs/nfsdcltrack
touch /var/lib/nfs/etab /var/lib/nfs/rmtab
mount -t nfsd nfsd /proc/fs/nfsd
echo 10 > /proc/fs/nfsd/nfsv4gracetime
exportfs -i -o rw,async,no_root_squash,no_subtree_check,insecure,fsid=0 "*:$0"
rpc.mountd --no-nfs-version 3
rpc.nfsd --no-nfs-version 3 --nfs-version 4.2 --no-udp 8 || rpc.nfsd --no-nfs-version 3 8
echo ready
read end
rpc.nfsd 0
pkill -x rpc.mountd
"""


def missing() -> str | None:
    """What keeps this machine from it."""
    for module in ("nfs", "nfsv4", "nfsd"):
        if shutil.which("modprobe"):
            subprocess.run(("modprobe", "-q", module), check=False)
    kinds = {line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines()}
    if not {"nfs4", "nfsd"} <= kinds:
        return "this kernel has no NFS"
    absent = [name for name in _PROGRAMS if not shutil.which(name)]
    return f"not installed: {', '.join(absent)} (nfs-kernel-server)" if absent else None


@contextlib.contextmanager
def serving(scene: Lab, directory: Path) -> Iterator[None]:
    """``directory`` is exported to both nodes as the root of ``ADDRESS``."""
    enter = ("nsenter", f"--net=/proc/{scene.client.pid}/ns/net", "unshare", "--mount")
    with subprocess.Popen(
        (*enter, "sh", "-c", _SERVE, str(directory)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout
        assert server.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            server.communicate("end\n", timeout=60)


@contextlib.contextmanager
def mounted(node: Node, directory: str) -> Iterator[None]:
    """As the kubelet of ``node`` mounts it. A server knows its clients by their hosts' names."""
    options = f"addr={ADDRESS},clientaddr={node.address},vers=4.2,proto=tcp,sec=sys,nosharecache"
    node.run("mkdir", "-p", directory)
    node.run(
        *("nsenter", f"--uts=/proc/{node.pid}/ns/uts", "sh", "-c"),
        *('hostname "$0" && mount -i -t nfs4 -o "$1" "$2" "$3"', node.name),
        *(options, f"{ADDRESS}:/", directory),
    )
    try:
        yield
    finally:
        node.run("umount", "-l", directory)
