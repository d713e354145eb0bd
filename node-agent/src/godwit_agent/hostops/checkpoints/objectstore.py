"""Archives in an object store that speaks S3.

An archive is uploaded in parts while it is packed: two parts are in memory, nothing
is on disk, and nobody sees the object before its last part is there. Each part
carries a digest that the store checks (Content-MD5 under TLS, else the SHA-256 that
is part of the signature), the archive itself its own authentication. An upload that
is not completed is aborted, so that no invisible parts stay and cost money.
"""

from __future__ import annotations

import contextlib
import hashlib
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import unquote
from xml.etree.ElementTree import Element, SubElement, tostring

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error, ServerError
from urllib3.exceptions import HTTPError, MaxRetryError, SSLError

from godwit_agent import log
from godwit_agent.hostops.checkpoints.archives import archive_path, exists_already
from godwit_api.errors import GodwitError, Rejected, Retryable
from godwit_api.objectstores import Store
from godwit_api.reasons import Reason

T = TypeVar("T")
_Words = dict[str, str | list[str] | tuple[str]]
_MIB = 1 << 20
_PART_BYTES = 16 * _MIB
_MAX_PARTS = 10_000  # of S3; all but the last have the same size, as some stores demand
_CONNECT_S, _READ_S = 10.0, 120.0
_REOPEN = 5  # a download that breaks off is taken up where it broke off
_ABSENT = frozenset({"NoSuchKey", "NotFound", "NoSuchUpload"})
_LATER = frozenset({"InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown"})


class _Client(Minio):
    """``Minio.put_object`` reads from a file, and begins when there is something to read. We
    write, and want to know before a pod is touched that we may. So this uses the parts that
    ``put_object`` is made of; they are protected, and requirements.lock pins them."""

    def begin(self, bucket: str, key: str) -> str:
        return str(self._create_multipart_upload(bucket, key, {}))

    def part(self, bucket: str, key: str, upload: str, number: int, data: bytes) -> str:
        return str(self._upload_part(bucket, key, data, None, upload, number))

    def complete(
        self, bucket: str, key: str, upload: str, tags: list[str], *, guarded: bool
    ) -> None:
        """``guarded``: only if there is no such object."""
        body = Element("CompleteMultipartUpload")
        for number, tag in enumerate(tags, 1):
            part = SubElement(body, "Part")
            SubElement(part, "PartNumber").text = str(number)
            SubElement(part, "ETag").text = f'"{tag}"'
        headers: _Words = {"Content-Type": "application/xml"}
        if guarded:
            headers["If-None-Match"] = "*"
        query: _Words = {"uploadId": upload}
        self._execute("POST", bucket, key, tostring(body), headers, query)

    def abort(self, bucket: str, key: str, upload: str) -> None:
        self._abort_multipart_upload(bucket, key, upload)

    def unfinished(self, bucket: str, key: str) -> list[str]:
        """Uploads of this key."""
        found = self._list_multipart_uploads(bucket, prefix=key).uploads
        return [str(one.upload_id) for one in found if unquote(str(one.object_name)) == key]


class Gone(Rejected):
    """What is asked about is not there."""


