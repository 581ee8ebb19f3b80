"""What the HTTP surfaces of all stand-ins have in common: the engine behind them, faults, and the log of tokens."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from pathlib import Path

import msgspec
import numpy as np
from aiohttp import web
from aiohttp.typedefs import Handler

from measure.standin.answer import Answer, Events
from measure.standin.faults import Faults
from measure.standin.realtime import Metrics, Server
from sim.engines.catalog import scheduler
from sim.model.calibration import Calibration
from sim.model.files.json_lines import Lines
from sim.model.request import Request
from sim.model.server import EngineFlags
from sim.steptime.linear import step_time


@web.middleware
async def ignore_closed_connections(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Do not take a client that leaves while it is written to for an error of the handler, as aiohttp does."""
    try:
        return await handler(request)
    except ConnectionError:
        return web.Response()  # the client has left


class Surface(ABC):
    """An engine in real time, and the requests that it is answering."""

    def __init__(
        self,
        calibration: Calibration,
        flags: EngineFlags,
        metrics: Metrics,
        *,
        faults: Faults = Faults(),  # noqa: B008 - a frozen value
        log: Path | None = None,
        seed: int = 0,
        model: str = "servecast/stand-in",
    ):
        self.faults, self.model = faults, model
        form = step_time(calibration.model, calibration.values)
        self.serving = Server(scheduler(flags), form, metrics, flags.permits, log)
        self._log = Lines(log / "tokens.jsonl") if log is not None else None
        self._rng = np.random.default_rng(seed)
        self._seen = self._count = 0  # requests that came, and those accepted

    @abstractmethod
    def application(self) -> web.Application:
        """The routes of the server."""

    def draw_fault(self) -> str | None:
        """The fault of the request that has just arrived; None for none."""
        fault = self.faults.draw(self._rng, self._seen)
        self._seen += 1
        return fault

    def new_request(self, prompt_tokens: int, max_new_tokens: int, fault: str | None, least: int = 1) -> Request:
        """A request of these lengths; with the fault `eos` its answer ends early, after `least` tokens or more."""
        output = max_new_tokens
        if fault == "eos":
            output = int(self._rng.integers(min(least, output), output, endpoint=True))
        self._count += 1
        return Request(self._count - 1, prompt_tokens, output, max_new_tokens)

    def start(
        self,
        request: Request,
        name: str | None,
        events: Events,
        fault: str | None,
        transport: asyncio.Transport | None,
        first_word: int,
    ) -> Answer:
        """Begin to answer a request that has been accepted."""
        answer = Answer(request, name or request.id, self.serving, events, first_word)
        answer.transport = transport
        if fault in ("reset", "stall", "error", "incomplete"):
            answer.fault, answer.fault_at = fault, int(self._rng.integers(0, request.output_tokens))
        self.serving.submit(answer)
        return answer

    def log(self, answer: Answer) -> None:
        """Write when each token of an answer was sent."""
        if self._log is not None:
            self._log.write(msgspec.json.encode({"id": answer.name, "queued": answer.queued, "sent": answer.sent}))
