"""Reads Prometheus' text format."""

from __future__ import annotations


def parse(text: str) -> dict[str, float]:
    """{name with labels: value}, without histogram buckets, which are too coarse for any use here."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        close = line.rfind("}")
        name, _, rest = (line[: close + 1], "", line[close + 1 :]) if close >= 0 else line.partition(" ")
        if name.partition("{")[0].endswith("_bucket"):
            continue
        try:
            found[name.strip()] = float(rest.split()[0])
        except (ValueError, IndexError):
            continue  # not a sample
    return found
