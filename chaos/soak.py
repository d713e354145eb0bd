"""``make soak``: a pod moves back and forth for hours, and every minute something breaks.

Results as JSON lines in ``chaos/results/soak.jsonl``: one ``begin``, one ``minute`` each with its
moves, its fault, what was seen and counted, one ``end``; ``python -m chaos.soakreport`` makes the
section of docs/reliability.md. Exit status 1 if anything was violated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from chaos import samples
from chaos.commit import commit
from chaos.copies import Copies
from chaos.faults import FAULTS, Fault, criu_hunted
from chaos.stage import NAMESPACE, Stage
from lab import workloads
from lab.cluster import ROOT, SYSTEM_NAMESPACE, Cluster, CommandFailed, Counter, say
from lab.debris import wait_clean

RESULTS = Path(__file__).parent / "results" / "soak.jsonl"
POD, APP = "mover-0", "mover"
MEBIBYTES, RATE = 64, 20  # of the process's memory, and what it writes a second
_PORT = 9999
_MINUTE_S, _MOVING_S = 60.0, 45.0  # the rest of a minute is for counting
_END_S, _CLEAN_S, _RECOVER_S = 240.0, 120.0, 180.0
_GRACE_S = 5.0  # after a recovery as seen from outside, the operator may not have seen it
_SILENCE_MS = 60_000.0

KILLS = ("kill operator", "kill source agent", "kill target agent")
"""Of the first half only: in the second each process lives long enough to be seen growing."""
OTHERS = (
    "restart kubelet of the source",
    "restart kubelet of the target",
    "restart containerd of the source",
    "restart containerd of the target",
    "kill CRIU",
    "cut the agents' link for 5 s",
    "API server away for 10 s",
    "delete the migration",
)


def schedule(seed: int) -> Iterator[tuple[str, str, float]]:
    """For each minute: the fault in the first half, the fault in the second half, seconds into
    the minute; the same for the same seed."""
    chance = random.Random(seed)
    while True:
        yield chance.choice(KILLS + OTHERS), chance.choice(OTHERS), chance.uniform(2, 30)


class Listener:
    """chaos/listener.py outside the cluster; what it has said so far."""

    def __init__(self, cluster: Cluster) -> None:
        self.wrong: list[str] = []
        self.moves: list[str] = []
        self.last: dict[str, Any] = {}
        self._process = subprocess.Popen(
            cluster.argv(
                *("client", "exec", "--", sys.executable),
                *(str(ROOT / "chaos" / "listener.py"), str(_PORT)),
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            said = json.loads(line)
            if said["type"] == "wrong":
                self.wrong.append(said["what"])
            elif said["type"] == "move":
                self.moves.append(said["node"])
            else:
                self.last = said

    def close(self) -> None:
        """End it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)
        self._thread.join(30)


class Trouble:
    """Does the fault of each minute, and knows whether one is in force or not yet got over."""

    def __init__(self, soak: Soak) -> None:
        self._soak = soak
        self._lock = threading.Lock()
        self._until = 0.0
        self.problem = ""

    def excuses(self, begun: float) -> bool:
        """Whether a migration that has begun then may have met a fault."""
        with self._lock:
            return begun < self._until

    def make(self, name: str, after_s: float) -> threading.Thread:
        """In so many seconds, in a thread."""
        thread = threading.Thread(target=self._make, args=(name, after_s), daemon=True)
        thread.start()
        return thread

    def _make(self, name: str, after_s: float) -> None:
        time.sleep(after_s)
        with self._lock:
            self._until = float("inf")
        try:
            fault: Fault = criu_hunted if name == "kill CRIU" else FAULTS[name]
            with contextlib.suppress(CommandFailed), fault(self._soak.stage()):
                pass  # e.g. the migration to delete has just gone by itself
            self.problem = self._soak.recovered()
        except Exception as error:  # whatever it is has to be in the results
            self.problem = f"the fault: {type(error).__name__}: {error}"
        with self._lock:
            self._until = time.monotonic() + _GRACE_S


