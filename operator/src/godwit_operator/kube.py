"""Port to the Kubernetes API: JSON in and out, errors as decisions.

The adapter speaks plain JSON over aiohttp: we read few fields of few kinds and
must send preconditions, dry runs and patches exactly as meant.
"""

from __future__ import annotations

import asyncio
import base64
import os
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import msgspec
import yaml

from godwit_api.errors import Rejected, Retryable
from godwit_api.reasons import Reason

Object = dict[str, Any]
MERGE = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_NAMESPACE_ENDS = "NamespaceTerminating"  # corev1.NamespaceTerminatingCause


class NotFoundError(Exception):
    """The object does not exist."""


class ConflictError(Exception):
    """It exists already, has another UID or another resourceVersion."""


@dataclass(frozen=True)
class Resource:
    """A kind of object, as the API's paths name it."""

    group: str  # "" for the core group
    version: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None, sub: str = "") -> str:
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        scope = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        tail = f"/{name}" if name else ""
        return f"{root}{scope}/{self.plural}{tail}{f'/{sub}' if sub else ''}"


PODS = Resource("", "v1", "pods")
NODES = Resource("", "v1", "nodes", namespaced=False)
SERVICES = Resource("", "v1", "services")
SECRETS = Resource("", "v1", "secrets")
CONFIG_MAPS = Resource("", "v1", "configmaps")
CLAIMS = Resource("", "v1", "persistentvolumeclaims")
VOLUMES = Resource("", "v1", "persistentvolumes", namespaced=False)
ENDPOINT_SLICES = Resource("discovery.k8s.io", "v1", "endpointslices")
EVENTS = Resource("events.k8s.io", "v1", "events")
STATEFUL_SETS = Resource("apps", "v1", "statefulsets")
REPLICA_SETS = Resource("apps", "v1", "replicasets")
POLICIES = Resource("admissionregistration.k8s.io", "v1", "mutatingadmissionpolicies", False)
BINDINGS = Resource("admissionregistration.k8s.io", "v1", "mutatingadmissionpolicybindings", False)
TOKEN_REVIEWS = Resource("authentication.k8s.io", "v1", "tokenreviews", False)
MIGRATIONS = Resource("godwit.io", "v1alpha1", "podmigrations")


class KubeApi(Protocol):
    """What the operator does with the API server.

    Raises NotFoundError, ConflictError, Rejected (4xx) and Retryable (API away).
    """

    async def get(self, kind: Resource, namespace: str | None, name: str) -> Object: ...
    async def list(
        self, kind: Resource, namespace: str | None = None, *, labels: str = ""
    ) -> list[Object]: ...
    async def create(
        self, kind: Resource, namespace: str | None, body: Object, *, dry_run: bool = False
    ) -> Object: ...
    async def patch(
        self,
        kind: Resource,
        namespace: str | None,
        name: str,
        body: Any,
        *,
        sub: str = "",
        content_type: str = MERGE,
        dry_run: bool = False,
    ) -> Object: ...
    async def delete(
        self,
        kind: Resource,
        namespace: str | None,
        name: str,
        *,
        uid: str | None = None,
        grace_seconds: int | None = None,
    ) -> None: ...


async def find(api: KubeApi, kind: Resource, namespace: str | None, name: str) -> Object | None:
    """The object, or None."""
    try:
        return await api.get(kind, namespace, name)
    except NotFoundError:
        return None


async def remove(api: KubeApi, kind: Resource, namespace: str | None, name: str) -> None:
    """Delete it unless it is gone already."""
    try:
        await api.delete(kind, namespace, name)
    except NotFoundError:
        return


@dataclass(frozen=True)
class Access:
    """Where the API server is and how we prove who we are."""

    url: str
    tls: ssl.SSLContext
    token_file: Path | None = None
    token: str | None = None

    def headers(self) -> dict[str, str]:
        token = self.token
        if self.token_file is not None:
            token = self.token_file.read_text().strip()  # rotated by the kubelet
        return {"Authorization": f"Bearer {token}"} if token else {}


def access() -> Access:
    """In a pod by its service account, elsewhere by KUBECONFIG."""
    if "KUBECONFIG" in os.environ:
        return from_kubeconfig(Path(os.environ["KUBECONFIG"]))
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    host = f"[{host}]" if ":" in host else host
    tls = ssl.create_default_context(cafile=str(_SERVICE_ACCOUNT / "ca.crt"))
    return Access(f"https://{host}:{port}", tls, token_file=_SERVICE_ACCOUNT / "token")


