"""Certificates of the cluster, made with the openssl command: one authority, one key each."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from godwit_testbed import shell
from godwit_testbed.paths import Place

_EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


@dataclass(frozen=True)
class Identity:
    """One certificate: file name, subject, names it serves under (``DNS:…``, ``IP:…``)."""

    name: str
    user: str
    group: str | None = None
    serves: tuple[str, ...] = ()


class Authority:
    """The cluster's certificate authority in ``<run>/pki`` (0700)."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.directory = place.run / "pki"

    def path(self, name: str) -> Path:
        """A file of the authority, e.g. ``ca.crt``."""
        return self.directory / name

    def create(self) -> None:
        """Make the authority and the service-account key."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        shell.run(
            "openssl",
            "req",
            "-x509",
            *_EC,
            "-days",
            "3650",
            "-subj",
            "/CN=testbed",
            "-keyout",
            self.path("ca.key"),
            "-out",
            self.path("ca.crt"),
            "-addext",
            "keyUsage=critical,keyCertSign,cRLSign,digitalSignature",
        )
        shell.run("openssl", "genrsa", "-out", self.path("sa.key"), "2048")
        shell.run(
            "openssl", "rsa", "-in", self.path("sa.key"), "-pubout", "-out", self.path("sa.pub")
        )

    def issue(self, identity: Identity) -> None:
        """Make ``<name>.crt`` and ``<name>.key``; the user and group are Kubernetes' own."""
        subject = f"/O={identity.group}" if identity.group else ""
        subject += f"/CN={identity.user}"
        alternative = f"subjectAltName={','.join(identity.serves)}"
        names = ("-addext", alternative) if identity.serves else ()
        shell.run(
            "openssl",
            "req",
            "-x509",
            *_EC,
            "-days",
            "3650",
            "-subj",
            subject,
            "-CA",
            self.path("ca.crt"),
            "-CAkey",
            self.path("ca.key"),
            "-keyout",
            self.path(f"{identity.name}.key"),
            "-out",
            self.path(f"{identity.name}.crt"),
            "-addext",
            "basicConstraints=critical,CA:FALSE",
            "-addext",
            "keyUsage=critical,digitalSignature,keyEncipherment",
            "-addext",
            "extendedKeyUsage=clientAuth,serverAuth",
            *names,
        )

    def kubeconfig(self, name: str) -> Path:
        """Kubeconfig with the certificate ``name``; everything is inside the one file."""

        def data(file: str) -> str:
            return base64.b64encode(self.path(file).read_bytes()).decode()

        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "testbed",
                    "cluster": {
                        "server": f"https://{self._place.api_address}:6443",
                        "certificate-authority-data": data("ca.crt"),
                    },
                }
            ],
            "users": [
                {
                    "name": name,
                    "user": {
                        "client-certificate-data": data(f"{name}.crt"),
                        "client-key-data": data(f"{name}.key"),
                    },
                }
            ],
            "contexts": [{"name": "testbed", "context": {"cluster": "testbed", "user": name}}],
            "current-context": "testbed",
        }
        path = self._place.kubeconfig(name)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_text(json.dumps(config))
        path.chmod(0o600)
        return path


def identities(place: Place, nodes: dict[str, str]) -> list[Identity]:
    """Every certificate of a cluster; ``nodes`` maps worker names to addresses."""
    first_service = place.service_cidr.removesuffix("0/20") + "1"
    api_names = tuple(
        f"DNS:kubernetes{suffix}"
        for suffix in ("", ".default", ".default.svc", ".default.svc.cluster.local")
    )
    result = [
        Identity("admin", "admin", "system:masters"),
        Identity(
            "apiserver",
            "kube-apiserver",
            serves=(*api_names, f"IP:{place.api_address}", f"IP:{first_service}"),
        ),
        Identity("apiserver-kubelet", "kube-apiserver-kubelet-client", "system:masters"),
        Identity("etcd", "etcd", serves=("IP:127.0.0.1",)),
        Identity("kube-controller-manager", "system:kube-controller-manager"),
        Identity("kube-scheduler", "system:kube-scheduler"),
        Identity("kube-proxy", "system:kube-proxy"),
    ]
    for node, address in nodes.items():
        result.append(
            Identity(
                f"node-{node}",
                f"system:node:{node}",
                "system:nodes",
                (f"DNS:{node}", f"IP:{address}"),
            )
        )
    return result
