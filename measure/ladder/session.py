"""Measures a scenario on a live server: everything before the first request and after the last.

The server is connected to or started, compared with the scenario, and probed for the length of prompts; then `runner`
runs the ladder. However it ends (Ctrl-C, SIGTERM, a dead server, a bug), what was measured is kept and `run.json` says
why it stopped.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any, NamedTuple

import msgspec

from measure.deadline import Deadline, Say, wait_for
from measure.journal import Journal, refuse_existing
from measure.ladder.generator import free_port
from measure.ladder.probe import find_recipe, sample_prompt
from measure.ladder.progress import Progress
from measure.ladder.runner import LadderRun
from measure.ladder.trial import try_stream
from measure.loadgen.messages import Setup, boot_id
from measure.loadgen.prompts import Recipe
from measure.server.detection import PROBE_SECONDS, Server, detect
from measure.server.docker import launched
from measure.server.endpoint import ANSWER_SECONDS, Endpoint
from measure.server.launch import START_SECONDS
from measure.server.limits import check_limits, check_measurable
from measure.server.process import launched as launched_process
from measure.server.provenance import engine_of, flags_of, recognised
from measure.server.tokenizer_patch import patched_tokenizer
from sim.engines.catalog import kind_of
from sim.model.errors import BadInput, UserError
from sim.model.files.lengths import arrivals, read_lengths
from sim.model.flags import untold
from sim.model.identity import Identity, is_engine, named
from sim.model.scenario import Scenario
from sim.model.text import printable
from sim.model.warning import Notice, folded, notice
from sim.model.workload import RequestLengths
from sim.terminal.console import Console

PATIENCE = 300.0
TERMINATED = 143


def measure(
    scenario: Scenario,
    url: str | None,
    out: Path,
    *,
    resume: bool = False,
    processes: int = 1,
    model: str | None = None,
    console: Console | None = None,
    seed: int = 0,
    patience: float = PATIENCE,
    timeout: float | None = None,
    budget: float | None = None,
    bind: str | None = None,
    remote: int = 0,
    check: Callable[[Server, Scenario], None] = lambda server, scenario: None,
) -> Path:
    """Measure a scenario on the server at `url`, or on one that it starts as `scenario.launch` says, and return `out`.

    `resume` continues at the first unfinished rung of the run in `out`. `processes` generate load on this machine;
    `remote` more workers may join at `bind` (HOST:PORT). `model` is the name of the model if the server has several, or
    a folder with its `tokenizer.json`. `patience` is the longest wait of a request for its next token, `timeout` the
    limit of each phase before the load (detection, prompt length, warm-up), `budget` the limit of everything, s.
    `check` may refuse the server before anything is written or requested. Progress goes to `console`.

    Raises `UserError` for what the user can fix, `KeyboardInterrupt` or `SystemExit(143)` when stopped; the run is
    closed first.
    """
    spent = None if budget is None else Deadline(budget, "the measurement")
    console = console or Console(stderr=True)
    progress = Progress(console)
    if url is None and scenario.launch is None:
        raise BadInput("expected a server: give --url URL, or add a launch: block to the scenario")
    if not resume:
        refuse_existing(out)
    host, port = ("127.0.0.1", free_port()) if bind is None else listening(bind)
    check_measurable(scenario)
    lengths = read_lengths(scenario.workload)
    if scenario.load.trace:
        arrivals(scenario.workload, lengths)
    with ExitStack() as stack:
        stack.enter_context(terminable())
        # before anything is written: a wrong URL, or a server that cannot serve the workload, leaves no run
        found = None
        if url is not None:
            found = connect(url, scenario, lengths, model, seed, progress.say, timeout, spent, check)
            scenario = found.scenario

        def same_engine(head: dict[str, Any]) -> None:
            if found is not None:
                _check_engine(head, engine_of(found.server), out)

        journal = Journal.resume(out, scenario, same_engine) if resume else Journal.begin(out, scenario, seed=seed)
        stack.callback(journal.close)
        seed = journal.head.get("seed", seed)
        if found is None:
            try:
                url = _launch(scenario, out, journal, console, stack, model, timeout, spent)
                found = connect(url, scenario, lengths, model, seed, progress.say, timeout, spent)
            except UserError as e:
                journal.head["stopped"] = f"the server did not start: {e}"
                journal.save()
                raise
        endpoint, server, recipe, warnings, _ = found
        _record_server(server, warnings, scenario, journal, console)
        setup = Setup(
            url=endpoint.url,
            api=server.api,
            out=str(out.resolve()),
            zero=journal.zero,
            boot=boot_id(),
            seed=seed,
            recipe=recipe,
            workload=scenario.workload,
            model=server.model,
            extras=server.extras,
            lengths=None if lengths is None else [column.tolist() for column in lengths[:3]],
            open_loop=scenario.load.users is None and (scenario.load.rate is not None or scenario.load.trace),
            patience=patience,
            think=scenario.load.think,
            retry=scenario.load.retry,
            first_id=journal.first_id,
            segment=journal.segment,
            workers=processes + remote,
            bind=host,
            port=port if processes + remote > 1 else 0,
        )
        ladder = LadderRun(scenario, setup, journal, endpoint, server, lengths, progress, spent, timeout)
        ladder.run(processes)
    return out


def _launch(
    scenario: Scenario,
    out: Path,
    journal: Journal,
    console: Console,
    stack: ExitStack,
    model: str | None,
    timeout: float | None,
    budget: Deadline | None,
) -> str:
    """Start the scenario's server, which is ended with `stack`; returns its URL. The time from its start until it is
    healthy, and until its first token has come, is recorded: a cold start."""
    launch = scenario.launch
    assert launch is not None
    seconds = START_SECONDS if budget is None else min(START_SECONDS, budget.left())
    if launch.command:
        port = launch.port or free_port()
        running = stack.enter_context(launched_process(launch, scenario, out, console, port, seconds))
    else:
        # TGI cannot be told to ignore the end token, and answers must be as long as requested unless the scenario has
        # a limit and shorter answers
        ends = scenario.server.declared.family == "tgi" and scenario.workload.max_new_tokens is None
        mounts = patched_tokenizer(launch, out) if ends else {}
        running = stack.enter_context(launched(launch, scenario, out, console, mounts, seconds))
    healthy = perf_counter() - running.began
    journal.head["process" if launch.command else "container"] = running.described
    limit = PROBE_SECONDS if timeout is None else timeout
    endpoint = Endpoint(running.url, min(limit, ANSWER_SECONDS))
    # which gets a token: of an OpenAI-style API by its probe, of TGI by /health
    detect(endpoint, model, wait_for(Progress(console).say, limit, f"the first token at {endpoint.url}", budget))
    first = perf_counter() - running.began
    journal.head["cold_start"] = {"healthy": round(healthy, 3), "first_token": round(first, 3)}
    journal.save()
    return running.url


def _record_server(
    server: Server, warnings: Iterable[Notice], scenario: Scenario, journal: Journal, console: Console
) -> None:
    """Write the server, its engine and its flags to `run.json`, and print the warnings.

    Flags are recorded only if the server is known to be of the scenario's engine; otherwise the scenario's are not its.
    """
    head, lines = journal.head, list(warnings)
    started = head.get("process") or head.get("container")
    engine = engine_of(server, started)
    _check_engine(head, engine, journal.path)
    for warning in lines:
        journal.warn(warning)
    head |= {"info": server.info, "api": server.api, "engine": None if engine is None else msgspec.to_builtins(engine)}
    head["software"]["server"] = None if engine is None else engine.version
    asked = scenario.server.engine
    if is_engine(engine, scenario.server.declared):
        flags = flags_of(server, scenario, started)
        head["flags"] = msgspec.to_builtins(flags)
        lines += untold(flags, scenario.server.declared)
    else:
        head["scenario"].pop("server", None)
        lines.append(
            notice(
                "engine-differs",
                f"the server is {named(engine)}: it is measured"
                + ("" if kind_of(engine) is not None else f", and a forecast as {asked} needs --as {asked}"),
            )
        )
    for line in folded(lines, f"{journal.path}/run.json has all"):
        console.print(printable(line), highlight=False, soft_wrap=True)
    journal.save()


def _check_engine(head: dict[str, Any], engine: Identity | None, path: Path) -> None:
    """Raise `BadInput` if a run is resumed on a server of another engine than before."""
    known = head.get("engine")
    if not head.get("rungs") or "engine" not in head:  # written before engines were recorded
        return
    before = (known.get("name"), known.get("version")) if isinstance(known, dict) else None
    if before != (None if engine is None else (engine.name, engine.version)):
        was = "an unknown engine" if before is None else " ".join(str(part) for part in before if part)
        raise BadInput(f"the run was begun on {was}, and {named(engine)} answers now", path=path / "run.json")


def listening(bind: str) -> tuple[str, int]:
    """Split HOST:PORT."""
    host, _, port = bind.rpartition(":")
    if not host or not (port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536):
        raise BadInput(f"expected HOST:PORT, found {bind!r}", path="--bind")
    return host, int(port)


class Connection(NamedTuple):
    """A server that is ready to be measured: its endpoint, its description, the recipe for prompts, warnings, and the
    scenario, which has the server's engine if it named none."""

    endpoint: Endpoint
    server: Server
    recipe: Recipe
    warnings: list[Notice]
    scenario: Scenario


