"""Settings: one frozen object, read from the environment once and checked at start."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from godwit_api.identity import AGENT_CONTROL_PORT, AGENT_TRANSFER_PORT

_NODE_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?\Z")


class ConfigError(Exception):
    """The environment cannot be used; the message lists everything that is wrong."""


@dataclass(frozen=True, slots=True)
class Config:
    """Environment variable of each field: ``GODWIT_`` and its name in capitals.

    ``node_name`` and ``node_ip`` come from the downward API. Both servers
    listen on ``node_ip`` only, and so does plain gRPC health for the kubelet.
    ``enrollment_address`` is ``host:port`` of the operator; its server
    certificate must be signed by ``ca_file``.
    """

    node_name: str
    node_ip: str
    enrollment_address: str
    control_port: int = AGENT_CONTROL_PORT
    transfer_port: int = AGENT_TRANSFER_PORT
    health_port: int = 9463
    ca_file: Path = Path("/etc/godwit/ca/ca.crt")
    token_file: Path = Path("/var/run/secrets/godwit/token")
    run_dir: Path = Path("/run/godwit")
    journal_dir: Path = Path("/var/lib/godwit/journal")
    identity_dir: Path = Path("/run/godwit/identity")
    checkpoint_dir: Path = Path("/var/lib/godwit/checkpoints")
    worker_threads: int = 32
    transfer_streams: int = 1  # connections of one copy, each with a thread that encrypts
    freezes_at_once: int = 1  # of pods that leave this node; the others wait, and run
    guard_seconds: int = 600
    freeze_timeout_ms: int = 10_000
    journal_keep_hours: int = 72
    log_level: str = "INFO"
    failpoints: str = ""  # for tests only; see godwit_api.failpoints

    @property
    def store_dir(self) -> Path:
        return self.run_dir / "store"

    def summary(self) -> dict[str, str]:
        """For the one log line at start; nothing in it is secret."""
        return {field.name: str(getattr(self, field.name)) for field in fields(self)}


def load(environment: Mapping[str, str]) -> Config:
    """Reads and checks all settings; raises ``ConfigError`` with all faults at once."""
    faults: list[str] = []
    values: dict[str, str | int | Path] = {}
    for field in fields(Config):
        name = f"GODWIT_{field.name.upper()}"
        text = environment.get(name, "")
        if not text:
            if field.name in ("node_name", "node_ip", "enrollment_address"):
                faults.append(f"{name} is not set")
            continue
        try:
            values[field.name] = _convert(str(field.type), text)
        except ValueError as error:
            faults.append(f"{name}={text!r}: {error}")
    if not faults:
        config = Config(**values)  # type: ignore[arg-type]
        faults = _faults(config)
        if not faults:
            return config
    raise ConfigError("; ".join(faults))


def _convert(type_name: str, text: str) -> str | int | Path:
    if type_name == "int":
        return int(text)
    if type_name == "Path":
        path = Path(text)
        if not path.is_absolute():
            raise ValueError("is no absolute path")
        return path
    return text


def _faults(config: Config) -> list[str]:
    faults = []
    if not _NODE_NAME.match(config.node_name):
        faults.append(f"GODWIT_NODE_NAME={config.node_name!r} is no node name")
    try:
        address = ipaddress.ip_address(config.node_ip)
        if address.version != 4 or address.is_unspecified:
            faults.append(f"GODWIT_NODE_IP={config.node_ip}: not an IPv4 address of one node")
    except ValueError:
        faults.append(f"GODWIT_NODE_IP={config.node_ip!r} is no IP address")
    host, _, port = config.enrollment_address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        faults.append(f"GODWIT_ENROLLMENT_ADDRESS={config.enrollment_address!r} is not host:port")
    for name in ("control_port", "transfer_port", "health_port"):
        if not 0 <= getattr(config, name) < 65536:
            faults.append(f"GODWIT_{name.upper()} is no port")
    if config.control_port and config.control_port == config.transfer_port:
        faults.append("GODWIT_CONTROL_PORT and GODWIT_TRANSFER_PORT are the same")
    for name, low, high in (
        ("worker_threads", 8, 512),
        ("transfer_streams", 1, 16),
        ("freezes_at_once", 1, 64),
        ("guard_seconds", 60, 86_400),
        ("freeze_timeout_ms", 100, 600_000),
        ("journal_keep_hours", 1, 8760),
    ):
        if not low <= getattr(config, name) <= high:
            faults.append(f"GODWIT_{name.upper()} is not between {low} and {high}")
    if config.log_level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        faults.append(f"GODWIT_LOG_LEVEL={config.log_level!r} is no level")
    return faults
