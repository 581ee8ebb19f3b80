"""The server's own metrics, once a second and at every window's edge: the second witness."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from measure.endpoint import Endpoint, Unreachable
from measure.exposition import parse
from measure.lines import Lines

EVERY_SECONDS = 1.0


class Scraper:
    """Writes `server.jsonl`: `{"t": s, "metrics": {name with labels: value}}` a line, until closed."""

    def __init__(self, endpoint: Endpoint, path: Path, now: Callable[[], float]):
        self._endpoint, self._now = endpoint, now
        self._lines = Lines(path)
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_on, daemon=True)
        self._thread.start()

    def scrape(self) -> None:
        """Scrape now; a server that does not answer leaves a gap."""
        asked = self._now()
        try:
            status, body = self._endpoint.get("/metrics")
        except Unreachable:
            return
        if status != 200:
            return
        line = {"t": round((asked + self._now()) / 2, 6), "metrics": parse(body.decode("utf-8", "replace"))}
        with self._lock:
            if not self._over.is_set():
                self._lines.write(msgspec.json.encode(line))

    def close(self) -> None:
        """Stop scraping."""
        self._over.set()
        self._thread.join(self._endpoint.timeout)
        with self._lock:
            self._lines.close()

    def _keep_on(self) -> None:
        while not self._over.wait(EVERY_SECONDS):
            self.scrape()
