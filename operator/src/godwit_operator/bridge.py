"""The Service bridge: new connections reach the process while its pod is replaced.

Between the deletion of the Pod object and the successor's readiness the
EndpointSlice controller either does not list the address or lists it as not
ready. So we list it ourselves, in a slice of our own, for every Service that
selects the pod. Three facts make it free of gaps, without waiting blindly:

* kube-proxy receives all slices by one watch, in the order of their changes.
  Our slice is created before the pod is deleted, so no kube-proxy can see the
  address vanish before it sees our slice.
* Where two slices list the same address and port, kube-proxy keeps the one it
  happens to visit last (k8s.io/kubernetes pkg/proxy/endpointslicecache.go,
  ``addEndpoints``; only a terminating one never replaces another). So the
  controller's slice must not say "not ready" either: the Service publishes
  addresses that are not ready for that time, but only if all its other pods
  are ready.
* The controller copies a Service's labels to its slices
  (k8s.io/endpointslice utils.go, ``setEndpointSliceLabels``). A label set
  together with that switch, once it shows on the slices, proves that the
  controller works by the new Service; its removal proves the contrary.
  ``serving`` in its slices is the pod's readiness, whatever is published.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec

from godwit_api.errors import Retryable
from godwit_api.migration import API_VERSION, KIND, MIGRATION_KEY, PodMigration
from godwit_api.pods import Pod
from godwit_api.reasons import Reason
from godwit_operator.kube import (
    ENDPOINT_SLICES,
    PODS,
    SERVICES,
    ConflictError,
    KubeApi,
    NotFoundError,
    remove,
)

Object = dict[str, Any]
SERVICE_LABEL = "kubernetes.io/service-name"
MANAGER_LABEL = "endpointslice.kubernetes.io/managed-by"
MANAGER = "godwit.io"
CONTROLLER = "endpointslice-controller.k8s.io"
BRIDGE_PREFIX = "bridge.godwit.io/"


def selects(service: Object, pod: Pod) -> bool:
    """Whether the Service's endpoints are made from pods and ``pod`` is one."""
    selector = service["spec"].get("selector") or {}
    labels = pod.metadata.labels
    return bool(selector) and all(labels.get(key) == value for key, value in selector.items())


def slice_name(migration: str, service: str, family: str) -> str:
    digest = hashlib.sha256(service.encode()).hexdigest()[:8]
    return f"godwit-{migration}-{digest}-{family.lower()}"


def slice_bodies(migration: PodMigration, service: Object, pod: Pod) -> list[Object]:
    """Our slices: the pod's addresses of the Service's families, as the controller makes them."""
    families = service["spec"].get("ipFamilies") or [_family(pod.status.pod_ip)]
    return [_slice_body(migration, service, pod, ip) for ip in pod.ips if _family(ip) in families]


def _family(ip: str) -> str:
    return "IPv6" if ":" in ip else "IPv4"


def _slice_body(migration: PodMigration, service: Object, pod: Pod, ip: str) -> Object:
    """The address, ready, with the ports the controller would list."""
    name = service["metadata"]["name"]
    endpoint: Object = {
        "addresses": [ip],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "nodeName": pod.spec.node_name,
    }
    if pod.spec.hostname and pod.spec.subdomain == name:
        endpoint["hostname"] = pod.spec.hostname
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": slice_name(migration.metadata.uid, name, _family(ip)),
            "namespace": migration.metadata.namespace,
            "labels": {
                SERVICE_LABEL: name,
                MANAGER_LABEL: MANAGER,
                MIGRATION_KEY: migration.metadata.uid,
            },
            "ownerReferences": [
                {
                    "apiVersion": API_VERSION,
                    "kind": KIND,
                    "name": migration.metadata.name,
                    "uid": migration.metadata.uid,
                    "controller": False,
                    "blockOwnerDeletion": False,
                }
            ],
        },
        "addressType": _family(ip),
        "endpoints": [endpoint],
        "ports": [
            found
            for port in service["spec"].get("ports") or []
            if (found := _port(port, pod)) is not None
        ],
    }


def _port(port: Object, pod: Pod) -> Object | None:
    target = port.get("targetPort") or port["port"]
    protocol = port.get("protocol", "TCP")
    if isinstance(target, str):
        declared = [p for c in pod.spec.containers for p in c.ports]
        same = (p for p in declared if p.name == target and p.protocol == protocol)
        found = next(same, None)
        if found is None:
            return None
        target = found.container_port
    body: Object = {"name": port.get("name", ""), "port": target, "protocol": protocol}
    if port.get("appProtocol"):
        body["appProtocol"] = port["appProtocol"]
    return body


def publishes_by_us(service: Object) -> bool:
    return any(key.startswith(BRIDGE_PREFIX) for key in service["metadata"].get("labels") or {})


def may_publish(service: Object, pod: Pod, pods: list[Pod]) -> bool:
    """Whether publishing addresses that are not ready changes nothing for other pods."""
    others = [p for p in pods if p.metadata.uid != pod.metadata.uid and selects(service, p)]
    return all(p.ready or p.finished for p in others)


