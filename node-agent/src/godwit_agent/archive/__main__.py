"""Looks into archives of checkpoints, and exports them: ``python3 -m godwit_agent.archive``."""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import json
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from godwit_agent.archive import contents
from godwit_agent.archive.exporting import export
from godwit_agent.archive.sealed import KEY_BYTES
from godwit_api.errors import GodwitError, Rejected
from godwit_api.reasons import Reason

_ABOUT = """\
Works on the file NAME.godwit that a PodCheckpoint has written, wherever you have copied
it. Nothing of it is believed before all of it has been verified.

  show    says what is in it
  export  writes one container as a tar that checkpointctl, podman and crit understand
"""
_EXAMPLES = """\
examples:
  kubectl -n godwit-system get secret archive-key -o jsonpath='{.data.key}' > key
  python3 -m godwit_agent.archive show redis.godwit --key key
  python3 -m godwit_agent.archive export redis.godwit --key key --container redis redis.tar
  checkpointctl inspect redis.tar --ps-tree-cmd --files --sockets --mounts
  checkpointctl memparse redis.tar --pid 1 --search needle

The tar is not encrypted: it holds all of the container's memory. Keep it as you keep secrets.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Exit code: 1 if the archive is refused, 2 for a wrong command line."""
    options = _parser().parse_args(words)
    try:
        key = read_key(options.key)
        with options.archive.open("rb") as file:
            if options.command == "show":
                print(json.dumps(summary(contents.verify(file, key)), indent=1))
            else:
                with _output(options.out) as out, tarfile.open(fileobj=out, mode="w|") as tar:
                    export(file, key, options.container, tar)
    except (GodwitError, OSError) as error:
        print(f"godwit-archive: {error}", file=sys.stderr)
        return 1
    return 0


def read_key(path: Path) -> bytes:
    """32 bytes as they are, or in base64, as a Secret has them."""
    data = path.read_bytes()
    if len(data) == KEY_BYTES:
        return data
    with contextlib.suppress(binascii.Error):
        key = base64.b64decode(data.strip(), validate=True)
        if len(key) == KEY_BYTES:
            return key
    message = f"{path} has neither {KEY_BYTES} bytes nor their base64"
    raise Rejected(Reason.ARCHIVE_KEY, message)


def summary(manifest: dict[str, object]) -> dict[str, object]:
    """The manifest without what is long. Pure."""
    long = ("manifest", "sha256", "cpuFeatures")
    return {name: value for name, value in manifest.items() if name not in long}


@contextlib.contextmanager
def _output(path: str) -> Iterator[IO[bytes]]:
    """``-`` is standard output. A file has its name only when it is complete."""
    if path == "-":
        yield sys.stdout.buffer
        return
    partial = Path(f"{path}.partial")
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            yield file
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python3 -m godwit_agent.archive",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=kind,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in (
        ("show", "what is in an archive: pod, containers, time, versions (JSON)"),
        ("export", "one container as a tar for checkpointctl, podman and crit"),
    ):
        sub = commands.add_parser(
            name, help=what, description=what, epilog=_EXAMPLES, formatter_class=kind
        )
        sub.add_argument("archive", metavar="ARCHIVE", type=Path, help="the file NAME.godwit")
        sub.add_argument(
            *("--key", "-k"),
            required=True,
            metavar="FILE",
            type=Path,
            help="the Secret's key: 32 bytes, or their base64",
        )
        if name == "export":
            sub.add_argument(
                *("--container", "-c"),
                required=True,
                metavar="NAME",
                help="which container of the pod (show lists them)",
            )
            sub.add_argument("out", metavar="OUT.tar", help="where to; - is standard output")
    return parser


if __name__ == "__main__":
    sys.exit(main())
