"""``python -m godwit_operator``, without a second for its imports at every start."""

from __future__ import annotations

import multiprocessing
import os
import runpy
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")


def start(environment: Mapping[str, str], log: Path) -> BaseProcess:
    """A process of its own; where it is forked from the operator's modules lie ready."""
    _CONTEXT.set_forkserver_preload(["__main__", "godwit_operator.main", __name__])
    process = _CONTEXT.Process(target=_run, args=(dict(environment), str(log)))
    process.start()
    return process


def _run(environment: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    runpy.run_module("godwit_operator", run_name="__main__")
