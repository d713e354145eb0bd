"""Manifests of a network file system for the lab (``lab/netfiles``): server, driver, volume."""

from __future__ import annotations

from lab.workloads import Manifest

DRIVER = "netfiles.lab.godwit.local"
PORT = 9022
LABELS = {"godwit.local/lab": "netfiles"}
"""Of the pods that others need to get rid of their volumes."""
_KUBELET = "/var/lib/kubelet"


def server(name: str, namespace: str, image: str, *, away_ms: int) -> Manifest:
    """A pod that serves its ``/export`` over SFTP, so far away; Ready when it does."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": LABELS},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "containers": [
                {
                    "name": "sftp",
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["python3", "/lab/server.py", str(PORT), str(away_ms)],
                    "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1},
                    "volumeMounts": [{"name": "export", "mountPath": "/export"}],
                }
            ],
            "volumes": [{"name": "export", "emptyDir": {}}],
        },
    }


def driver(namespace: str, image: str) -> list[Manifest]:
    """The CSI driver on every worker."""
    directories = {
        "plugins": f"{_KUBELET}/plugins",
        "registry": f"{_KUBELET}/plugins_registry",
        "pods": f"{_KUBELET}/pods",
    }
    labels = {**LABELS, "app": "netfiles-driver"}
    about = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "CSIDriver",
        "metadata": {"name": DRIVER},
        "spec": {"attachRequired": False, "podInfoOnMount": False},
    }
    mounts = [{"name": name, "mountPath": path} for name, path in directories.items()]
    # what is mounted here becomes the node's, and the kubelet's
    mounts[-1]["mountPropagation"] = "Bidirectional"
    container = {
        "name": "driver",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "/lab/driver.py", DRIVER],
        "securityContext": {"privileged": True},
        "env": [{"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
        "volumeMounts": mounts,
    }
    pods = {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "netfiles-driver", "namespace": namespace},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "hostNetwork": True,
                    "terminationGracePeriodSeconds": 2,
                    "automountServiceAccountToken": False,
                    "containers": [container],
                    "volumes": [
                        {"name": name, "hostPath": {"path": path, "type": "DirectoryOrCreate"}}
                        for name, path in directories.items()
                    ],
                },
            },
        },
    }
    return [about, pods]


def volume(name: str, namespace: str, claim: str, address: str) -> list[Manifest]:
    """A PersistentVolume that the server at ``address`` has, and a claim that is bound to it."""
    size, modes = {"storage": "1Gi"}, ["ReadWriteMany"]
    attributes = {"server": address, "port": str(PORT), "path": "/export"}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {
                "capacity": size,
                "accessModes": modes,
                "storageClassName": "",
                "csi": {"driver": DRIVER, "volumeHandle": name, "volumeAttributes": attributes},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": claim, "namespace": namespace},
            "spec": {
                "resources": {"requests": size},
                "accessModes": modes,
                "storageClassName": "",
                "volumeName": name,
            },
        },
    ]
