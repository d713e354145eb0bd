"""A CSI driver for one node: mounts what ``server.py`` serves, with sshfs (FUSE).

As drivers for NFS do, it mounts each volume for each pod, where the kubelet wants it. The
process that serves a mount (``sshfs``) is one of this container; the mount itself is the node's
(``mountPropagation: Bidirectional``). Volume attributes: ``server``, ``port``, ``path``.

Says on standard output what it does: one JSON object a line with ``at`` (Unix seconds), ``did``
and ``path``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import csi_pb2 as csi  # type: ignore[import-not-found]  # made with the image
import grpc
import registration_pb2 as registration  # type: ignore[import-not-found]

KUBELET = Path("/var/lib/kubelet")


class Refused(Exception):
    """Said to the kubelet, which tries again."""


def info(_: Any) -> Any:
    """Identity."""
    return csi.GetPluginInfoResponse(name=NAME, vendor_version="1")


def publish(request: Any) -> Any:
    """Mount a volume, unless it is mounted there already."""
    target, about = Path(request.target_path), request.volume_context
    target.mkdir(parents=True, exist_ok=True)
    if not mounted(target):
        # what other nodes have written is seen after a second
        options = f"directport={about['port']},allow_other,default_permissions,dcache_timeout=1"
        if request.readonly:
            options += ",ro"
        _run("sshfs", f"{about['server']}:{about['path']}", str(target), "-o", options)
        say("mounted", target)
    return csi.NodePublishVolumeResponse()


def unpublish(request: Any) -> Any:
    """Unmount it; what has been written is with the server then."""
    target = Path(request.target_path)
    if mounted(target):
        _run("umount", str(target))
        say("unmounted", target)
    with contextlib.suppress(FileNotFoundError):
        target.rmdir()
    return csi.NodeUnpublishVolumeResponse()


def mounted(target: Path) -> bool:
    """Also when nobody serves the mount any more, and a look at it fails."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return any(line.split()[1] == str(target) for line in lines)


def told(status: Any) -> Any:
    """What the kubelet makes of the registration."""
    say("registered" if status.plugin_registered else status.error, KUBELET)
    return registration.RegistrationStatusResponse()


def say(did: str, path: Path) -> None:
    """To whoever reads the log."""
    print(json.dumps({"at": time.time(), "did": did, "path": str(path)}), flush=True)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(f"{words[0]}: {done.stderr.strip()}")


def serve(path: Path, **services: dict[str, tuple[Any, Any]]) -> grpc.Server:
    """Listen on a unix socket. ``services``: method to (request type, function)."""
    server = grpc.server(ThreadPoolExecutor(4))
    for service, methods in services.items():
        handlers = {
            method: grpc.unary_unary_rpc_method_handler(
                _answering(function),
                request_deserializer=request.FromString,
                response_serializer=lambda answer: answer.SerializeToString(),
            )
            for method, (request, function) in methods.items()
        }
        name = service.replace("_", ".")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    server.add_insecure_port(f"unix:{path}")
    server.start()
    return server


def _answering(function: Any) -> Any:
    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return function(request)
        except (OSError, Refused) as failure:
            context.abort(grpc.StatusCode.INTERNAL, str(failure))

    return answer


def main() -> None:
    """Serve until told to end; the kubelet forgets a driver whose socket is gone."""
    end = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: end.set())
    endpoint = KUBELET / "plugins" / NAME / "csi.sock"
    driver = serve(
        endpoint,
        csi_v1_Identity={
            "GetPluginInfo": (csi.GetPluginInfoRequest, info),
            "GetPluginCapabilities": (
                csi.GetPluginCapabilitiesRequest,
                lambda _: csi.GetPluginCapabilitiesResponse(),
            ),
            "Probe": (csi.ProbeRequest, lambda _: csi.ProbeResponse()),
        },
        csi_v1_Node={
            "NodePublishVolume": (csi.NodePublishVolumeRequest, publish),
            "NodeUnpublishVolume": (csi.NodeUnpublishVolumeRequest, unpublish),
            "NodeGetCapabilities": (
                csi.NodeGetCapabilitiesRequest,
                lambda _: csi.NodeGetCapabilitiesResponse(),
            ),
            "NodeGetInfo": (
                csi.NodeGetInfoRequest,
                lambda _: csi.NodeGetInfoResponse(node_id=os.environ["NODE"]),
            ),
        },
    )
    # The kubelet watches this directory: the socket is made when the driver listens.
    about = registration.PluginInfo(
        type="CSIPlugin", name=NAME, endpoint=str(endpoint), supported_versions=["1.0.0"]
    )
    socket = KUBELET / "plugins_registry" / f"{NAME}-reg.sock"
    register = serve(
        socket,
        pluginregistration_Registration={
            "GetInfo": (registration.InfoRequest, lambda _: about),
            "NotifyRegistrationStatus": (registration.RegistrationStatus, told),
        },
    )
    end.wait()
    socket.unlink(missing_ok=True)
    for server in (register, driver):
        server.stop(None)


if __name__ == "__main__":
    NAME = sys.argv[1]
    main()
