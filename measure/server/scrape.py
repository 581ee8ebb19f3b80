"""Scrapes the server's `/metrics` once a second and at the beginning and end of every window."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from measure.deadline import Deadline, OutOfTime
from measure.server.endpoint import Endpoint, Unreachable
from measure.server.exposition import parse
from sim.model.files.json_lines import Lines
from sim.model.warning import Notice, notice

EVERY_SECONDS = 1.0
ANSWER_SECONDS = 5.0  # for one scrape; the ladder waits for those at the edges of windows


class Scraper:
    """Writes `server.jsonl`: `{"t": s, "metrics": {name with labels: value}}` a line, until closed."""

    def __init__(self, endpoint: Endpoint, path: Path, now: Callable[[], float]):
        self._endpoint, self._now = endpoint, now
        self._lines = Lines(path)
        self.scrapes = self.gaps = 0
        self._cause = ""
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._scrape_periodically, daemon=True)
        self._thread.start()

    def scrape(self) -> None:
        """Scrape now; a failed scrape is counted as a gap."""
        started = self._now()
        deadline = Deadline(ANSWER_SECONDS, f"{self._endpoint.url}/metrics")
        self.scrapes += 1
        try:
            answer = self._endpoint.get("/metrics", deadline)
        except (Unreachable, OutOfTime) as e:
            self._failed(str(e))
            return
        if answer.status != 200:
            self._failed(f"/metrics: {self._endpoint.explain('/metrics', answer)}")
            return
        line = {"t": round((started + self._now()) / 2, 6), "metrics": parse(answer.body.decode("utf-8", "replace"))}
        with self._lock:
            if not self._closed.is_set():
                self._lines.write(msgspec.json.encode(line))

    def warnings(self) -> list[Notice]:
        """A warning if scrapes failed, with the first cause."""
        if not self.gaps:
            return []
        return [
            notice(
                "scrapes-failed", f"{self.gaps} of {self.scrapes} scrapes of the server's metrics failed: {self._cause}"
            )
        ]

    def _failed(self, cause: str) -> None:
        self.gaps += 1
        self._cause = self._cause or cause

    def close(self) -> None:
        """Stop scraping."""
        self._closed.set()
        self._thread.join(ANSWER_SECONDS + 1.0)
        with self._lock:
            self._lines.close()

    def _scrape_periodically(self) -> None:
        while not self._closed.wait(EVERY_SECONDS):
            try:
                self.scrape()
            except OSError:  # a full disk, which writing the records will report
                return