class _Bucket:
    """One bucket, and what its failures mean."""

    def __init__(self, store: Store) -> None:
        self._where = f"{store.endpoint}, bucket {store.bucket}"
        self.name = store.bucket
        self.client = _client(store)

    def stat(self, key: str) -> tuple[int, str] | None:
        """(size, entity tag)."""

        def look() -> tuple[int, str] | None:
            try:
                about = self.client.stat_object(self.name, key)
            except S3Error as error:
                if error.code in _ABSENT:
                    return None
                raise
            return int(about.size or 0), str(about.etag)

        return self.ask(look)

    def abort(self, key: str, upload: str) -> None:
        with contextlib.suppress(Gone):
            self.ask(lambda: self.client.abort(self.name, key, upload))

    def ask(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except (MinioException, HTTPError, OSError, ValueError) as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> GodwitError:
        if isinstance(error, S3Error) and error.code not in _LATER:
            text = f"the object store ({self._where}) says {error.code}: {error.message}"
            kind = Gone if error.code in _ABSENT else Rejected
            return kind(Reason.ARCHIVE_STORE, text)
        if isinstance(error, MaxRetryError) and isinstance(error.reason, SSLError):
            text = f"TLS with the object store ({self._where}) fails: {error.reason}; see ca.crt"
            return Rejected(Reason.ARCHIVE_STORE, text)
        if isinstance(error, (S3Error, ServerError, HTTPError, OSError)):
            text = f"the object store ({self._where}) does not answer: {error}"
            return Retryable(Reason.ARCHIVE_STORE_UNREACHABLE, text, delay_seconds=5.0)
        return Rejected(Reason.ARCHIVE_STORE, f"no object store is at {self._where}: {error}")


class ObjectStore:
    """The ``Archives`` of one bucket and prefix."""

    def __init__(self, store: Store, part_bytes: int = _PART_BYTES) -> None:
        self._prefix = store.prefix
        self._part_bytes = part_bytes
        self._bucket = _Bucket(store)

    def place(self, namespace: str, name: str) -> str:
        return f"s3://{self._bucket.name}/{self._key(namespace, name)}"

    def exists(self, namespace: str, name: str) -> bool:
        return self._bucket.stat(self._key(namespace, name)) is not None

    def begin(self, namespace: str, name: str, size: int) -> Upload:
        key, bucket = self._key(namespace, name), self._bucket
        needed = -(-(size + size // 4) // (_MAX_PARTS * _MIB)) * _MIB
        upload = bucket.ask(lambda: bucket.client.begin(bucket.name, key))
        there_is = exists_already(namespace, name)
        return Upload(bucket, key, upload, max(self._part_bytes, needed), there_is)

    @contextlib.contextmanager
    def read(self, namespace: str, name: str) -> Iterator[Download]:
        key = self._key(namespace, name)
        about = self._bucket.stat(key)
        if about is None:
            message = f"there is no archive {self.place(namespace, name)}"
            raise Rejected(Reason.ARCHIVE_NOT_FOUND, message)
        download = Download(self._bucket, key, *about)
        try:
            yield download
        finally:
            download.close()

    def clean(self, namespace: str, name: str) -> None:
        key, bucket = self._key(namespace, name), self._bucket
        for upload in bucket.ask(lambda: bucket.client.unfinished(bucket.name, key)):
            bucket.abort(key, upload)

    def _key(self, namespace: str, name: str) -> str:
        path = archive_path(namespace, name)
        return f"{self._prefix}/{path}" if self._prefix else path


class Upload:
    """A ``Draft``; a part goes in a thread of its own while the next one fills."""

    def __init__(
        self, bucket: _Bucket, key: str, upload: str, part_bytes: int, there_is: Rejected
    ) -> None:
        self._bucket, self._key, self._upload = bucket, key, upload
        self._part_bytes = part_bytes
        self._there_is = there_is
        self._buffer = bytearray()
        self._written = self._parts = 0
        self._tags: list[str] = []
        self._sending: Future[str] | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._over = False

    def write(self, data: bytes) -> int:
        self._buffer += data
        self._written += len(data)
        while len(self._buffer) >= self._part_bytes:
            self._send(self._part_bytes)
        return len(data)

    def tell(self) -> int:
        return self._written

    def commit(self) -> None:
        if self._buffer or not self._parts:
            self._send(len(self._buffer))
        self._await_part()
        try:
            self._bucket.ask(self._complete)
        except Retryable:
            if not self._landed():  # an answer may get lost
                raise
        if not self._landed():
            message = f"s3://{self._bucket.name}/{self._key} is not what was sent"
            raise Rejected(Reason.ARCHIVE_STORE, message)
        self._over = True
        self._worker.shutdown()

    def discard(self) -> None:
        if self._over:
            return
        self._over = True
        self._worker.shutdown(cancel_futures=True)  # a part that comes after the end would stay
        try:
            self._bucket.abort(self._key, self._upload)
        except GodwitError as error:
            log.error("upload not aborted", object=self._key, upload=self._upload, error=error)

    def _send(self, size: int) -> None:
        data = bytes(memoryview(self._buffer)[:size])
        del self._buffer[:size]
        self._await_part()
        self._parts += 1
        self._sending = self._worker.submit(self._part, self._parts, data)

    def _part(self, number: int, data: bytes) -> str:
        bucket = self._bucket
        return bucket.ask(
            lambda: bucket.client.part(bucket.name, self._key, self._upload, number, data)
        )

    def _await_part(self) -> None:
        sending, self._sending = self._sending, None
        if sending:
            self._tags.append(sending.result())

    def _complete(self) -> None:
        client, bucket = self._bucket.client, self._bucket.name
        try:
            client.complete(bucket, self._key, self._upload, self._tags, guarded=True)
        except S3Error as error:
            if error.code in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise self._there_is from error
            if error.code != "NotImplemented":
                raise
            # a store without conditional requests: looking has to do
            if self._bucket.stat(self._key) is not None:
                raise self._there_is from error
            client.complete(bucket, self._key, self._upload, self._tags, guarded=False)

    def _landed(self) -> bool:
        """Whether the object is there, and of these parts."""
        about = self._bucket.stat(self._key)
        if about is None or about[0] != self._written:
            return False
        expected = _tag_of(self._tags)
        return expected is None or about[1] == expected


class Download:
    """An ``Archive``, over as many connections as it takes."""

    def __init__(self, bucket: _Bucket, key: str, size: int, tag: str) -> None:
        self._bucket, self._key = bucket, key
        self._size, self._tag = size, tag
        self._at = 0
        self._body: Any = None

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        parts = []
        wanted = min(size, self._size - self._at)
        failures = 0
        while wanted:
            try:
                data = self._some(wanted)
            except Retryable:
                self.close()
                failures += 1
                if failures > _REOPEN:
                    raise
                continue
            parts.append(data)
            wanted -= len(data)
            self._at += len(data)
        return b"".join(parts)

    def close(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            body.close()
            body.release_conn()

    def _some(self, wanted: int) -> bytes:
        def ask() -> bytes:
            if self._body is None:
                self._body = self._open()
            data: bytes = self._body.read(wanted)
            if not data:
                raise OSError("the connection was closed early")
            return data

        return self._bucket.ask(ask)

    def _open(self) -> Any:
        client, bucket = self._bucket.client, self._bucket.name
        same: _Words = {"If-Match": f'"{self._tag}"'}
        try:
            return client.get_object(bucket, self._key, offset=self._at, request_headers=same)
        except S3Error as error:
            if error.code not in ("PreconditionFailed", *_ABSENT):
                raise
            message = f"s3://{bucket}/{self._key} was replaced or removed while it was read"
            raise Rejected(Reason.ARCHIVE_DAMAGED, message) from error


def _client(store: Store) -> _Client:
    scheme, _, host = store.endpoint.partition("://")
    try:
        trust = ssl.create_default_context(cadata=store.ca_pem or None)
        pool = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=_CONNECT_S, read=_READ_S),
            retries=urllib3.Retry(
                total=3, backoff_factor=0.2, status_forcelist=(500, 502, 503, 504)
            ),
            ssl_context=trust,
        )
        return _Client(
            host,
            access_key=store.access_key,
            secret_key=store.secret_key,
            secure=scheme == "https",
            region=store.region,
            http_client=pool,
        )
    except (ValueError, ssl.SSLError) as error:
        message = f"no object store can be reached as {store.endpoint} with this ca.crt: {error}"
        raise Rejected(Reason.ARCHIVE_STORE, message) from error


def _tag_of(tags: list[str]) -> str | None:
    """Entity tag of an object of these parts where tags are MD5 sums; None where they are not."""
    try:
        sums = [bytes.fromhex(tag) for tag in tags]
    except ValueError:
        return None
    if any(len(one) != 16 for one in sums):
        return None
    return f"{hashlib.md5(b''.join(sums), usedforsecurity=False).hexdigest()}-{len(tags)}"
