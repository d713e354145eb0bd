"""The administrator's Secrets that archives need: keys, and object stores.

Both are in the operator's own namespace, so it reads no Secrets elsewhere, and who
may make a PodCheckpoint cannot choose where to an agent connects or learn what it
connects with. A Secret of a store binds its credentials to its endpoint.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from godwit_api.errors import Rejected
from godwit_api.objectstores import Store, faults
from godwit_api.pb import agent_pb2 as pb
from godwit_api.reasons import Reason
from godwit_operator.kube import SECRETS, KubeApi, find

KEY_TYPE = "godwit.io/checkpoint-key"
STORE_TYPE = "godwit.io/object-store"
_KEY_BYTES = 32
_DEFAULT_REGION = "us-east-1"
# entry of the Secret by field of ``Store``
_ENTRIES = {
    "endpoint": "endpoint",
    "bucket": "bucket",
    "prefix": "prefix",
    "region": "region",
    "access_key": "accessKey",
    "secret_key": "secretKey",
    "ca_pem": "ca.crt",
}
Object = dict[str, Any]


async def archive_of(api: KubeApi, namespace: str, spec: Object, name: str) -> pb.Archive:
    """What agents must know of the archive that ``spec`` (of either kind) names."""
    secret = await _secret(api, namespace, spec["keySecretName"], KEY_TYPE, Reason.ARCHIVE_KEY)
    archive = pb.Archive(name=name, key=key_of(secret))
    if spec.get("storeSecretName"):
        of = spec["storeSecretName"]
        secret = await _secret(api, namespace, of, STORE_TYPE, Reason.ARCHIVE_STORE)
        store = store_of(secret)
        archive.store.CopyFrom(
            pb.ObjectStore(
                endpoint=store.endpoint,
                bucket=store.bucket,
                prefix=store.prefix,
                region=store.region,
                access_key=store.access_key,
                secret_key=store.secret_key,
                ca_pem=store.ca_pem,
            )
        )
    return archive


def key_of(secret: Object) -> bytes:
    """Pure."""
    key = _entry(secret, "key")
    if key is None or len(key) != _KEY_BYTES:
        name = secret["metadata"]["name"]
        message = f"The entry key of Secret {name} has not {_KEY_BYTES} bytes"
        raise Rejected(Reason.ARCHIVE_KEY, message)
    return key


def store_of(secret: Object) -> Store:
    """``Rejected`` with everything that is wrong with it. Pure."""
    data = secret.get("data") or {}
    wrong = [f"{name} is no entry of it" for name in sorted(set(data) - set(_ENTRIES.values()))]
    values = {}
    for field, entry in _ENTRIES.items():
        try:
            values[field] = (_entry(secret, entry) or b"").decode()
        except UnicodeDecodeError:
            values[field] = ""
            wrong.append(f"{entry} is no text")
    store = Store(**{**values, "region": values["region"] or _DEFAULT_REGION})
    wrong += [f"{_ENTRIES[field]} {what}" for field, what in faults(store)]
    if wrong:
        name = secret["metadata"]["name"]
        raise Rejected(Reason.ARCHIVE_STORE, f"Secret {name}: {'; '.join(wrong)}")
    return store


async def _secret(api: KubeApi, namespace: str, name: str, kind: str, reason: Reason) -> Object:
    secret = await find(api, SECRETS, namespace, name)
    if secret is None or secret.get("type") != kind:
        message = f"There is no Secret {name} of type {kind} in namespace {namespace}"
        raise Rejected(reason, message)
    return secret


def _entry(secret: Object, name: str) -> bytes | None:
    try:
        return base64.b64decode(secret["data"][name], validate=True)
    except (KeyError, TypeError, binascii.Error):
        return None