def connect(
    url: str,
    scenario: Scenario,
    lengths: RequestLengths | None,
    model: str | None,
    seed: int,
    say: Say,
    timeout: float | None = None,
    budget: Deadline | None = None,
    check: Callable[[Server, Scenario], None] = lambda server, scenario: None,
) -> Connection:
    """Detect the server at a URL and compare it with the scenario.

    `say` is told what is awaited; `timeout` limits each of the two phases, s. `check` may refuse the server.
    """
    seconds = PROBE_SECONDS if timeout is None else timeout
    endpoint = Endpoint(url, min(seconds, ANSWER_SECONDS))
    server = detect(endpoint, model, wait_for(say, seconds, f"{endpoint.url} to say what it is", budget))
    scenario = recognised(scenario, server)
    check(server, scenario)
    warnings = check_limits(server, scenario, lengths)
    probing = wait_for(say, seconds, f"{endpoint.url} to count the tokens of a prompt", budget)
    recipe, recipe_warnings = find_recipe(endpoint, server, scenario, lengths, model, seed, probing)
    extras, stream_warnings = try_stream(endpoint, server, *sample_prompt(recipe, scenario, lengths, seed), probing)
    server = msgspec.structs.replace(server, extras=extras)
    return Connection(endpoint, server, recipe, [*warnings, *recipe_warnings, *stream_warnings], scenario)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block by an exception, as Ctrl-C does: `SystemExit` with the status of a terminated process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before: Any = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
