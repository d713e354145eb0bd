"""The cluster that demo, tests and benchmark work on, through the testbed's command line."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTBED = ROOT / "testbed" / "testbed"
SYSTEM_NAMESPACE = "godwit-system"
BASE_IMAGE = "godwit.local/debian:forky"
LAB_IMAGE = "godwit.local/lab:dev"
Names = list[str]
TERMINAL_PHASES = frozenset({"Succeeded", "Rejected", "Aborted", "Stalled"})


class CommandFailed(RuntimeError):
    """A command of the testbed ended with an error; the message has its last output."""


class Counter:
    """A running :mod:`lab.client`; collects its ticks and its report."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.ticks: list[dict[str, Any]] = []
        self.report: dict[str, Any] | None = None
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if message["type"] == "tick":
                self.ticks.append(message)
            else:
                self.report = message
            self._first.set()

    def wait_started(self, timeout: float = 30.0) -> None:
        """Return when the first tick has come."""
        if not self._first.wait(timeout):
            raise CommandFailed("the client has not come up")
        if self.report is not None:
            raise CommandFailed(f"the client ended at once: {self.report}")

    def close(self) -> None:
        """End the client whatever it does."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(30)
        self._thread.join(30)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()

    def stop(self, timeout: float = 90.0) -> dict[str, Any]:
        """End the client and return its report."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout)
        self._thread.join(timeout)
        if self.report is None:
            raise CommandFailed(f"the client left no report (exit {self._process.returncode})")
        return self.report


