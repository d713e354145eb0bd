"""What the tool underneath takes by hand: stock CRIU, one node, no Kubernetes, no Godwit.

The same container (image, mounts, capabilities, memory) is started with plain
runc beside the pod, filled with the same data, then dumped with lazy pages and
restored as fast as a shell can: the floor that a migration is compared with.
"""

from __future__ import annotations

import json
import re
import statistics
from typing import Any

from lab.cluster import Cluster, CommandFailed, say

_BUNDLES = "/run/containerd/io.containerd.runtime.v2.task/k8s.io"
_DIR = "/run/godwit-baseline"

_SETUP = f"""
set -e
D={_DIR}
mkdir -p $D/bundle
mount -t tmpfs -o size=8g tmpfs $D/bundle
mkdir $D/bundle/rootfs $D/bundle/second
ctr -n k8s.io images mount --rw "$1" $D/bundle/rootfs >/dev/null
cat > $D/bundle/config.json
"""

_ROUND = f"""
set -e
D={_DIR}/bundle; R="runc --root $D/runc"
exec 2>$D/round.log
trap '[ $? = 0 ] || tail -n 20 $D/*.log $D/dump/*.log $D/restore/*.log' EXIT
export PATH=/opt/godwit/criu:$PATH  # CRIU as Debian builds it, and the node's own tools
rm -rf $D/img $D/dump $D/restore; mkdir -p $D/img $D/dump $D/restore
rm -f $D/status; mkfifo $D/status
# New ones for each round: CRIU's dump leaves the namespace it dumped from closed.
# Not `ip netns add`: it mounts over /run/netns, which containerd then cannot clean up.
for n in gwbase gwbase2; do
  umount {_DIR}/$n 2>/dev/null || true
  touch {_DIR}/$n; unshare --net={_DIR}/$n ip link set lo up
done
sleep 6007 2>/dev/null | $R run -d --bundle $D gwbase 2>&1 | cat >$D/run.log &
i=0
until $R exec gwbase redis-cli ping >/dev/null 2>&1; do sleep 0.1; i=$((i+1)); [ $i -lt 100 ]; done
$R exec gwbase redis-cli debug populate $1 data 1000 >/dev/null
sed 's,/gwbase",/gwbase2",g' $D/config.json > $D/second/config.json
rm -f $D/t2
t0=$(date +%s%N)
SAVE="$R checkpoint --image-path $D/img --work-path $D/dump --tcp-established --file-locks \\
   --manage-cgroups-mode ignore"
if [ $2 = lazy ]; then
  LAZY=--lazy-pages
  $SAVE --lazy-pages --page-server 127.0.0.1:27077 --status-fd 9 \\
     gwbase 9>$D/status >/dev/null 2>$D/checkpoint.log &
  [ "$(head -c 1 $D/status | wc -c)" = 1 ] || {{ cat $D/checkpoint.log; exit 1; }}
  t1=$(date +%s%N)
  criu lazy-pages --page-server --address 127.0.0.1 --port 27077 -D $D/img -W $D/restore \\
     -o lazy.log >/dev/null 2>&1 &
  until [ -e $D/restore/lazy-pages.socket ]; do
    [ $(($(date +%s%N)-t1)) -lt 5000000000 ] || exit 1
  done
else
  LAZY=
  $SAVE gwbase >/dev/null
  t1=$(date +%s%N)
fi
sleep 6007 2>/dev/null | {{ $R restore -d $LAZY --image-path $D/img \\
   --work-path $D/restore --tcp-established --file-locks --manage-cgroups-mode ignore \\
   --bundle $D/second gwbase2 2>&1 && date +%s%N >$D/t2; }} | cat >$D/restore.log &
until [ -s $D/t2 ]; do
  [ $(($(date +%s%N)-t1)) -lt 20000000000 ] || {{ cat $D/restore.log; exit 1; }}
done
t2=$(cat $D/t2)
echo "dump_ns=$((t1-t0)) restore_ns=$((t2-t1))"
i=0; while $R state gwbase >/dev/null 2>&1 && [ $i -lt 50 ]; do sleep 0.1; i=$((i+1)); done
$R delete --force gwbase2 >/dev/null 2>&1 || true
$R delete --force gwbase >/dev/null 2>&1 || true
pkill -f "^sleep 6007" || true
"""

_CLEAN = f"""
D={_DIR}
pkill -f "^sleep 6007"; pkill -9 -f "^runc --root $D"; pkill -9 -f "^criu lazy-pages.*27077"
for c in gwbase gwbase2; do runc --root $D/bundle/runc delete --force $c >/dev/null 2>&1; done
ctr -n k8s.io images unmount --rm $D/bundle/rootfs >/dev/null 2>&1
umount -l $D/bundle/rootfs $D/bundle 2>/dev/null
umount $D/gwbase $D/gwbase2 2>/dev/null
rm -rf --one-file-system $D
true
"""


def _by_hand(config: dict[str, Any]) -> dict[str, Any]:
    """The container's own OCI configuration, detached from its pod sandbox."""
    config["root"] = {"path": f"{_DIR}/bundle/rootfs", "readonly": False}
    config["linux"]["cgroupsPath"] = "/gwbase"
    own = []
    for namespace in config["linux"]["namespaces"]:
        kind = namespace["type"]
        if kind == "network":
            own.append({"type": kind, "path": f"{_DIR}/gwbase"})
        else:
            own.append({"type": kind})
    config["linux"]["namespaces"] = own
    config.pop("annotations", None)
    return config


def stock_criu(cluster: Cluster, pod: str, namespace: str, rounds: int = 5) -> float:
    """Median milliseconds of dump (lazy pages) plus restore of ``pod``'s container by hand."""
    return statistics.median(by_hand(cluster, pod, namespace, rounds=rounds))


def by_hand(
    cluster: Cluster, pod: str, namespace: str, *, rounds: int = 5, lazy: bool = True
) -> list[float]:
    """Milliseconds of dump plus restore of ``pod``'s container by hand, one for each round.

    ``lazy``: pages stay with the dumped process and come when they are asked for; otherwise all
    of them are written to a tmpfs and read from there.
    """
    seen = cluster.get("pod", pod, namespace)
    node = seen["spec"]["nodeName"]
    container = seen["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
    image = seen["spec"]["containers"][0]["image"]
    keys = str(cluster.number(seen["status"]["podIP"], "DBSIZE"))
    how = "lazy pages" if lazy else "whole image"
    say(f"stock CRIU by hand on {node} ({keys} keys, {how}, {rounds} rounds)")
    config = json.loads(cluster.node_exec(node, "cat", f"{_BUNDLES}/{container}/config.json"))
    cluster.node_exec(node, "sh", "-c", _CLEAN)
    totals = []
    try:
        cluster.run(
            *("node", "exec", node, "--", "sh", "-c", _SETUP, "setup", image),
            stdin=json.dumps(_by_hand(config), separators=(",", ":")),
        )
        for _ in range(rounds):
            words = ("sh", "-c", _ROUND, "round", keys, "lazy" if lazy else "whole")
            printed = cluster.node_exec(node, *words)
            found = re.search(r"dump_ns=(\d+) restore_ns=(\d+)", printed)
            if not found:
                raise CommandFailed(f"the stock CRIU round printed {printed!r}")
            dump, restore = (int(part) / 1e6 for part in found.groups())
            say(f"  dump {dump:.0f} ms + restore {restore:.0f} ms")
            totals.append(dump + restore)
    finally:
        cluster.node_exec(node, "sh", "-c", _CLEAN, check=False)
    return totals
