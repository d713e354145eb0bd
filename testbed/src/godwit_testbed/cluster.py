"""A whole cluster: brings it up in parallel, says how it is, removes every trace."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from godwit_testbed import build, cgroups, config, images, network, paths, pki, shell
from godwit_testbed.node import Node
from godwit_testbed.paths import Place, TestbedError

# The kernel's pipe limits: CRIU's lazy dump needs large pipes, and this machine may run
# without CAP_SYS_RESOURCE, which would lift them for root (pipe(7)).
_HOST_SYSCTLS = {
    "fs.pipe-user-pages-soft": "0",
    "fs.pipe-max-size": "16777216",
    "fs.inotify.max_user_instances": "8192",
    "fs.inotify.max_user_watches": "1048576",
}


class Cluster:
    """One testbed by name."""

    def __init__(self, place: Place) -> None:
        self.place = place

    # -- facts --------------------------------------------------------------------------------
    @property
    def _facts_file(self) -> Path:
        return self.place.run / "cluster.json"

    def facts(self) -> dict[str, object]:
        """What ``up`` was asked for, and whether it got there."""
        try:
            found: dict[str, object] = json.loads(self._facts_file.read_text())
        except FileNotFoundError:
            return {}
        return found

    def workers(self) -> list[Node]:
        """The worker nodes."""
        count = self.facts().get("nodes", 0)
        assert isinstance(count, int)
        return [Node(self.place, f"n{number}") for number in range(1, count + 1)]

    def node(self, name: str) -> Node:
        """A node by name (``cp``, ``n1`` …)."""
        known = ["cp", *(node.name for node in self.workers())]
        if name not in known:
            raise TestbedError(
                f"testbed {self.place.name} has the nodes {', '.join(known)}, not {name!r}"
            )
        return Node(self.place, name)

    def healthy(self) -> bool:
        """Whether the cluster was completed and all its nodes run."""
        return bool(self.facts().get("complete")) and all(
            node.pid for node in [Node(self.place, "cp"), *self.workers()]
        )

    # -- up -----------------------------------------------------------------------------------
    def up(self, *, nodes: int, version: str, cni: str, dual_stack: bool) -> None:
        """Bring the cluster up; returns when all nodes are Ready."""
        facts = {"nodes": nodes, "version": version, "cni": cni, "dual_stack": dual_stack}
        if self.healthy():
            have = {key: self.facts().get(key, False) for key in facts}
            if facts == have:
                shell.say(f"testbed {self.place.name} is up")
                return
            raise TestbedError(
                f"testbed {self.place.name} stands with {have}; "
                f"`testbed down --name {self.place.name}` first"
            )
        build.everything(version)
        self.down()
        self.place.run.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.place.run / "index").write_text(str(self.place.index))
        self._facts_file.write_text(json.dumps(facts))
        for key, value in _HOST_SYSCTLS.items():
            shell.run("sysctl", "-qw", f"{key}={value}")
        names = [node.name for node in self.workers()]
        shell.say(f"testbed {self.place.name}: Kubernetes {version}, nodes {', '.join(names)}")
        authority = pki.Authority(self.place)
        network.create(self.place, names)
        if dual_stack:
            network.create6(self.place, names)
        addresses = {name: network.node_address(self.place, name) for name in names}
        authority.create()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(authority.issue, pki.identities(self.place, addresses)))
        for name in (
            "admin",
            "kube-controller-manager",
            "kube-scheduler",
            "kube-proxy",
            *(f"node-{name}" for name in names),
        ):
            authority.kubeconfig(name)
        cp = Node(self.place, "cp")
        cp.prepare(*config.control_plane(self.place, authority, version, dual_stack=dual_stack))
        cp.start()
        with ThreadPoolExecutor() as pool:
            starting = [
                pool.submit(self._start_worker, node, version, cni, authority, dual_stack)
                for node in self.workers()
            ]
            self._await_api_server()
            self.kubectl("apply", "-f", "-", stdin=config.system_manifests(self.place))
            for future in starting:
                future.result()
        wait_for(
            "all nodes to be Ready",
            self._all_ready,
            hint=f"testbed logs n1 kubelet --name {self.place.name}",
        )
        self._facts_file.write_text(json.dumps({**facts, "complete": True}))
        shell.say(f"testbed {self.place.name}: all nodes Ready")

    # -- one node -----------------------------------------------------------------------------
    def crash(self, name: str) -> None:
        """The node loses its power: all its processes end at once, its memory is gone."""
        self.node(name).stop()

    def boot(self, name: str) -> None:
        """Start a node that has crashed: its disk is as it was, all else is new."""
        node = self.node(name)
        if node.pid is None:
            workers = [worker.name for worker in self.workers()]
            network.attach(self.place, name, workers)
            if self.facts().get("dual_stack"):
                network.attach6(self.place, name, workers)
            cgroups.remove(self.place, name)
            node.start()

    def reboot(self, names: list[str]) -> None:
        """Cut the power of these nodes at once, then start them on their disks.

        What was in memory is gone: processes, ``/run``, cgroups, the whole network namespace.
        Returns when all nodes are Ready, as their kubelets say after it.
        """
        nodes, workers = [self.node(name) for name in names], [one.name for one in self.workers()]
        with ThreadPoolExecutor() as pool:
            list(pool.map(Node.stop, nodes))
        for node in nodes:
            cgroups.remove(self.place, node.name)
            network.attach(self.place, node.name, workers)
        begin = datetime.now(UTC)
        with ThreadPoolExecutor() as pool:
            list(pool.map(Node.start, nodes))
        self._await_api_server()
        wait_for(
            "all nodes to be Ready",
            lambda: self._reported_since(begin, names) and self._all_ready(),
            hint=f"testbed logs n1 kubelet --name {self.place.name}",
        )

    def _await_api_server(self) -> None:
        wait_for(
            "the API server",
            lambda: "ok" in self.kubectl("get", "--raw", "/readyz"),
            hint=f"testbed logs cp kube-apiserver --name {self.place.name}",
        )

    def _reported_since(self, begin: datetime, names: list[str]) -> bool:
        """Whether the kubelets have renewed their leases; what a Node says may be from before."""
        found = json.loads(self.kubectl("get", "leases", "-n", "kube-node-lease", "-o", "json"))
        renewed = {
            item["metadata"]["name"]: datetime.fromisoformat(item["spec"]["renewTime"])
            for item in found["items"]
        }
        return all(renewed.get(name, begin) > begin for name in names if name != "cp")

    def _start_worker(
        self, node: Node, version: str, cni: str, authority: pki.Authority, dual_stack: bool
    ) -> None:
        node.prepare(
            *config.worker(self.place, node.name, authority, version, cni, dual_stack=dual_stack)
        )
        node.start()
        wait_for(
            f"containerd on {node.name}",
            lambda: "Server" in node.run("ctr", "version", check=False),
        )
        for file in images.system_images().values():
            images.load([node], file)

    def _all_ready(self) -> bool:
        found = json.loads(self.kubectl("get", "nodes", "-o", "json"))["items"]
        ready = [
            item
            for item in found
            for condition in item["status"].get("conditions", [])
            if condition["type"] == "Ready" and condition["status"] == "True"
        ]
        return len(ready) == len(self.workers())

    # -- use ----------------------------------------------------------------------------------
    def kubectl_argv(self, *words: str) -> list[str]:
        """kubectl as administrator, in the place outside the cluster."""
        binary = build.kubernetes(str(self.facts().get("version", build.DEFAULT_KUBERNETES)))
        return network.inside(
            self.place.netns("ext"),
            str(binary / "kubectl"),
            f"--kubeconfig={self.place.kubeconfig()}",
            *words,
        )

    def kubectl(self, *words: str, stdin: str | None = None, check: bool = True) -> str:
        """Run kubectl and return its output."""
        return shell.run(*self.kubectl_argv(*words), stdin=stdin, check=check)

    # -- down ---------------------------------------------------------------------------------
    def down(self) -> None:
        """Remove the testbed whatever state it is in; needs nothing but its name."""
        left = {
            file.name
            for base in (self.place.run / "pids", self.place.data)
            if base.is_dir()
            for file in base.iterdir()
        }
        nodes = [Node(self.place, name) for name in left]
        with ThreadPoolExecutor() as pool:
            list(pool.map(Node.stop, nodes))
        cgroups.remove(self.place)
        for node in nodes:
            node.remove()
        network.remove(self.place)
        shutil.rmtree(self.place.data, ignore_errors=True)
        shutil.rmtree(self.place.run, ignore_errors=True)
        for base in (paths.RUN, paths.DATA):
            if base.is_dir() and not any(base.glob("[!.]*")):
                shutil.rmtree(base, ignore_errors=True)


def wait_for(what: str, ready: Callable[[], bool], *, seconds: float = 90, hint: str = "") -> None:
    """Poll until ``ready``; other processes' readiness comes with no event we could await."""
    deadline = time.monotonic() + seconds
    last = ""
    while time.monotonic() < deadline:
        try:
            if ready():
                return
        except TestbedError as error:
            last = str(error)
        time.sleep(0.2)
    raise TestbedError(f"waited {seconds:.0f} s for {what}. {last} {hint and f'See `{hint}`'}")
