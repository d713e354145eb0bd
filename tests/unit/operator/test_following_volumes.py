"""Which volumes follow, which are copied, and which keep a pod where it is."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from godwit_api.migration import CopiedVolume
from godwit_api.pods import Node, Pod
from godwit_api.reasons import Reason
from godwit_operator.targets import storage_obstacles
from godwit_operator.volumes import (
    HOSTNAME,
    Storage,
    affinities,
    affinity_to,
    copied_volumes,
    named_nodes,
    volume_obstacles,
)

Object = dict[str, Any]
ON_N1 = {
    "required": {
        "nodeSelectorTerms": [
            {"matchExpressions": [{"key": "host", "operator": "In", "values": ["n1"]}]}
        ]
    }
}
SOURCES: dict[str, Object] = {
    "nfs": {"nfs": {"server": "s", "path": "/"}},
    "local": {"local": {"path": "/disk"}, "nodeAffinity": ON_N1},
    "directory": {"hostPath": {"path": "/srv/claimed"}},
    "pinned": {"hostPath": {"path": "/srv/pinned"}, "nodeAffinity": ON_N1},
    "disk-of-n1": {"local": {"path": "/disks/a/"}, "nodeAffinity": affinity_to("n1")},
    "directory-of-n1": {"hostPath": {"path": "/srv/x"}, "nodeAffinity": affinity_to("n1")},
    "fixed": {"local": {"path": "/disk"}, "nodeAffinity": affinity_to("n1")},
    "two": {"local": {"path": "/disk"}, "nodeAffinity": affinity_to("n1", "n2")},
    "blocks": {
        "local": {"path": "/dev/sdb"},
        "volumeMode": "Block",
        "nodeAffinity": affinity_to("n1"),
    },
    "csi": {"csi": {"driver": "d"}, "nodeAffinity": ON_N1},
    "disk": {"gcePersistentDisk": {"pdName": "d"}},
}
STORAGE = Storage(
    claims={
        f"{name}-{mode}": {"spec": {"accessModes": [modes], "volumeName": f"pv-{name}"}}
        for name in SOURCES
        for mode, modes in (("rwo", "ReadWriteOnce"), ("rwx", "ReadWriteMany"))
    },
    volumes={
        f"pv-{name}": {"metadata": {"name": f"pv-{name}"}, "spec": spec}
        for name, spec in SOURCES.items()
    },
    fixed={"pv-fixed": "the API server says no"},
)


def pod(*volumes: Object, name: str = "p") -> Pod:
    body = {"metadata": {"name": name, "namespace": "ns", "uid": name}, "spec": {}}
    body["spec"] = {"volumes": list(volumes)}
    return msgspec.convert(body, Pod)


def v(**source: Any) -> Object:
    return {"name": "v", **source}


def claim(name: str) -> Object:
    return v(persistentVolumeClaim={"claimName": name})


def host_path(path: str, kind: str = "") -> Object:
    return v(hostPath={"path": path, "type": kind})


FOLLOW = {
    "emptyDir": v(emptyDir={}),
    "projected": v(projected={}),
    "nfs": v(nfs={"server": "s", "path": "/"}),
    "claim of nfs": claim("nfs-rwx"),
    "claim of csi": claim("csi-rwx"),
}
STAY = {
    "huge emptyDir": (v(emptyDir={"medium": "HugePages"}), "huge pages"),
    "hostPath": (host_path("/srv"), "name it in spec.copyVolumes"),
    "claim of a directory": (claim("directory-rwo"), "name it in spec.copyVolumes"),
    "shared claim of a directory": (claim("directory-rwx"), "name it in spec.copyVolumes"),
    "local": (claim("local-rwo"), "bound to its node"),
    "shared local": (claim("local-rwx"), "bound to its node"),
    "directory with an affinity": (claim("pinned-rwx"), "bound to its node"),
    "one node at a time": (claim("nfs-rwo"), "ReadWriteOnce"),
    "one of its node": (claim("disk-of-n1-rwo"), "name v in spec.copyVolumes"),
    "one that keeps its node": (claim("fixed-rwo"), "the API server says no"),
    "disk": (claim("disk-rwx"), "of a kind"),
    "no such claim": (claim("none"), "bound to no"),
    "ephemeral": (v(ephemeral={"volumeClaimTemplate": {}}), "emptyDir"),
    "iscsi": (v(iscsi={}), "emptyDir"),
}


@pytest.mark.parametrize("volume", FOLLOW.values(), ids=FOLLOW)
def test_follows(volume: Object) -> None:
    assert volume_obstacles(pod(volume), STORAGE, []) == []
    assert copied_volumes(pod(volume), STORAGE, []) == []


@pytest.mark.parametrize(("volume", "said"), STAY.values(), ids=STAY)
def test_stays(volume: Object, said: str) -> None:
    (found,) = volume_obstacles(pod(volume), STORAGE, [])
    assert found.reason in {Reason.VOLUME_CANNOT_FOLLOW, Reason.HUGE_PAGES}
    assert said in found.message


@pytest.mark.parametrize(
    ("volume", "path"),
    [
        (host_path("/srv/data/", "DirectoryOrCreate"), "/srv/data"),
        (host_path("/srv/data", "Directory"), "/srv/data"),
        (claim("directory-rwo"), "/srv/claimed"),
    ],
)
def test_is_copied_when_named(volume: Object, path: str) -> None:
    assert volume_obstacles(pod(volume), STORAGE, ["v"]) == []
    assert copied_volumes(pod(volume), STORAGE, ["v"]) == [CopiedVolume(name="v", path=path)]
    assert copied_volumes(pod(volume), STORAGE, []) == []


@pytest.mark.parametrize(
    ("name", "path"), [("disk-of-n1", "/disks/a"), ("directory-of-n1", "/srv/x")]
)
def test_one_that_names_its_node_is_copied_and_told_another(name: str, path: str) -> None:
    one = pod(claim(f"{name}-rwo"))
    assert volume_obstacles(one, STORAGE, ["v"]) == []
    expected = CopiedVolume(name="v", path=path, persistent_volume=f"pv-{name}", home="n1")
    assert copied_volumes(one, STORAGE, ["v"]) == [expected]
    assert affinities(one, STORAGE) == []


def test_a_claim_that_another_pod_of_the_node_mounts() -> None:
    one, other = pod(claim("disk-of-n1-rwo")), pod(claim("disk-of-n1-rwo"), name="other")
    (found,) = volume_obstacles(one, STORAGE, ["v"], [one, other])
    assert "pod ns/other mounts claim disk-of-n1-rwo, too" in found.message


@pytest.mark.parametrize("labels", [{"host": "n1"}, {"topology.kubernetes.io/zone": "z"}])
def test_an_affinity_that_is_more_than_a_node(labels: dict[str, str]) -> None:
    terms = [
        {"matchExpressions": [{"key": key, "operator": "In", "values": [value]}]}
        for key, value in labels.items()
    ]
    spec = {"nodeAffinity": {"required": {"nodeSelectorTerms": terms}}}
    assert named_nodes({"spec": spec}) is None
    hostname = {"key": HOSTNAME, "operator": "In", "values": ["n1"]}
    twice = [{"matchExpressions": [hostname, terms[0]["matchExpressions"][0]]}]
    spec = {"nodeAffinity": {"required": {"nodeSelectorTerms": twice}}}
    assert named_nodes({"spec": spec}) is None
    assert named_nodes({"spec": {}}) is None


@pytest.mark.parametrize(
    ("volume", "said"),
    [
        (claim("two-rwo"), "not just one name"),
        (claim("blocks-rwo"), "raw blocks"),
        (claim("fixed-rwo"), "the API server says no"),
        (host_path("/run/x.sock", "Socket"), "no directory"),
        (host_path("/"), "whole file system"),
        (claim("local-rwo"), "bound to its node"),
        (v(configMap={"name": "x"}), "without being copied"),
    ],
)
def test_cannot_be_copied_though_named(volume: Object, said: str) -> None:
    (found,) = volume_obstacles(pod(volume), STORAGE, ["v"])
    assert said in found.message


def test_an_empty_directory_may_be_named() -> None:
    assert volume_obstacles(pod(v(emptyDir={})), STORAGE, ["v"]) == []


def test_everything_at_once() -> None:
    two = pod(host_path("/srv"), {"name": "w", "hostPath": {"path": "/srv/inner"}})
    other = pod(host_path("/srv/inner/deep"), name="other")
    found = [one.message for one in volume_obstacles(two, STORAGE, ["v", "w", "x"], [two, other])]
    assert any("names x, which is no volume" in text for text in found)
    assert any("Volume w (/srv/inner) is part of volume v" in text for text in found)
    assert any("Volume v: pod ns/other mounts" in text for text in found)
    assert any("Volume w: pod ns/other mounts" in text for text in found)


def test_a_volume_that_the_target_cannot_mount() -> None:
    wanted = affinities(pod(claim("csi-rwx"), claim("nfs-rwx")), STORAGE)
    assert [name for name, _ in wanted] == ["pv-csi"]

    def node(host: str) -> Node:
        return msgspec.convert({"metadata": {"name": host, "labels": {"host": host}}}, Node)

    assert storage_obstacles(node("n1"), wanted) == []
    (found,) = storage_obstacles(node("n2"), wanted)
    assert "pv-csi" in found.message
