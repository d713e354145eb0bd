"""What a node still knows of its successors when it was restarted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from godwit_agent.hostops.hooks import HookFiles
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import HostPath


def test_a_successor_is_known_after_the_node_has_been_restarted(tmp_path: Path) -> None:
    run, lib = tmp_path / "run", tmp_path / "lib"
    layout = Layout(host_pid=os.getpid(), run_dir=HostPath(str(run)), state_dir=HostPath(str(lib)))
    HookFiles(layout).expect("pod", "migration", 2, ("10.0.0.1",), {})
    assert (lib / "successors" / "pod").stat().st_mode & 0o777 == 0o600

    shutil.rmtree(run)
    hooks = HookFiles(layout)
    assert [(mark.pod_uid, mark.migration) for mark in hooks.marks()] == [("pod", "migration")]
    hooks.unexpect("pod", ran=False)
    assert hooks.marks()
    hooks.unexpect("pod", ran=True)
    assert not hooks.marks()
    assert not any((lib / "successors").iterdir())