class Cluster:
    """One testbed with Godwit on it."""

    def __init__(self, name: str | None = None, *, tag: str | None = None) -> None:
        """``tag`` of the images that it makes: its own name if no other."""
        self.name = name or os.environ.get("GODWIT_TESTBED", "godwit")
        self._tag = tag or self.name
        self._built: set[str] = set()

    # -- commands -----------------------------------------------------------------------------
    def argv(self, *words: str) -> list[str]:
        """Command line of the testbed for this cluster."""
        return [str(TESTBED), words[0], "--name", self.name, *words[1:]]

    def run(self, *words: str, stdin: str | None = None, check: bool = True) -> str:
        """Run one testbed command and return what it printed."""
        done = subprocess.run(
            self.argv(*words), input=stdin, capture_output=True, text=True, check=False
        )
        if check and done.returncode:
            tail = (done.stderr or done.stdout).strip()[-3000:]
            raise CommandFailed(f"testbed {' '.join(words)} (exit {done.returncode}): {tail}")
        return done.stdout

    def kubectl(self, *words: str, stdin: str | None = None, check: bool = True) -> str:
        """Run kubectl as cluster administrator."""
        return self.run("kubectl", *words, stdin=stdin, check=check)

    def get(self, kind: str, name: str, namespace: str = "default") -> dict[str, Any]:
        """One object; raises :class:`CommandFailed` when it is not there."""
        result = json.loads(self.kubectl("get", kind, name, "-n", namespace, "-o", "json"))
        assert isinstance(result, dict)
        return result

    def list(self, kind: str, namespace: str = "default", *words: str) -> list[dict[str, Any]]:
        """All objects of a kind in a namespace."""
        found = json.loads(self.kubectl("get", kind, "-n", namespace, "-o", "json", *words))
        items = found["items"]
        assert isinstance(items, list)
        return items

    def apply(self, *manifests: dict[str, Any]) -> None:
        """Apply manifests."""
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)})
        self.kubectl("apply", "-f", "-", stdin=text)

    def node_exec(self, node: str, *command: str, check: bool = True) -> str:
        """Run a command in all namespaces of a node."""
        return self.run("node", "exec", node, "--", *command, check=check)

    def outside_address(self) -> str:
        """IPv4 address of the place outside the cluster, as pods see it."""
        shown = self.run("client", "exec", "--", "ip", "-j", "-4", "address", "show", "br0")
        return str(json.loads(shown)[0]["addr_info"][0]["local"])

    # -- bringing up --------------------------------------------------------------------------
    def up(self, nodes: int = 2, cni: str = "ptp", *, dual_stack: bool = False) -> None:
        """Bring the testbed up, showing its progress."""
        more = ["--dual-stack"] if dual_stack else []
        self._show("up", "--nodes", str(nodes), "--cni", cni, *more)

    def down(self) -> None:
        """Remove the testbed."""
        self._show("down")
        self._built.clear()

    def reboot(self) -> None:
        """Cut the power of all nodes and start them; return when Godwit runs again on them."""
        begin = datetime.now(UTC)
        self._show("reboot")
        end = time.monotonic() + 180
        while waits := [
            f"{pod['metadata']['name']}: {status['state']}"
            for pod in self.list("pods", SYSTEM_NAMESPACE)
            for status in pod["status"]["containerStatuses"]
            # What is said of a container may be from before.
            if not status["ready"]
            or datetime.fromisoformat(status["state"]["running"]["startedAt"]) < begin
        ]:
            if time.monotonic() > end:
                raise CommandFailed(f"after the reboot: {waits}")
            time.sleep(0.5)
        for node in self.ready_nodes():
            # An agent is ready before it has its certificate; then it listens (port 9460).
            while self.node_exec(node, "ss", "-Hltn", "sport = :9460", check=False) == "":
                if time.monotonic() > end:
                    raise CommandFailed(f"after the reboot the agent of {node} does not listen")
                time.sleep(0.5)

    def _show(self, *words: str) -> None:
        if subprocess.run(self.argv(*words), check=False).returncode:
            raise CommandFailed(f"testbed {' '.join(words)} failed, see above")

    def _images(self) -> dict[str, tuple[str, str | None]]:
        """Tag: (build context, target). The product's tags are one's own, so that several
        working copies can build side by side."""
        return {
            f"godwit.local/godwit-operator:{self._tag}": (".", "operator"),
            f"godwit.local/godwit-node-agent:{self._tag}": (".", "node-agent"),
            LAB_IMAGE: ("lab", None),
        }

    def workload_image(self, directory: str) -> str:
        """Tag of the image that ``lab/<directory>`` describes; built and loaded once a run."""
        tag = f"godwit.local/lab-{directory}:{self._tag}"
        as_is = os.environ.get("GODWIT_E2E_AS_IS") and self._has(tag)
        if tag not in self._built and not as_is:
            self._build(tag, f"lab/{directory}", None)
            self._built.add(tag)
        return tag

    def _build(self, tag: str, context: str, target: str | None) -> None:
        say(f"image {tag}")
        words = ["image", "build", "-t", tag, "--build-arg", f"BASE_IMAGE={BASE_IMAGE}"]
        if target:
            words += ["--target", target]
        self.run(*words, str(ROOT / context))
        self.run("image", "load", tag)

    def build_images(self) -> None:
        """Build the product's images and the lab's, and give them to every node."""
        for tag, (context, target) in self._images().items():
            self._build(tag, context, target)

    def install(self, *settings: str) -> None:
        """Install the chart and wait until operator and agents are ready.

        ``settings``: more values, as ``--set`` takes them.

        The images' digests go into the pods' annotations, so that a newer image under the
        same tag restarts them.
        """
        say("helm upgrade --install godwit charts/godwit")
        values = [word for setting in settings for word in ("--set", setting)]
        for value, image in (("operator", "godwit-operator"), ("nodeAgent", "godwit-node-agent")):
            tag = f"godwit.local/{image}:{self._tag}"
            values += [
                *("--set-string", f"images.{value}.tag={self._tag}"),
                *("--set-string", f"{value}.podAnnotations.image-digest={self._digest(tag)}"),
            ]
        self.run(
            *("helm", "upgrade", "--install", "godwit", str(ROOT / "charts" / "godwit")),
            *("--namespace", SYSTEM_NAMESPACE, "--create-namespace"),
            *("--values", str(ROOT / "charts" / "godwit" / "values-testbed.yaml")),
            *values,
            *("--wait", "--timeout", "5m"),
        )
        self.kubectl(
            *("wait", "node", "--for=condition=GodwitReady", "--timeout=120s"),
            *("-l", "!node-role.kubernetes.io/control-plane"),
        )

    def _has(self, tag: str) -> bool:
        return tag in self.node_exec("n1", "ctr", "-n", "k8s.io", "images", "ls", f"name=={tag}")

    def _digest(self, tag: str) -> str:
        listed = self.node_exec("n1", "ctr", "-n", "k8s.io", "images", "ls", f"name=={tag}")
        found = re.search(r"sha256:[0-9a-f]{64}", listed)
        if not found:
            raise CommandFailed(f"{tag} is not on n1: {listed}")
        return found[0]

    def ready_nodes(self) -> Names:
        """Names of the nodes that pods can move between, sorted."""
        found = self.list("nodes", "default", "-l", "godwit.io/node=ready")
        return sorted(item["metadata"]["name"] for item in found)

    def empty_namespace(self, name: str) -> None:
        """Make it, or make it anew."""
        self.kubectl("delete", "namespace", name, "--ignore-not-found", "--timeout=180s")
        self.kubectl("create", "namespace", name)

    # -- workloads ----------------------------------------------------------------------------
    def wait_ready(self, pod: str, namespace: str = "default", seconds: int = 120) -> None:
        """Wait until a pod is Ready."""
        self.kubectl("wait", "pod", pod, "-n", namespace, "--for=create", f"--timeout={seconds}s")
        self.kubectl(
            *("wait", "pod", pod, "-n", namespace, "--for=condition=Ready"),
            f"--timeout={seconds}s",
        )

    def fill(self, address: str, megabytes: int) -> None:
        """Put about ``megabytes`` MiB of values into the Redis at ``address``."""
        keys = megabytes * 1024 * 1024 // 1100
        answer = self.redis(address, "DEBUG", "POPULATE", str(keys), "data", "1000")
        if "OK" not in answer:
            raise CommandFailed(f"DEBUG POPULATE: {answer}")

    def redis(self, address: str, *words: str) -> str:
        """One Redis command from outside the cluster."""
        script = (
            "import socket,sys\n"
            "s=socket.create_connection((sys.argv[1],6379),timeout=60)\n"
            "w=[x.encode() for x in sys.argv[2:]]\n"
            "s.sendall(b'*%d\\r\\n'%len(w)+b''.join(b'$%d\\r\\n%s\\r\\n'%(len(x),x) for x in w))\n"
            "b=b''\n"
            "while not b.endswith(b'\\r\\n'):\n"
            "    c=s.recv(65536)\n"
            "    if not c: sys.exit('the server closed the connection')\n"
            "    b+=c\n"
            "sys.stdout.write(b.decode(errors='replace'))\n"
        )
        words = ("client", "exec", "--", sys.executable, "-c", script, address, *words)
        return self.run(*words).strip()

    def number(self, address: str, *words: str) -> int:
        """The answer to a command that answers with a number."""
        return int(self.redis(address, *words).lstrip(":"))

    @contextmanager
    def counter(self, address: str, what: str = "count", *words: str) -> Iterator[Counter]:
        """A client outside the cluster for as long as the block runs."""
        command = [sys.executable, str(ROOT / "lab" / "client.py"), what, address, "6379", *words]
        process = subprocess.Popen(
            self.argv("client", "exec", "--", *command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        client = Counter(process)
        try:
            client.wait_started()
            yield client
        finally:
            client.close()

    # -- migrations ---------------------------------------------------------------------------
    def watch_migration(
        self,
        name: str,
        namespace: str = "default",
        *,
        seconds: float = 180.0,
        seen: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Follow a PodMigration until it is final; ``seen`` gets every version of it."""
        process = subprocess.Popen(
            self.argv(
                *("kubectl", "get", "podmigration", name, "-n", namespace, "-o", "json"),
                *("--watch", "--output-watch-events"),
            ),
            stdout=subprocess.PIPE,
            text=True,
        )
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        last: dict[str, Any] = {}
        try:
            assert process.stdout is not None
            for event in json_stream(process.stdout):
                last = event["object"]
                if seen:
                    seen(last)
                if last.get("status", {}).get("phase") in TERMINAL_PHASES:
                    return last
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
        status = json.dumps(last.get("status", {}), indent=1)
        raise CommandFailed(
            f"PodMigration {namespace}/{name} is not final after {seconds} s: {status}"
        )


def json_stream(lines: Iterator[str] | Any) -> Iterator[dict[str, Any]]:
    """Objects of a stream of pretty-printed or compact JSON documents."""
    decoder = json.JSONDecoder()
    text = ""
    for line in lines:
        text += line
        while text := text.lstrip():
            try:
                document, end = decoder.raw_decode(text)
            except json.JSONDecodeError:
                break
            yield document
            text = text[end:]


_STARTED = time.monotonic()


def say(message: str) -> None:
    """One line of progress with the seconds since the start."""
    print(f"[{time.monotonic() - _STARTED:6.1f} s] {message}", flush=True)


def main() -> None:
    """``make cluster``: a standing testbed with the Godwit of this checkout on it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--name", help="testbed (default: $GODWIT_TESTBED or godwit)")
    parser.add_argument("--nodes", type=int, default=2)
    options = parser.parse_args()
    cluster = Cluster(options.name)
    cluster.up(options.nodes)
    cluster.build_images()
    cluster.install()
    say(f"testbed/testbed kubectl --name {cluster.name} get nodes")


if __name__ == "__main__":
    main()
