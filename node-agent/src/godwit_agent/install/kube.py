"""The few calls to the API server that the installer needs, with the pod's own token."""

from __future__ import annotations

import json
import os
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"


class Api:
    """One API server, in cluster."""

    def __init__(self) -> None:
        host = os.environ["KUBERNETES_SERVICE_HOST"]
        port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        self._base = f"https://{host}:{port}"
        self._context = ssl.create_default_context(cafile=str(_ACCOUNT / "ca.crt"))

    def call(
        self, method: str, path: str, body: Any = None, content: str = "application/json"
    ) -> Any:
        """One request; raises ``urllib.error.HTTPError`` with the server's words."""
        request = urllib.request.Request(  # noqa: S310 - always the API server's own address
            self._base + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": f"Bearer {(_ACCOUNT / 'token').read_text().strip()}",
                "Content-Type": content,
                "Accept": "application/json",
            },
        )
        with urllib.request.urlopen(request, context=self._context, timeout=15) as answer:  # noqa: S310
            return json.loads(answer.read() or b"null")

    def missing(self, path: str) -> bool:
        """Whether an object is not there."""
        try:
            self.call("GET", path)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return True
            raise
        return False
