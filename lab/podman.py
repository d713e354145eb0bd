"""The same Redis under podman: ``container checkpoint --export``, copy, ``container restore``.

What podman's users do to move a container, on one machine, without Kubernetes and without a
network: its exported archive holds the memory and the writable layer.
"""

from __future__ import annotations

from lab.cluster import LAB_IMAGE, Cluster, CommandFailed, say

_COLUMNS = ("checkpoint", "copy", "restore", "bytes")
_SCRIPT = """
set -e
archive=$1 keys=$2 rounds=$3
exec 3>&1 >/tmp/log 2>&1
export PODMAN_IGNORE_CGROUPSV1_WARNING=1
mkdir -p /etc/criu; echo network-lock nftables > /etc/criu/runc.conf
trap '[ $? = 0 ] || tail -n 20 /tmp/log >&3; $podman rm -fa -t 0 >/dev/null 2>&1
  find /sys/fs/cgroup -depth -path "*/libpod_parent*" -type d -exec rmdir {} + ' EXIT
podman="podman --storage-driver overlay --cgroup-manager cgroupfs --runtime $4"
image=$($podman load -q -i "/images/$archive" | sed 's/.*: //')
name=first
$podman run -d --network none --name $name "$image" redis-server --save '' \
  --enable-debug-command yes --unixsocket /tmp/socket
# The restored namespace's loopback is down.
ask="redis-cli -s /tmp/socket"
i=0; until $podman exec $name $ask ping; do sleep 0.1; i=$((i+1)); [ $i -lt 100 ]; done
$podman exec $name $ask debug populate "$keys" data 1000
for round in $(seq "$rounds"); do
  t0=$(date +%s%N)
  $podman container checkpoint --export /tmp/one.tar --compress none $name
  t1=$(date +%s%N)
  cp /tmp/one.tar /tmp/two.tar
  t2=$(date +%s%N)
  $podman rm -f $name || true
  t3=$(date +%s%N)
  name=round$round
  $podman container restore --import /tmp/two.tar --name $name
  t4=$(date +%s%N)
  found=$($podman exec $name $ask dbsize)
  [ "$found" = "$keys" ]
  size=$(stat -c %s /tmp/two.tar)
  rm /tmp/one.tar /tmp/two.tar
  echo "$((t1-t0)) $((t2-t1)) $((t4-t3)) $size" >&3
done
"""


def moves(cluster: Cluster, keys: int, rounds: int, runtime: str = "runc") -> list[dict[str, int]]:
    """Per round: nanoseconds of ``checkpoint``, ``copy`` and ``restore``; ``bytes`` of the archive.

    The container stands still for all three.
    """
    say(f"podman checkpoint, copy, restore ({keys} keys, {rounds} rounds)")
    archive = LAB_IMAGE.replace("/", "_").replace(":", "_") + ".tar"
    words = ("sh", "-c", _SCRIPT, "podman", archive, str(keys), str(rounds), runtime)
    printed = cluster.run("tools", "exec", "--", *words)
    try:
        rows = [[int(word) for word in line.split()] for line in printed.splitlines()]
        return [dict(zip(_COLUMNS, row, strict=True)) for row in rows]
    except ValueError:
        raise CommandFailed(f"podman: {printed[-2000:]}") from None
