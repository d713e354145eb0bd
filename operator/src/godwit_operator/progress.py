"""What a copy tells of itself, as fields of the status. Pure."""

from __future__ import annotations

from typing import Any

from godwit_api.pb import agent_pb2 as pb


def of_copy(told: pb.CopyProgress, pod_bytes: int) -> dict[str, Any]:
    """``pod_bytes``: memory and files found in Checking, what the first round sends at most.

    A rate, a bandwidth or a prediction that is not known yet is absent, never 0.
    """
    remaining = told.remaining_bytes
    if told.round <= 1 and not told.converged:
        remaining = max(pod_bytes - told.transferred_bytes, remaining, 0)
    bandwidth = told.bandwidth_bytes_per_s
    left = round(remaining / bandwidth, 1) if bandwidth and not told.converged else None
    return {
        "rounds": told.round,
        "transferred_bytes": told.transferred_bytes,
        "remaining_bytes": remaining,
        "dirty_bytes_per_second": told.dirty_bytes_per_s if told.round > 1 else None,
        "bandwidth_bytes_per_second": bandwidth or None,
        "cpu_percent": told.cpu_percent if 0 < told.cpu_percent < 100 else None,
        "predicted_freeze_milliseconds": told.predicted_freeze_ms or None,
        "copy_seconds_left": left,
    }
