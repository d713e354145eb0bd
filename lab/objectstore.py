"""A server that speaks S3 (versitygw over a directory), wherever a test wants it.

It has a root account, which makes buckets, and a user who may do in one bucket what
docs/checkpoint.md says that Godwit needs, and nothing else.
"""

from __future__ import annotations

import json
import os
import secrets
import ssl
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import urllib3
from minio import Minio

from godwit_testbed import build

BUCKET = "archives"
PREFIX = "one"
USER = "godwit"
_ADMIN = "root"
_START_S = 20.0
ROOT = Path(__file__).parents[1]
# As docs/checkpoint.md has it.
ACTIONS_OF_OBJECTS = (
    "s3:GetObject",
    "s3:PutObject",
    "s3:AbortMultipartUpload",
)
ACTIONS_OF_BUCKET = ("s3:ListBucket", "s3:ListBucketMultipartUploads")


def policy() -> str:
    """What the user may do."""
    bucket = f"arn:aws:s3:::{BUCKET}"
    rules = ((ACTIONS_OF_OBJECTS, f"{bucket}/{PREFIX}/*"), (ACTIONS_OF_BUCKET, bucket))
    return json.dumps(
        {
            "Version": "2012-10-17",
            "Statement": [
                {
                    "Effect": "Allow",
                    "Principal": {"AWS": [USER]},
                    "Action": list(actions),
                    "Resource": [resource],
                }
                for actions, resource in rules
            ],
        }
    )


@dataclass(frozen=True)
class Certificate:
    """Of the server, for its address; ``authority`` has signed it. All PEM."""

    certificate: bytes
    key: bytes
    authority: bytes


class Server:
    """``enter``: words before a command that make it run where clients can reach ``address``."""

    def __init__(
        self,
        directory: Path,
        address: str,
        enter: Sequence[str] = (),
        certificate: Certificate | None = None,
    ) -> None:
        self.directory = directory
        self.address = address
        self.ca_pem = certificate.authority.decode() if certificate else ""
        self.secret = secrets.token_hex(16)
        self._admin_secret = secrets.token_hex(16)
        self._enter = tuple(enter)
        self._program = str(build.object_store())
        self._process: subprocess.Popen[bytes] | None = None
        self._tls: tuple[str, ...] = ()
        for name in ("data", "users"):
            (directory / name).mkdir(parents=True)
        if certificate:
            (directory / "tls.crt").write_bytes(certificate.certificate)
            (directory / "tls.key").write_bytes(certificate.key)
            self._tls = (f"--cert={directory}/tls.crt", f"--key={directory}/tls.key")

    @property
    def endpoint(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.address}"

    def start(self) -> None:
        """Returns when it answers, with its bucket and user."""
        self._spawn()
        self._run(
            *(self._program, "admin", "--allow-insecure", f"--endpoint-url={self.endpoint}"),
            *(f"--access={_ADMIN}", f"--secret={self._admin_secret}", "create-user"),
            *(f"--access={USER}", f"--secret={self.secret}", "--role=user"),
        )
        self._run(
            *(sys.executable, "-m", "lab.objectstore"),
            stdin=json.dumps([self.address, _ADMIN, self._admin_secret, self.ca_pem]),
        )

    def stop(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()  # it would wait for its clients
            process.wait(10)

    def start_again(self) -> None:
        self._spawn()

    def objects(self) -> list[str]:
        """Keys of all complete objects."""
        root = self.directory / "data" / BUCKET
        return sorted(
            str(path.relative_to(root))
            for path in root.rglob("*")
            if path.is_file() and not path.relative_to(root).parts[0].startswith(".sgwtmp")
        )

    def unfinished(self) -> list[str]:
        """What uploads that have not been completed have left."""
        root = self.directory / "data" / BUCKET / ".sgwtmp" / "multipart"
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    def object(self, key: str) -> Path:
        """The file that holds its bytes."""
        return self.directory / "data" / BUCKET / key

    def _spawn(self) -> None:
        environment = {
            **os.environ,
            "ROOT_ACCESS_KEY": _ADMIN,
            "ROOT_SECRET_KEY": self._admin_secret,
        }
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *self._enter, self._program, f"--port={self.address}", "--quiet",
                    f"--iam-dir={self.directory}/users", *self._tls,
                    "posix", f"{self.directory}/data",
                ],
                stdout=log, stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip
        end = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError((self.directory / "log").read_text()[-2000:])
            time.sleep(0.05)

    def _answers(self) -> bool:
        host, _, port = self.address.rpartition(":")
        probe = f"exec 3<>/dev/tcp/{host}/{port}"
        done = subprocess.run([*self._enter, "bash", "-c", probe], capture_output=True, check=False)
        return done.returncode == 0

    def _run(self, *words: str, stdin: str = "") -> None:
        done = subprocess.run(
            [*self._enter, *words],
            input=stdin,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{words[:3]}: {done.stdout}{done.stderr}")


def _make_bucket(address: str, access: str, secret: str, ca_pem: str) -> None:
    trust = ssl.create_default_context(cadata=ca_pem) if ca_pem else None
    client = Minio(
        address,
        access_key=access,
        secret_key=secret,
        secure=bool(ca_pem),
        http_client=urllib3.PoolManager(ssl_context=trust),
    )
    client.make_bucket(BUCKET)
    client.set_bucket_policy(BUCKET, policy())


if __name__ == "__main__":
    _make_bucket(*json.load(sys.stdin))
