"""A pod's whole state goes into an archive, and a pod starts from it later, elsewhere."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e import archives as kept
from e2e.archives import DIRECTORY, KEY
from e2e.archives import KEYS as _KEYS
from e2e.archives import ask as _ask
from e2e.archives import carry as _carry
from e2e.archives import done as _done
from e2e.archives import key as _key
from e2e.support import Scene
from fakes.authority import Authority
from godwit_agent.archive import __main__ as archive_command
from godwit_testbed import build
from lab import workloads
from lab.cluster import LAB_IMAGE, SYSTEM_NAMESPACE
from lab.objectstore import BUCKET, PREFIX, USER, Certificate, Server

STORE = "godwit-e2e-store"
_ASPECTS = ("--ps-tree-cmd", "--ps-tree-env", "--files", "--sockets", "--mounts", "--metadata")

archives = pytest.fixture(kept.archives)


@pytest.fixture
def store(archives: Scene, tmp_path: Path) -> Iterator[Server]:
    """An object store outside the cluster, under TLS, and its Secret."""
    scene = archives
    address = scene.cluster.outside_address()
    authority = Authority()
    identity = authority.identity(address)
    certificate = Certificate(identity.certificate_pem, identity.key_pem, authority.pem)
    enter = scene.cluster.argv("client", "exec", "--")
    server = Server(tmp_path / "s3", f"{address}:9443", enter, certificate)
    server.start()
    values = {
        "endpoint": server.endpoint,
        "bucket": BUCKET,
        "prefix": PREFIX,
        "accessKey": USER,
        "secretKey": server.secret,
        "ca.crt": server.ca_pem,
    }
    scene.cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": STORE, "namespace": SYSTEM_NAMESPACE},
            "type": "godwit.io/object-store",
            "stringData": values,
        }
    )
    yield server
    scene.cluster.kubectl("delete", "secret", STORE, "-n", SYSTEM_NAMESPACE)
    server.stop()


@pytest.mark.support
def test_object_store_and_pods_of_several_containers(archives: Scene, store: Server) -> None:
    """Out under load, stopped, back on another node with nothing carried by hand."""
    scene = archives
    first, second = scene.nodes[:2]
    pod = _start_many(scene, first)
    address = scene.pod(pod)["status"]["podIP"]
    scene.cluster.fill(address, 64)
    _in(scene, pod, "sidecar", "redis-cli", "-p", "6380", "set", "kept", "here")

    with scene.cluster.counter(address) as client:
        left = _done(_ask(scene, "PodCheckpoint", "one", podName=pod, storeSecretName=STORE))
        report = client.stop()
    assert report["ok"], report
    key = f"{PREFIX}/{scene.namespace}/one.godwit"
    assert left["location"] == f"s3://{BUCKET}/{key}"
    assert store.object(key).stat().st_size == left["archiveBytes"] > 64 * 2**20
    assert b"needle" not in store.object(key).read_bytes()

    digest = scene.cluster.redis(address, "DEBUG", "DIGEST")
    began, uptime = time.monotonic(), _uptime(scene, pod)
    status = _ask(
        scene, "PodCheckpoint", "two", podName=pod, leaveRunning=False, storeSecretName=STORE
    )
    _done(status)
    stopped = time.monotonic()
    scene.cluster.kubectl(
        "wait", "pod", pod, "-n", scene.namespace, "--for=delete", "--timeout=60s"
    )
    assert store.objects() == [key, f"{PREFIX}/{scene.namespace}/two.godwit"]
    assert store.unfinished() == []

    away = time.monotonic() - stopped
    restored = _done(
        _ask(scene, "PodRestore", "back", archive="two", nodeName=second, storeSecretName=STORE)
    )
    assert restored["node"] == second
    scene.ready_pod("redis")
    seen = scene.pod(pod)
    assert seen["spec"]["nodeName"] == second
    both = (*seen["status"]["containerStatuses"], *seen["status"]["initContainerStatuses"])
    assert {one["restartCount"] for one in both} == {0}
    assert scene.cluster.redis(seen["status"]["podIP"], "DEBUG", "DIGEST") == digest
    kept = _in(scene, pod, "sidecar", "redis-cli", "-p", "6380", "get", "kept")
    assert kept.strip() == "here"
    numbers = _lines(scene, pod, "numbers")
    assert numbers == [str(i + 1) for i in range(len(numbers))]
    assert _lines(scene, pod, "prepared") == ["once"]
    assert _lines(scene, pod, "post-start") == ["once"]
    passed = _uptime(scene, pod) - uptime
    assert 0 <= passed <= time.monotonic() - began - away, "its clock has gone on without it"
    scene.assert_no_debris(pod_lives=True)


@pytest.mark.support
def test_what_an_object_store_refuses(archives: Scene, store: Server) -> None:
    """By name, before a pod is touched, and nothing is left in the bucket."""
    scene = archives
    pod = scene.start("pod", "redis", scene.nodes[0])
    address = scene.pod(pod)["status"]["podIP"]
    _done(_ask(scene, "PodCheckpoint", "good", podName=pod, storeSecretName=STORE))
    data = store.object(f"{PREFIX}/{scene.namespace}/good.godwit").read_bytes()
    spoilt = {
        "cut": (data[:-1000], "ArchiveDamaged"),
        "changed": (data[:300_000] + b"x" + data[300_001:], "ArchiveDamaged"),
        "foreign": (b"something else", "ArchiveForeign"),
    }
    for name, (content, reason) in spoilt.items():
        store.object(f"{PREFIX}/{scene.namespace}/{name}.godwit").write_bytes(content)
        status = _ask(
            scene, "PodRestore", name, archive=name, podName="never", storeSecretName=STORE
        )
        assert (status["phase"], status["reason"]) == ("Rejected", reason), status
    status = _ask(
        scene, "PodRestore", "absent", archive="absent", podName="never", storeSecretName=STORE
    )
    assert (status["phase"], status["reason"]) == ("Rejected", "ArchiveNotFound"), status
    for name in ("no-such-secret", KEY):  # KEY is no store
        status = _ask(scene, "PodCheckpoint", f"with-{name}", podName=pod, storeSecretName=name)
        assert (status["phase"], status["reason"]) == ("Rejected", "ArchiveStore"), status
    store.stop()
    with scene.cluster.counter(address) as client:
        status = _ask(scene, "PodCheckpoint", "away", podName=pod, storeSecretName=STORE)
        report = client.stop()
    assert (status["phase"], status["reason"]) == ("Failed", "ArchiveStoreUnreachable"), status
    assert report["ok"], report
    store.start_again()
    assert store.unfinished() == []
    _done(_ask(scene, "PodCheckpoint", "here", podName=pod, storeSecretName=STORE))
    pods = [item["metadata"]["name"] for item in scene.cluster.list("pods", scene.namespace)]
    assert pods == [pod]
    scene.assert_no_debris()


@pytest.mark.support
def test_checkpointctl_reads_an_export(archives: Scene, tmp_path: Path) -> None:
    scene = archives
    pod = _start_many(scene, scene.nodes[0])
    address = scene.pod(pod)["status"]["podIP"]
    scene.cluster.redis(address, "SET", "haystack", "a-needle-in-memory")
    _in(scene, pod, "redis", "sh", "-c", "echo written > /var/lib/of-mine; rm /etc/debian_version")
    _done(_ask(scene, "PodCheckpoint", "whole", podName=pod))
    path = f"{DIRECTORY}/{scene.namespace}/whole.godwit"
    text = scene.cluster.node_exec(scene.nodes[0], "base64", "-w0", path)
    (tmp_path / "whole.godwit").write_bytes(base64.b64decode(text))
    (tmp_path / "key").write_bytes(_KEYS[KEY])
    tar = str(tmp_path / "redis.tar")
    words = ["export", str(tmp_path / "whole.godwit"), "--key", str(tmp_path / "key")]
    assert archive_command.main([*words, "--container", "redis", tar]) == 0

    shown = _checkpointctl("show", tar)
    assert "redis" in shown
    assert "containerd" in shown
    (about,) = json.loads(_checkpointctl("inspect", tar, *_ASPECTS, "--format", "json"))
    assert about["container_name"] == "redis"
    assert about["process_tree"]["command"] == "redis-server"
    assert about["checkpoint_size"]["memory_pages_size"] > 0
    assert "0.0.0.0:6379" in about["process_tree"]["cmdline"]
    assert about["metadata"]["pod_name"] == "redis"
    assert "/shared" in [mount["destination"] for mount in about["mounts"]]
    (socket,) = about["sockets"]
    assert socket["pid"] == 1
    found = _checkpointctl("memparse", tar, "--pid", "1", "--search", "a-needle-in-memory")
    assert "a-needle-in-memory" in found
    with tarfile.open(tar) as whole:
        deleted = json.load(whole.extractfile("deleted.files"))  # type: ignore[arg-type]
        assert "/etc/debian_version" in deleted
        with tarfile.open(fileobj=whole.extractfile("rootfs-diff.tar")) as layer:
            mine = layer.extractfile("var/lib/of-mine")
            assert mine
            assert mine.read() == b"written\n"


def _checkpointctl(*words: str) -> str:
    done = subprocess.run(
        [str(build.checkpointctl()), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _start_many(scene: Scene, node: str) -> str:
    """A bare pod: a done init container, a native sidecar, Redis with a hook, a writer."""
    made = workloads.bare_pod("redis", scene.namespace, node=node)
    spec = made["spec"]
    shared = [{"name": "shared", "mountPath": "/shared"}]

    def one(name: str, *command: str, **fields: Any) -> dict[str, Any]:
        return {
            "name": name,
            "image": LAB_IMAGE,
            "imagePullPolicy": "IfNotPresent",
            "command": list(command),
            "volumeMounts": shared,
            **fields,
        }

    probe = {"exec": {"command": ["redis-cli", "-p", "6380", "ping"]}, "periodSeconds": 1}
    count = "i=0; while :; do i=$((i+1)); echo $i >> /shared/numbers; sleep 0.05; done"
    hook = {"exec": {"command": ["sh", "-c", "echo once >> /shared/post-start"]}}
    spec["volumes"] = [{"name": "shared", "emptyDir": {}}]
    spec["initContainers"] = [
        one("prepare", "sh", "-c", "echo once >> /shared/prepared"),
        one(
            "sidecar",
            *("redis-server", "--port", "6380", "--save", ""),
            restartPolicy="Always",
            startupProbe={**probe, "failureThreshold": 30},
        ),
    ]
    spec["containers"][0] |= {"volumeMounts": shared, "lifecycle": {"postStart": hook}}
    spec["containers"].append(one("writer", "sh", "-c", count))
    scene.cluster.apply(made)
    return scene.ready_pod("redis")


def _uptime(scene: Scene, pod: str) -> float:
    """CLOCK_BOOTTIME as the container sees it."""
    return float(_in(scene, pod, "redis", "cat", "/proc/uptime").split()[0])


def _in(scene: Scene, pod: str, container: str, *command: str) -> str:
    return scene.cluster.kubectl(
        "exec", pod, "-n", scene.namespace, "-c", container, "--", *command
    )


def _lines(scene: Scene, pod: str, file: str) -> list[str]:
    return _in(scene, pod, "redis", "cat", f"/shared/{file}").split()


def test_checkpoint_under_a_client_then_stop_then_restore_elsewhere(archives: Scene) -> None:
    scene = archives
    first, second = scene.nodes[:2]
    pod = scene.start("pod", "redis", first)
    address = scene.pod(pod)["status"]["podIP"]
    scene.cluster.fill(address, 64)
    digest = scene.cluster.redis(address, "DEBUG", "DIGEST")

    with scene.cluster.counter(address) as client:
        left = _done(_ask(scene, "PodCheckpoint", "running", podName=pod))
        report = client.stop()
    assert report["ok"], report
    assert left["freezeMilliseconds"] > 0
    assert left["archiveBytes"] > 64 * 2**20
    assert scene.pod(pod)["status"]["containerStatuses"][0]["restartCount"] == 0
    scene.assert_no_debris()

    digest = scene.cluster.redis(address, "DEBUG", "DIGEST")
    _done(_ask(scene, "PodCheckpoint", "stopped", podName=pod, leaveRunning=False))
    scene.cluster.kubectl(
        "wait", "pod", pod, "-n", scene.namespace, "--for=delete", "--timeout=60s"
    )

    _carry(scene, "stopped", first, second)
    restored = _done(_ask(scene, "PodRestore", "back", archive="stopped", nodeName=second))
    assert restored["node"] == second
    scene.ready_pod("redis")
    seen = scene.pod(pod)
    assert seen["spec"]["nodeName"] == second
    assert seen["status"]["containerStatuses"][0]["restartCount"] == 0
    assert scene.cluster.redis(seen["status"]["podIP"], "DEBUG", "DIGEST") == digest
    scene.assert_no_debris(pod_lives=True)


def test_restore_on_the_same_node_under_another_name(archives: Scene) -> None:
    scene = archives
    pod = scene.start("pod", "redis", scene.nodes[0])
    address = scene.pod(pod)["status"]["podIP"]
    scene.cluster.redis(address, "SET", "a", "before")
    _done(_ask(scene, "PodCheckpoint", "one", podName=pod))
    scene.cluster.redis(address, "SET", "a", "after")
    status = _done(_ask(scene, "PodRestore", "copy", archive="one", podName="second"))
    assert status["node"] == scene.nodes[0]
    scene.cluster.wait_ready("second", scene.namespace)
    copy = scene.pod("second")["status"]["podIP"]
    assert copy != address
    assert scene.cluster.redis(copy, "GET", "a").split()[-1] == "before"
    assert scene.cluster.redis(address, "GET", "a").split()[-1] == "after"


def test_what_is_refused_before_anything_starts(archives: Scene) -> None:
    scene = archives
    node = scene.nodes[0]
    pod = scene.start("pod", "redis", node)
    _done(_ask(scene, "PodCheckpoint", "good", podName=pod))
    path = f"{DIRECTORY}/{scene.namespace}"
    for name, damage in {
        "cut": "truncate -s -1000 cut.godwit",
        "changed": "printf x | dd of=changed.godwit bs=1 seek=300000 conv=notrunc",
        "foreign": "echo something else > foreign.godwit",
    }.items():
        script = f"cd {path} && cp good.godwit {name}.godwit && {damage}"
        scene.cluster.node_exec(node, "sh", "-c", script)
    expected = {
        "cut": "ArchiveDamaged",
        "changed": "ArchiveDamaged",
        "foreign": "ArchiveForeign",
        "absent": "ArchiveNotFound",
    }
    for name, reason in expected.items():
        status = _ask(scene, "PodRestore", name, archive=name, podName="never")
        assert (status["phase"], status["reason"]) == ("Rejected", reason), status
    with _key(scene.cluster, "godwit-e2e-other", os.urandom(32)):
        status = _ask(
            scene,
            "PodRestore",
            "other-key",
            archive="good",
            podName="never",
            keySecretName="godwit-e2e-other",
        )
        assert (status["phase"], status["reason"]) == ("Rejected", "ArchiveKey"), status
    status = _ask(scene, "PodRestore", "taken", archive="good")
    assert status["phase"] == "Rejected", status
    status = _ask(scene, "PodCheckpoint", "again", podName=pod, archive="good")
    assert status["reason"] in ("ArchiveExists", "ArchiveKey"), status
    pods = [item["metadata"]["name"] for item in scene.cluster.list("pods", scene.namespace)]
    assert pods == [pod]
    scene.assert_no_debris()
