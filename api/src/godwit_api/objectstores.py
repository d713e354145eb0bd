"""Where an object store is and who may use it, as an administrator writes it down. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_ENDPOINT = re.compile(
    r"https?://([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?|\[[0-9a-f:]{2,45}\])(:[0-9]{1,5})?\Z"
)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]\Z")
_PREFIX = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*\Z")
_REGION = re.compile(r"[a-z0-9-]{1,64}\Z")
_MAX_PREFIX, _MAX_KEY, _MAX_CA = 400, 256, 1 << 20


@dataclass(frozen=True, slots=True)
class Store:
    """``prefix`` is put before the keys of objects; it may be empty. ``ca_pem``: authorities
    that are trusted instead of the usual ones."""

    endpoint: str  # https://HOST[:PORT], or http:// without TLS
    bucket: str
    prefix: str
    region: str
    access_key: str
    secret_key: str = field(repr=False)
    ca_pem: str = field(default="", repr=False)


def faults(store: Store) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it), all of them."""
    if not _ENDPOINT.match(store.endpoint):
        yield "endpoint", "is not https://HOST[:PORT], without a path"
    if not _BUCKET.match(store.bucket):
        yield "bucket", "is no name of a bucket"
    if store.prefix and (len(store.prefix) > _MAX_PREFIX or not _PREFIX.match(store.prefix)):
        yield "prefix", "is no path of letters, digits, '.', '_' and '-' without '/' at its ends"
    if not _REGION.match(store.region):
        yield "region", "is no name of a region"
    for name, value in (("access_key", store.access_key), ("secret_key", store.secret_key)):
        if not 0 < len(value) <= _MAX_KEY or not value.isascii() or not value.isprintable():
            yield name, "is no key"
    if store.ca_pem and (len(store.ca_pem) > _MAX_CA or "BEGIN CERTIFICATE" not in store.ca_pem):
        yield "ca_pem", "has no certificates (PEM)"
