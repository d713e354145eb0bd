"""Settings: one frozen object, read from the environment once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from godwit_api.identity import OPERATOR_ENROLLMENT_PORT


class ConfigError(Exception):
    """The environment cannot be used; the message lists everything that is wrong."""


@dataclass(frozen=True)
class Config:
    """Environment variable of each field: ``GODWIT_`` and its name in capitals."""

    namespace: str = "godwit-system"  # the operator's own
    service: str = "godwit-operator"  # its Service, for the certificate's names
    agent_service_account: str = "godwit-node-agent"
    watch_namespaces: str = ""  # comma separated; empty: all
    migrations_per_cluster: int = 5
    migrations_per_node: int = 2
    enrollment_port: int = OPERATOR_ENROLLMENT_PORT
    health_port: int = 8080
    address_seconds: int = 10
    housekeeping_seconds: int = 15
    log_format: str = "json"  # or text
    log_level: str = "INFO"
    failpoints: str = ""  # for tests only; see godwit_api.failpoints


_BOUNDS = {
    "migrations_per_cluster": (1, 1000),
    "migrations_per_node": (1, 100),
    "enrollment_port": (1, 65535),
    "health_port": (1, 65535),
    "address_seconds": (1, 3600),
    "housekeeping_seconds": (1, 3600),
}
_CHOICES = {
    "log_format": ("json", "text"),
    "log_level": ("DEBUG", "INFO", "WARNING", "ERROR"),
}


def load(environment: Mapping[str, str]) -> Config:
    """All settings; raises ConfigError with all faults at once."""
    values: dict[str, int | str] = {}
    faults = []
    for field in fields(Config):
        name = f"GODWIT_{field.name.upper()}"
        text = environment.get(name, "")
        if not text:
            continue
        if field.name in _BOUNDS:
            low, high = _BOUNDS[field.name]
            if not text.isdecimal() or not low <= int(text) <= high:
                faults.append(f"{name}={text!r} is not between {low} and {high}")
                continue
            values[field.name] = int(text)
        elif field.name in _CHOICES and text not in _CHOICES[field.name]:
            faults.append(f"{name}={text!r} is none of {', '.join(_CHOICES[field.name])}")
        else:
            values[field.name] = text
    if faults:
        raise ConfigError("; ".join(faults))
    return Config(**values)  # type: ignore[arg-type]
