"""Whether this machine confines containers with AppArmor."""

from __future__ import annotations

import shutil
from pathlib import Path

_ENABLED = Path("/sys/module/apparmor/parameters/enabled")
PARSER = shutil.which("apparmor_parser", path="/usr/sbin:/sbin")


def missing() -> str | None:
    """What is; None: containers can be confined."""
    if not (_ENABLED.exists() and _ENABLED.read_text().startswith("Y")):
        return "no AppArmor in this kernel"
    return None
