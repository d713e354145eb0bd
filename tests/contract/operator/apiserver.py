"""A real API server (and, on request, controllers) in a network namespace of its own.

Only loopback of that namespace is used; clients must be in it (``setns``).
"""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import time
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from godwit_testbed import build

ADDRESS = "10.255.0.1"
URL = f"https://{ADDRESS}:6443"


def missing() -> str | None:
    """Why no API server can be started here; None if one can."""
    if os.geteuid() != 0:
        return "needs root for a network namespace"
    return None


def binary(name: str) -> Path:
    """A program of the testbed's cache, built on first use."""
    build.prerequisites()
    return build.node_root() / "usr/bin/etcd" if name == "etcd" else build.kubernetes() / name


class ApiServer:
    """etcd, kube-apiserver, and controllers by name."""

    def __init__(self, directory: Path, netns: str) -> None:
        self.directory = directory
        self.netns = netns
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        subprocess.run(["ip", "netns", "add", self.netns], check=True)
        self.inside(["ip", "link", "set", "lo", "up"])
        self.inside(["ip", "address", "add", f"{ADDRESS}/32", "dev", "lo"])
        self._credentials()
        d = self.directory
        self._spawn(
            "etcd",
            [
                str(binary("etcd")),
                f"--data-dir={d}/etcd",
                "--listen-client-urls=http://127.0.0.1:2379",
                "--advertise-client-urls=http://127.0.0.1:2379",
                "--listen-peer-urls=http://127.0.0.1:2380",
                "--unsafe-no-fsync",
            ],
        )
        self._spawn(
            "apiserver",
            [
                str(binary("kube-apiserver")),
                "--etcd-servers=http://127.0.0.1:2379",
                f"--bind-address={ADDRESS}",
                f"--advertise-address={ADDRESS}",
                "--secure-port=6443",
                "--service-cluster-ip-range=10.96.0.0/16",
                "--authorization-mode=Node,RBAC",
                "--feature-gates=MutablePVNodeAffinity=true",
                "--disable-admission-plugins=ServiceAccount",
                f"--client-ca-file={d}/ca.crt",
                f"--tls-cert-file={d}/server.crt",
                f"--tls-private-key-file={d}/server.key",
                f"--service-account-key-file={d}/sa.key",
                f"--service-account-signing-key-file={d}/sa.key",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--kubelet-client-certificate={d}/admin.crt",
                f"--kubelet-client-key={d}/admin.key",
            ],
        )
        deadline = time.monotonic() + 60
        while self.kubectl("get", "--raw", "/readyz", check=False) != "ok":
            if time.monotonic() > deadline:
                log = (d / "apiserver.log").read_text()[-2000:]
                raise TimeoutError(f"kube-apiserver does not come up: {log}")
            time.sleep(0.2)

    def controllers(self, *names: str) -> None:
        d = self.directory
        self._spawn(
            "controllers",
            [
                str(binary("kube-controller-manager")),
                f"--kubeconfig={d}/kubeconfig",
                f"--controllers={','.join(names)}",
                f"--service-account-private-key-file={d}/sa.key",
                "--leader-elect=false",
            ],
        )

    def scheduler(self) -> None:
        self._spawn(
            "scheduler",
            [
                str(binary("kube-scheduler")),
                f"--kubeconfig={self.directory}/kubeconfig",
                "--leader-elect=false",
            ],
        )

    def kubectl(self, *words: str, stdin: str | None = None, check: bool = True) -> str:
        done = subprocess.run(
            [
                *("nsenter", f"--net=/run/netns/{self.netns}"),
                *(str(binary("kubectl")), f"--kubeconfig={self.directory}/kubeconfig"),
                *words,
            ],
            input=stdin,
            text=True,
            capture_output=True,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout if not done.returncode else done.stderr

    def stop(self) -> None:
        for process in reversed(self._processes):  # nothing of them is kept
            process.kill()
            process.wait()
        subprocess.run(["ip", "netns", "del", self.netns], check=False)
        shutil.rmtree(self.directory / "etcd", ignore_errors=True)

    def inside(self, command: list[str]) -> None:
        subprocess.run(["nsenter", f"--net=/run/netns/{self.netns}", *command], check=True)

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.directory / f"{name}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    ["nsenter", f"--net=/run/netns/{self.netns}", *command],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )

    def _credentials(self) -> None:
        d = self.directory
        now = datetime.datetime.now(datetime.UTC)
        authority_key = ec.generate_private_key(ec.SECP256R1())

        def issue(name: str, organization: str, *, authority: bool = False) -> None:
            key = authority_key if authority else ec.generate_private_key(ec.SECP256R1())
            subject = x509.Name(
                [
                    x509.NameAttribute(NameOID.COMMON_NAME, name),
                    x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
                ]
            )
            issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")])
            builder = (
                x509.CertificateBuilder()
                .subject_name(issuer if authority else subject)
                .issuer_name(issuer)
                .public_key(key.public_key())
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - datetime.timedelta(hours=1))
                .not_valid_after(now + datetime.timedelta(days=2))
                .add_extension(x509.BasicConstraints(ca=authority, path_length=None), True)
            )
            if authority:
                usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
                builder = builder.add_extension(usage, True)
            else:
                import ipaddress

                builder = builder.add_extension(
                    x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(ADDRESS))]),
                    False,
                )
            certificate = builder.sign(authority_key, hashes.SHA256())
            (d / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
            (d / f"{name}.key").write_bytes(_pem(key))

        issue("ca", "", authority=True)
        issue("server", "")
        issue("admin", "system:masters")
        (d / "sa.key").write_bytes(_pem(rsa.generate_private_key(65537, 2048)))
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "x",
            "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
            "clusters": [
                {
                    "name": "x",
                    "cluster": {"server": URL, "certificate-authority": str(d / "ca.crt")},
                }
            ],
            "users": [
                {
                    "name": "x",
                    "user": {
                        "client-certificate": str(d / "admin.crt"),
                        "client-key": str(d / "admin.key"),
                    },
                }
            ],
        }
        (d / "kubeconfig").write_text(yaml.safe_dump(config))


def _pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