class Soak:
    """The workload, who watches it, and what has been found."""

    def __init__(self, cluster: Cluster, nodes: list[str]) -> None:
        self.cluster, self.nodes = cluster, nodes
        self.address = ""
        self.here = nodes[0]
        self.migration = "none"
        self.moves = 0
        self.trouble = Trouble(self)

    # -- the scene ----------------------------------------------------------------------------
    def stage(self) -> Stage:
        """Where things are now."""
        other = next(node for node in self.nodes if node != self.here)
        return Stage(self.cluster, self.here, other, self.address, self.migration)

    def start(self) -> None:
        """The pod, writing to its memory and telling numbers."""
        image = self.cluster.workload_image("dirtier")
        pod = workloads.dirtier(APP, NAMESPACE, image, MEBIBYTES, node=self.nodes[0])
        template = {"metadata": {"labels": {"app": APP}}, "spec": pod["spec"]}
        spec = {
            "serviceName": APP,
            "replicas": 1,
            "selector": {"matchLabels": {"app": APP}},
            "template": template,
        }
        meta = {"name": APP, "namespace": NAMESPACE}
        owner = {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": meta, "spec": spec}
        self.cluster.apply(workloads.service(APP, NAMESPACE), owner)
        self.cluster.wait_ready(POD, NAMESPACE)
        found = self.cluster.get("pod", POD, NAMESPACE)
        self.address, self.here = found["status"]["podIP"], found["spec"]["nodeName"]
        self.cluster.redis(self.address, "RATE", str(RATE))
        self.cluster.redis(self.address, "TELL", self.cluster.outside_address(), str(_PORT))

    def recovered(self) -> str:
        """Waits until operator, agents and nodes are there again; empty, or what is not."""
        wanted = 1 + len(self.nodes)
        deadline = time.monotonic() + _RECOVER_S
        while len(samples.processes(self.cluster.name)) < wanted:
            if time.monotonic() > deadline:
                return f"operator and agents have not come back in {_RECOVER_S:.0f} s"
            time.sleep(0.2)
        time.sleep(2)  # so that the kubelet has told that a container had ended
        waits = (
            ("wait", "node", "--all", "--for=condition=Ready"),
            ("wait", "pods", "--all", "-n", SYSTEM_NAMESPACE, "--for=condition=Ready"),
            ("wait", "pod", POD, "-n", NAMESPACE, "--for=condition=Ready"),
        )
        for words in waits:
            if wrong := self._patiently(partial(self._wait, words), deadline):
                return wrong
        return ""

    def _wait(self, words: tuple[str, ...]) -> None:
        self.cluster.kubectl(*words, "--timeout=60s")

    def _patiently(self, work: Callable[[], object], deadline: float) -> str:
        """``work`` until it succeeds; the error when the time is over."""
        while True:
            try:
                work()
            except (CommandFailed, json.JSONDecodeError) as error:
                if time.monotonic() > deadline:
                    return str(error)
                time.sleep(1)
            else:
                return ""

    # -- one move -----------------------------------------------------------------------------
    def move(self) -> dict[str, Any]:
        """One migration to the other node; what has become of it."""
        self.moves += 1
        self.migration = f"s{self.moves}"
        begun = time.monotonic()
        stage = self.stage()
        manifest = workloads.migration(self.migration, NAMESPACE, POD, stage.target)
        wrong = []
        if failed := self._patiently(lambda: self.cluster.apply(manifest), begun + 60):
            wrong.append(f"cannot be created: {failed}")
        final = stage.final(_END_S)
        phase = final.get("phase")
        if failed := self._patiently(self._look, time.monotonic() + _RECOVER_S):
            wrong.append(f"the pod is not Ready: {failed}")
        excused = self.trouble.excuses(begun)
        wrong += misplaced(phase, self.here, stage.source, stage.target, excused=excused)
        self.cluster.kubectl(
            *("delete", "podmigration", self.migration, "-n", NAMESPACE),
            *("--wait=false", "--ignore-not-found"),
            check=False,
        )
        return {
            "phase": phase,
            "reason": final.get("reason"),
            "message": final.get("message") if phase != "Succeeded" else None,
            "freeze_ms": final.get("freezeMilliseconds"),
            "seconds": round(time.monotonic() - begun, 1),
            "excused": excused,
            "wrong": wrong,
        }

    def _look(self) -> None:
        self.cluster.wait_ready(POD, NAMESPACE, 20)
        self.here = self.cluster.get("pod", POD, NAMESPACE)["spec"]["nodeName"]

    # -- one minute ---------------------------------------------------------------------------
    def minute(
        self, number: int, fault: str, after_s: float, pace: random.Random
    ) -> dict[str, Any]:
        """Moves until it is over, with its fault; then a quiet moment, in which all is counted."""
        begun = time.monotonic()
        thread = self.trouble.make(fault, after_s)
        moves = []
        # always counted with the pod on the same node, so that only growth is growth
        while (
            time.monotonic() < begun + _MOVING_S
            or thread.is_alive()
            or (self.here != self.nodes[0] and time.monotonic() < begun + 2 * _MINUTE_S)
        ):
            moves.append(self.move())
            time.sleep(pace.uniform(0.2, 2.0))
        thread.join()
        wrong = [f"s{self.moves}: {one}" for move in moves for one in move["wrong"]]
        if self.trouble.problem:
            wrong.append(self.trouble.problem)
        debris: list[str] = []
        sample: dict[str, object] = {}
        pages = -1

        def look() -> None:
            nonlocal debris, sample, pages
            debris = wait_clean(self.cluster, self.nodes, _CLEAN_S, pod_lives=True)
            sample = samples.take(self.cluster, self.nodes)
            pages = self.cluster.number(self.address, "VERIFY")

        if failed := self._patiently(look, time.monotonic() + 30):
            wrong.append(f"nothing can be counted: {failed}")
        wrong += [f"debris: {one}" for one in debris]
        if pages:
            wrong.append(f"{pages} pages hold something else than was written")
        return {
            "kind": "minute",
            "minute": number,
            "fault": fault,
            "after_s": round(after_s, 1),
            "moves": moves,
            "sample": sample,
            "wrong": wrong,
        }


def misplaced(
    phase: str | None, here: str, source: str, target: str, *, excused: bool
) -> list[str]:
    """What is wrong with the end of a migration."""
    if phase == "Succeeded":
        return [] if here == target else [f"Succeeded, but the pod is on {here}"]
    if phase == "Deleted":
        return [] if excused else ["it is gone, and nobody has deleted it"]
    if phase in ("Aborted", "Rejected"):
        wrong = [] if here == source else [f"{phase}, but the pod is on {here}"]
        return wrong + ([] if excused else [f"{phase} without a fault"])
    return [f"ended {phase}"]


def seen(
    client: Counter, ticks: int, copies: Copies, looks: int, listener: Listener, told: int
) -> tuple[dict[str, Any], list[str]]:
    """What the three observers have seen since the last time, and what is wrong with it."""
    gap = max((tick["worst_ms"] for tick in client.ticks[ticks:]), default=_SILENCE_MS)
    wrong: list[str] = []
    what: dict[str, Any] = {
        "gap_ms": gap,
        "replies": client.ticks[-1]["count"] if client.ticks else 0,
        "looks": len(copies.seen) - looks,
        "numbers": listener.last,
        "spoke_on": len(listener.moves),
    }
    if client.report:
        wrong.append(f"the client: {client.report['error']}")
    if any("+" in where for where in copies.seen[looks:]):
        wrong.append("two copies ran (process table)")
        what["copies"] = copies.doubles[-4:]
    if copies.failure:
        wrong.append(f"the observer of copies: {copies.failure}")
    wrong += [f"two copies spoke: {one}" for one in listener.wrong[told:]]
    if time.time() - listener.last.get("at", 0.0) > 30:
        wrong.append("the listener is silent")
    return what, wrong


def run(cluster: Cluster, nodes: list[str], seed: int, minutes: int) -> Iterator[dict[str, Any]]:
    """All lines of the results, as they come."""
    soak = Soak(cluster, nodes)
    pace = random.Random(seed + 1)
    listener = Listener(cluster)
    try:
        soak.start()
        yield {
            "kind": "begin", "seed": seed, "minutes": minutes, "commit": commit(),
            "kernel": platform.release(), "nodes": nodes,
            "mebibytes": MEBIBYTES, "rate_mebibytes": RATE,
        }  # fmt: skip
        words = ("--interval-ms", "5", "--timeout", "240")
        with (
            Copies(cluster.name, "dirtier", every_s=0.2) as copies,
            cluster.counter(soak.address, "count", *words) as client,
        ):
            begun = time.monotonic()
            for number, (first, second, after_s) in enumerate(schedule(seed), 1):
                late = time.monotonic() - begun
                if late >= minutes * _MINUTE_S:
                    break
                fault = first if late < minutes * _MINUTE_S / 2 else second
                ticks, looks, told = len(client.ticks), len(copies.seen), len(listener.wrong)
                line = soak.minute(number, fault, after_s, pace)
                line["seconds"] = round(time.monotonic() - begun - late, 1)
                what, wrong = seen(client, ticks, copies, looks, listener, told)
                line |= what
                line["wrong"] += wrong
                yield line
                next_s = begun + number * _MINUTE_S - time.monotonic()
                if next_s > 0:
                    time.sleep(next_s)
                if client.report:
                    return  # the process is not what it was: there is nothing to go on with
            report = client.stop()
        yield {"kind": "end", "client": report | {"gaps": len(report["gaps"])}}
    finally:
        listener.close()


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=120)
    parser.add_argument("--seed", type=int, default=None, help="of the faults; default: the time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--as-is", action="store_true", help="a standing testbed and its images")
    options = parser.parse_args()
    seed = int(time.time()) if options.seed is None else options.seed
    cluster = Cluster()
    if not options.as_is:
        cluster.up()
        cluster.build_images()
    cluster.install()
    cluster.empty_namespace(NAMESPACE)
    nodes = cluster.ready_nodes()[:2]
    options.out.parent.mkdir(exist_ok=True)
    bad = ended = 0
    for line in run(cluster, nodes, seed, options.minutes):
        line["at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if line["kind"] == "minute":
            bad += len(line["wrong"])
            ends = ", ".join(str(move["phase"]) for move in line["moves"])
            say(f"{line['minute']}: {line['fault']}; {ends}; gap {line['gap_ms']:.0f} ms")
            for one in line["wrong"]:
                say(f"  VIOLATION {one}")
        ended = line["kind"] == "end"
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
    return 0 if ended and not bad else 1


if __name__ == "__main__":
    sys.exit(main())