@dataclass(frozen=True)
class Bridge:
    """Effects of one migration's bridge."""

    api: KubeApi
    migration: PodMigration

    @property
    def namespace(self) -> str:
        return self.migration.metadata.namespace

    @property
    def label(self) -> str:
        return f"{BRIDGE_PREFIX}{self.migration.metadata.uid}"

    async def build(self, pod: Pod) -> int:
        """Bridge every Service of ``pod``; Retryable until the controller goes along."""
        if not pod.ready:
            return 0  # no Service sends it anything now
        services = [s for s in await self.api.list(SERVICES, self.namespace) if selects(s, pod)]
        if not services:
            return 0
        pods = msgspec.convert(await self.api.list(PODS, self.namespace), list[Pod])
        published = []
        for service in services:
            for body in slice_bodies(self.migration, service, pod):
                # a conflict: ours, from before a restart
                with contextlib.suppress(ConflictError):
                    await self.api.create(ENDPOINT_SLICES, self.namespace, body)
            if await self._publish(service, pod, pods):
                published.append(service["metadata"]["name"])
        await self._await_label(published, present=True)
        return len(services)

    async def _publish(self, service: Object, pod: Pod, pods: list[Pod]) -> bool:
        labels = service["metadata"].get("labels") or {}
        if self.label in labels:
            return True
        if service["spec"].get("publishNotReadyAddresses") and not publishes_by_us(service):
            return False  # its owner wants that for good
        if not may_publish(service, pod, pods):
            return False
        patch = {
            "metadata": {
                "resourceVersion": service["metadata"]["resourceVersion"],
                "labels": {self.label: ""},
            },
            "spec": {"publishNotReadyAddresses": True},
        }
        await self._patch(service, patch)
        return True

    async def _patch(self, service: Object, patch: Object) -> None:
        name = service["metadata"]["name"]
        try:
            await self.api.patch(SERVICES, self.namespace, name, patch)
        except NotFoundError:
            return
        except ConflictError as cause:
            raise Retryable(Reason.API_UNAVAILABLE, str(cause), delay_seconds=0.05) from cause

    async def _await_label(self, services: list[str], *, present: bool) -> None:
        for name in services:
            for item in await self._slices(name):
                if not item.get("endpoints"):
                    continue  # a placeholder: the controller does not relabel it
                if (self.label in item["metadata"]["labels"]) is not present:
                    raise Retryable(
                        Reason.IN_PROGRESS,
                        f"Waiting for the EndpointSlices of Service {name}",
                        delay_seconds=0.02,
                    )

    async def _slices(self, service: str) -> list[Object]:
        """The controller's slices of one Service."""
        labels = f"{SERVICE_LABEL}={service},{MANAGER_LABEL}={CONTROLLER}"
        return await self.api.list(ENDPOINT_SLICES, self.namespace, labels=labels)

    async def own_slices(self) -> list[Object]:
        labels = f"{MIGRATION_KEY}={self.migration.metadata.uid},{MANAGER_LABEL}={MANAGER}"
        return await self.api.list(ENDPOINT_SLICES, self.namespace, labels=labels)

    async def remove(self, *, successor: Pod | None, patient: bool) -> None:
        """Take the bridge down. With a Ready ``successor``: only once its Services list it.

        Not ``patient``: the controller has had its time; do not wait for it.
        """
        own = await self.own_slices()
        services = await self.api.list(SERVICES, self.namespace)
        names = {item["metadata"]["labels"][SERVICE_LABEL] for item in own}
        bridged = [s for s in services if s["metadata"]["name"] in names]
        if successor is not None and successor.ready and patient:
            for service in bridged:
                if selects(service, successor):
                    await self._await_listed(service["metadata"]["name"], successor)
        for service in services:
            if self.label in (service["metadata"].get("labels") or {}):
                await self._patch(service, restore_patch(service, self.label))
        if patient:
            await self._await_label([s["metadata"]["name"] for s in bridged], present=False)
        for item in own:
            await remove(self.api, ENDPOINT_SLICES, self.namespace, item["metadata"]["name"])

    async def _await_listed(self, service: str, pod: Pod) -> None:
        slices = await self._slices(service)
        wanted = {item["addressType"] for item in slices} & {_family(ip) for ip in pod.ips}
        listed = {
            item["addressType"]
            for item in slices
            for endpoint in item.get("endpoints") or []
            if (endpoint.get("targetRef") or {}).get("uid") == pod.metadata.uid
            and endpoint.get("conditions", {}).get("serving")
        }
        if wanted - listed:  # without any slice the Service has gone
            raise Retryable(
                Reason.IN_PROGRESS,
                f"Waiting for Service {service} to list the successor as ready",
                delay_seconds=0.1,
            )


def restore_patch(service: Object, label: str) -> Object:
    """Merge patch that takes one migration's mark away, and with the last one the switch."""
    labels = service["metadata"].get("labels") or {}
    others = [key for key in labels if key.startswith(BRIDGE_PREFIX) and key != label]
    patch: Object = {
        "metadata": {
            "resourceVersion": service["metadata"]["resourceVersion"],
            "labels": {label: None},
        }
    }
    if not others:
        patch["spec"] = {"publishNotReadyAddresses": None}
    return patch
