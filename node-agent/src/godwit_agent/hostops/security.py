"""Security modules of the node: which are in force, and what they know.

By the place where each shows it: AppArmor in securityfs (admin-guide/LSM/apparmor.rst), SELinux in
a file system of its own (security/selinux/selinuxfs.c).
"""

from __future__ import annotations

from godwit_agent.hostops.files import beneath
from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Profiles

_SIGNS = {"apparmor": "/sys/kernel/security/apparmor", "selinux": "/sys/fs/selinux/policy"}

_KUBELET = "/var/lib/kubelet"
"""Its default --root-dir; where it is elsewhere, nothing is said about seccomp profiles."""


def modules(layout: Layout) -> tuple[str, ...]:
    """Their names, sorted."""
    return tuple(name for name, path in _SIGNS.items() if layout.local(path).exists())


def selinux(layout: Layout) -> bool:
    """Whether each process has a label of SELinux."""
    return "selinux" in modules(layout)


def missing(layout: Layout, profiles: Profiles) -> tuple[str, ...]:
    """Of what a pod's specification wants on its node, what is not there."""
    found: list[str] = []
    if profiles.apparmor and "apparmor" in modules(layout):
        listed = layout.local(f"{_SIGNS['apparmor']}/profiles").read_text()
        loaded = {line.rpartition(" (")[0] for line in listed.splitlines()}
        found += [f"AppArmor profile {name}" for name in profiles.apparmor if name not in loaded]
    if beneath.exists(layout, _KUBELET):
        found += [
            f"seccomp profile {path} (in {_KUBELET}/seccomp)"
            for path in profiles.seccomp
            if not beneath.exists(layout, f"{_KUBELET}/seccomp/{path}")
        ]
    return tuple(found)
