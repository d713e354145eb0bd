"""Other container tools (podman, runc, crun, CRIU) from the builder root, away from any cluster."""

from __future__ import annotations

import os
import sys

from godwit_testbed import build
from godwit_testbed.images import ARCHIVES

_ENTER = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
cd /mnt
mount -t overlay overlay -o "lowerdir=$TOOLS_ROOT:$NODE_ROOT,upperdir=upper,workdir=work" root
cd root
mount -t proc proc proc; mount --rbind /sys sys; mount --rbind /dev dev
mount -t tmpfs tmpfs run; mount -t tmpfs tmpfs tmp
mkdir -p images var/lib/containers etc/containers
mount -t tmpfs tmpfs var/lib/containers
mount --bind -o ro "$TOOLS_IMAGES" images
ip link set lo up
[ -e etc/containers/policy.json ] || echo '{"default":[{"type":"insecureAcceptAnything"}]}' \
  > etc/containers/policy.json
# Not only chroot(2): a container's runtime enters mount namespaces from their root.
mkdir outside; pivot_root . outside
exec chroot . sh -c 'umount -l /outside; rmdir /outside; exec "$@"' tools "$@"
"""
_NAMESPACES = ("--mount", "--pid", "--fork", "--kill-child", "--net", "--uts", "--ipc")


def execute(command: list[str]) -> int:
    """Becomes ``command`` there; what it writes goes with it. Images are in ``/images``."""
    environment = {
        **os.environ,
        "TOOLS_ROOT": str(build.builder_root()),
        # below it: nft, which podman's network needs, is in the nodes' root only
        "NODE_ROOT": str(build.node_root()),
        "TOOLS_IMAGES": str(ARCHIVES),
    }
    sys.stdout.flush()
    argv = ["unshare", *_NAMESPACES, "--", "sh", "-c", _ENTER, "tools", *command]
    os.execvpe(argv[0], argv, environment)