def from_kubeconfig(path: Path) -> Access:
    """The current context of a kubeconfig file (certificates or a token)."""
    config = yaml.safe_load(path.read_text())
    context = _named(config["contexts"], config["current-context"])["context"]
    cluster = _named(config["clusters"], context["cluster"])["cluster"]
    user = _named(config["users"], context["user"])["user"]
    tls = ssl.create_default_context(cadata=_pem(cluster, "certificate-authority").decode())
    if "client-certificate" in user or "client-certificate-data" in user:
        with tempfile.TemporaryDirectory() as scratch:
            pair = Path(scratch) / "pair.pem"
            pair.touch(0o600)
            pair.write_bytes(_pem(user, "client-certificate") + b"\n" + _pem(user, "client-key"))
            tls.load_cert_chain(pair)
    return Access(cluster["server"], tls, token=user.get("token"))


def _named(items: list[Object], name: str) -> Object:
    return next(item for item in items if item["name"] == name)


def _pem(holder: Object, key: str) -> bytes:
    if f"{key}-data" in holder:
        return base64.b64decode(holder[f"{key}-data"])
    return Path(holder[key]).read_bytes()


class HttpKubeApi:
    """KubeApi over HTTPS. One per event loop; close it."""

    def __init__(self, access: Access, *, timeout_seconds: float = 15.0) -> None:
        self._access = access
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=access.tls),
            timeout=aiohttp.ClientTimeout(total=timeout_seconds),
            json_serialize=lambda value: msgspec.json.encode(value).decode(),
        )

    async def close(self) -> None:
        await self._session.close()
        await asyncio.sleep(0.1)  # TLS transports close a moment after their session

    async def get(self, kind: Resource, namespace: str | None, name: str) -> Object:
        return await self._call("GET", kind.path(namespace, name))

    async def list(
        self, kind: Resource, namespace: str | None = None, *, labels: str = ""
    ) -> list[Object]:
        query = {"limit": "500"} | ({"labelSelector": labels} if labels else {})
        found: list[Object] = []
        while True:
            page = await self._call("GET", kind.path(namespace), query)
            found += page.get("items", [])
            token = page.get("metadata", {}).get("continue")
            if not token:
                return found
            query["continue"] = token

    async def create(
        self, kind: Resource, namespace: str | None, body: Object, *, dry_run: bool = False
    ) -> Object:
        query = {"dryRun": "All"} if dry_run else {}
        return await self._call("POST", kind.path(namespace), query, body)

    async def patch(
        self,
        kind: Resource,
        namespace: str | None,
        name: str,
        body: Any,
        *,
        sub: str = "",
        content_type: str = MERGE,
        dry_run: bool = False,
    ) -> Object:
        query = {"dryRun": "All"} if dry_run else {}
        return await self._call("PATCH", kind.path(namespace, name, sub), query, body, content_type)

    async def delete(
        self,
        kind: Resource,
        namespace: str | None,
        name: str,
        *,
        uid: str | None = None,
        grace_seconds: int | None = None,
    ) -> None:
        options: Object = {"kind": "DeleteOptions", "apiVersion": "v1"}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        await self._call("DELETE", kind.path(namespace, name), {}, options)

    async def _call(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> Object:
        headers = self._access.headers() | {"Accept": "application/json"}
        data = None
        if body is not None:
            data, headers["Content-Type"] = msgspec.json.encode(body), content_type
        try:
            async with self._session.request(
                method, self._access.url + path, params=query, data=data, headers=headers
            ) as response:
                raw = await response.read()
                status = response.status
        except (TimeoutError, aiohttp.ClientError, OSError) as cause:
            text = f"{method} {path}: {cause or type(cause).__name__}"
            raise Retryable(Reason.API_UNAVAILABLE, text) from cause
        if status < 300:
            found: Object = msgspec.json.decode(raw)
            return found
        raise _error(status, raw, f"{method} {path}")


def _message(raw: bytes) -> str:
    try:
        return str(msgspec.json.decode(raw)["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return raw[:200].decode(errors="replace")


def _causes(raw: bytes) -> set[str]:
    """Why a request was refused, as far as the API server has words for it (metav1.Status)."""
    try:
        causes = msgspec.json.decode(raw)["details"]["causes"]
        return {str(one["reason"]) for one in causes}
    except (msgspec.DecodeError, KeyError, TypeError):
        return set()


def _error(status: int, raw: bytes, call: str) -> Exception:
    message = _message(raw)
    if status == 403 and _NAMESPACE_ENDS in _causes(raw):
        # with its namespace the pod is deleted, and no successor can be created any more
        return Rejected(Reason.SOURCE_DELETED, message)
    match status:
        case 404:
            return NotFoundError(message)
        case 409:
            return ConflictError(message)
        case 401 | 408 | 429:
            return Retryable(Reason.API_UNAVAILABLE, message)
        case _ if status >= 500:
            return Retryable(Reason.API_UNAVAILABLE, f"{call}: {status} {message}")
    return Rejected(Reason.MALFORMED, f"{call}: {status} {message}")
