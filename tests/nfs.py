"""An NFS server: the kernel's, version 4.2, in a network namespace. Most machines have none; a test
asks what is ``missing``."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

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
rpc.mountd --no-nfs-version 3 --foreground &
rpc.nfsd --no-nfs-version 3 --nfs-version 4.2 --no-udp 8 || rpc.nfsd --no-nfs-version 3 8
echo ready
read end
rpc.nfsd 0
kill $!
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
def serving(*within: str) -> Iterator[Path]:
    """A directory that everybody may mount as the root of the server. ``within``: a command that
    runs another one in the server's network namespace."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        # an overlay cannot be exported
        subprocess.run(("mount", "-t", "tmpfs", "tmpfs", name), check=True)
        server = subprocess.Popen(
            (*within, "unshare", "--mount", "sh", "-c", _SERVE, name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout
            assert server.stdout.readline() == "ready\n"
            yield Path(name)
        finally:
            server.communicate("end\n", timeout=60)
            subprocess.run(("umount", "-l", name), check=True)
