"""Workloads under podman: used, checkpointed, restored, looked at. Runs where podman is.

``podman_moves.py ARCHIVE JOB…``: an image in ``/images``, and JSON objects with ``command``,
``environment``, ``terminal``, ``port``, and who uses it: ``client`` (source of a script of
``lab/servers``) with ``words``, or ``beside`` (a command for another container of the image);
``ADDRESS`` in them stands for the server's. Prints a JSON object for each: ``works``, and
``stage`` and ``error`` if not; ``client``: what the client says of its connections, empty when
all is well, null when there is none. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

_PODMAN = ("podman", "--storage-driver", "overlay", "--cgroup-manager", "cgroupfs")
_RUNTIME = ("--runtime", "runc")
_KEEP = ("--tcp-established", "--file-locks")
_ERROR = re.compile(r"^.*\bError \(([^)]*)\): (.*)$", re.MULTILINE)
_LOG = re.compile(r"(/\S+\.log)")


class Failed(Exception):
    """A stage and what was said."""


def podman(stage: str, *words: str) -> str:
    """Its output."""
    done = subprocess.run(
        [*_PODMAN, *_RUNTIME, *words], capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        raise Failed(stage, _reason(done.stderr))
    return done.stdout.strip()


def _reason(said: str) -> str:
    """CRIU's own words, where it left some."""
    for name in _LOG.findall(said):
        with contextlib.suppress(OSError):
            found = _ERROR.findall(Path(name).read_text(errors="replace"))
            # The first is the cause; that its own limit cannot be raised is none.
            for where, text in found:
                if "RLIMIT_NOFILE for self" not in text:
                    return f"{text} ({where})"
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason"


def started(image: str, job: dict[str, Any]) -> str:
    """Address of the server."""
    words = [word for name, value in job["environment"] for word in ("-e", f"{name}={value}")]
    if job["terminal"]:
        words.append("-t")
    podman("start", "run", "-d", "--name", "server", "-v", "data:/data", *words, image,
           *job["command"])  # fmt: skip
    return podman("start", "inspect", "-f", "{{.NetworkSettings.Networks.podman.IPAddress}}",
                  "server")  # fmt: skip


def use(image: str, job: dict[str, Any], address: str) -> subprocess.Popen[str] | None:
    """A client that has said ``ready``."""
    if job.get("beside"):
        words = [word.replace("ADDRESS", address) for word in job["beside"]]
        command = [*_PODMAN, *_RUNTIME, "run", "-i", "--name", "client", image, *words]
    elif job.get("client"):
        words = [word.replace("ADDRESS", address) for word in job["words"]]
        command = [sys.executable, "-c", job["client"], *words]
    else:
        return None
    end = time.monotonic() + 300
    while True:  # until the server listens
        running = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert running.stdout
        assert running.stderr
        if running.stdout.readline().strip() == "ready":
            return running
        said = running.stderr.read()
        running.wait()
        if job.get("beside"):
            subprocess.run([*_PODMAN, "rm", "-f", "client"], capture_output=True, check=False)
        if time.monotonic() > end:
            raise Failed("use", (said.strip().splitlines() or ["no word"])[-1])
        time.sleep(0.5)


def verdict(running: subprocess.Popen[str]) -> str:
    """Empty when every connection lives and every answer was right."""
    try:
        said, complaint = running.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        running.kill()
        running.communicate()
        return "no answer for 100 s"
    last = said.strip().splitlines()[-1] if said.strip() else ""
    with contextlib.suppress(ValueError):
        report = json.loads(last)
        errors = report.get("errors") or [report[key] for key in ("error",) if report.get(key)]
        if errors:
            return str(errors[0])
        if report.get("differences"):
            return f"{report['differences']} differences"
        if report.get("wrong") or report.get("again"):
            return f"{report['wrong']} wrong answers, {report['again']} answered again"
        if report.get("lost"):
            return f"{len(report['lost'])} datagrams lost"
        return ""
    if running.returncode:
        lines = complaint.strip().splitlines() or [last or f"exit {running.returncode}"]
        return lines[-1]
    return ""


def session(job: dict[str, Any], question: list[str]) -> str:
    """What a command in the container prints."""
    return podman("look", "exec", "server", *question)


def run(image: str, job: dict[str, Any]) -> dict[str, Any]:
    """All stages."""
    address = started(image, job)
    if first := job.get("ready"):
        _until(f"http://{address}:{job['port']}{first}")
    using = use(image, job, address)
    for command in job.get("before", []):
        session(job, command)
    begin = time.monotonic()
    podman("checkpoint", "container", "checkpoint", *_KEEP, "--export", "/tmp/one.tar",
           "--compress", "none", "server")  # fmt: skip
    podman("checkpoint", "rm", "-f", "server")
    podman("checkpoint", "volume", "rm", "data")  # its content is in the archive
    podman("restore", "container", "restore", *_KEEP, "--import", "/tmp/one.tar")
    took = time.monotonic() - begin
    result: dict[str, Any] = {"works": True, "took_s": round(took, 2), "client": None}
    if using:
        result["client"] = verdict(using)
    for command in job.get("after", []):
        session(job, command)
    if wanted := job.get("shows"):
        end = time.monotonic() + 20
        while wanted not in session(job, job["look"]):
            if time.monotonic() > end:
                raise Failed("look", f"{wanted!r} is not on the screen")
        result["client"] = ""
    state = podman("look", "inspect", "-f", "{{.State.Running}}", "server")
    if state != "true":
        raise Failed("restore", "the container has ended")
    return result


def _until(url: str) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            answer.read()
            return
        time.sleep(0.5)
    raise Failed("start", f"{url} does not answer")


def main() -> None:
    """Command line entry."""
    os.environ["PODMAN_IGNORE_CGROUPSV1_WARNING"] = "1"
    Path("/etc/criu").mkdir(exist_ok=True)
    Path("/etc/criu/runc.conf").write_text("network-lock nftables\n")
    image = podman("load", "load", "-q", "-i", f"/images/{sys.argv[1]}").split(": ", 1)[1]
    for text in sys.argv[2:]:
        try:
            result = run(image, json.loads(text))
        except Failed as failure:
            stage, error = failure.args
            result = {"works": False, "stage": stage, "error": error}
        except subprocess.TimeoutExpired as late:
            result = {"works": False, "stage": "podman", "error": f"no end in {late.timeout:.0f} s"}
        finally:
            for words in (("rm", "-fa", "-t", "0"), ("volume", "rm", "-fa")):
                subprocess.run([*_PODMAN, *words], capture_output=True, check=False)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
