"""The format of our files, and how data of an earlier format is read as one of today.

1. First.
2. `warnings` (with code, severity, text and advice) were `doubts` (sentences), `bottleneck` was `binding`,
   `latency_onset` was `takeoff`, `kind` was `door` (in a calibration's source, and a forecast's provenance).
   The parameter `a2` of a calibration multiplies Σ n (n + 1) / 2 over prompts of n tokens; it multiplied Σ n²
   (`sim.model.calibration.upgraded_attention`).
"""

from __future__ import annotations

from typing import Any

FORMAT = 2  # of what we write: runs, scenarios, calibrations, forecasts and comparisons alike
READ = (1, FORMAT)
EXPECTED = " or ".join(map(str, READ))
NOW: dict[str | int, str] = {"doubts": "warnings", "binding": "bottleneck", "takeoff": "latency_onset"}


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """A document of ours in the present format. Values of a shape that no format has are left for others to refuse."""
    if values.get("format", 1) != 1 or isinstance(values.get("format"), bool):
        return values
    now: dict[str, Any] = {"format": FORMAT} if "format" in values else {}
    for name, value in values.items():
        name = NOW.get(name, name)
        if name in ("source", "provenance") and isinstance(value, dict):
            value = {"kind" if key == "door" else key: below for key, below in value.items()}
        elif name == "scenario" and isinstance(value, dict):
            value = upgraded(value)
        elif name == "rungs" and isinstance(value, list):
            value = [upgraded(rung) if isinstance(rung, dict) else rung for rung in value]
        now.setdefault(name, value)
    return now
