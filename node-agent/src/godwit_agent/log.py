"""Structured log lines: ``time level event key=value …``, one per transition."""

from __future__ import annotations

import json
import logging
import sys
import time

_logger = logging.getLogger("godwit")


def setup(level: str) -> None:
    """Sends all records of the process to standard error, in one form."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    formatter.converter = time.gmtime
    formatter.default_time_format = "%Y-%m-%dT%H:%M:%S"
    formatter.default_msec_format = "%s.%03dZ"
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler], force=True)


def info(event: str, **keys: object) -> None:
    """Something happened as it should."""
    _logger.info("%s", _line(event, keys))


def warning(event: str, **keys: object) -> None:
    """Something needs no action yet."""
    _logger.warning("%s", _line(event, keys))


def error(event: str, **keys: object) -> None:
    """Something failed."""
    _logger.error("%s", _line(event, keys))


def exception(event: str, **keys: object) -> None:
    """Something failed in a way that nobody thought of; with the traceback."""
    _logger.error("%s", _line(event, keys), exc_info=True)


def _line(event: str, keys: dict[str, object]) -> str:
    return " ".join([event, *(f"{key}={_value(value)}" for key, value in keys.items())])


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    plain = text and text.isprintable() and not any(c in text for c in ' "=')
    return text if plain else json.dumps(text)
