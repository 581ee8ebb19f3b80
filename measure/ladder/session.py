"""Climb the users ladder on a live server and leave a run: what comes before the first request, and after the last.

The server is found or started, held against the scenario and asked how long a prompt is; then `ascent` climbs. Whatever
ends it (Ctrl-C, SIGTERM, a dead server, a bug), what was measured is kept and the run says where it stopped.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from measure.deadline import Deadline, Say, wait_for
from measure.journal import Journal, refuse_existing
from measure.ladder.generator import free_port
from measure.ladder.probe import learn, sample
from measure.ladder.progress import Screen
from measure.ladder.runner import Ascent
from measure.ladder.trial import try_stream
from measure.loadgen.messages import Setup, boot_id
from measure.loadgen.prompts import Recipe
from measure.server import health
from measure.server.docker import START_SECONDS, launched
from measure.server.endpoint import ANSWER_SECONDS, Endpoint
from measure.server.provenance import engine_of, flags_of
from measure.server.tokenizer_patch import endless
from sim.model.errors import BadInput, UserError
from sim.model.files.lengths import arrivals, read_lengths
from sim.model.flags import untold
from sim.model.identity import Identity, is_engine, named
from sim.model.scenario import Scenario
from sim.model.text import printable
from sim.model.warning import folded
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
) -> Path:
    """Measure a scenario on the server at `url`, or on one started by docker, and return the run directory `out`.

    `resume` goes on at the first unfinished rung of the run in `out`. `processes` generate the load here; `remote`
    more workers are waited for at `bind` (HOST:PORT). `model` names the model where the server has several, or a folder
    with its `tokenizer.json`. `patience` is how long a request waits for its next token, `timeout` how long each phase
    before the load may take (the probe, the length of a prompt, the warm-up), `budget` how long all of it may, from now
    on, s. Progress goes to `console`.

    Raises `UserError` for what the user can mend, `KeyboardInterrupt` or `SystemExit(143)` when stopped; the run is
    closed first.
    """
    spent = None if budget is None else Deadline(budget, "the measurement")
    console = console or Console(stderr=True)
    screen = Screen(console)
    if url is None and scenario.launch is None:
        raise BadInput("expected a server: give --url URL, or a launch: block in the scenario")
    if not resume:
        refuse_existing(out)
    host, port = ("127.0.0.1", free_port()) if bind is None else listening(bind)
    lengths = read_lengths(scenario.workload)
    if scenario.load.trace:
        arrivals(scenario.workload, lengths)
    with ExitStack() as stack:
        stack.enter_context(terminable())
        # before anything is written: a wrong URL, or a server that cannot take the profile, leaves no run
        found = None if url is None else attach(url, scenario, lengths, model, seed, screen.say, timeout, spent)

        def check(head: dict[str, Any]) -> None:
            if found is not None:
                _check_engine(head, engine_of(found[1]), out)

        journal = Journal.resume(out, scenario, check) if resume else Journal.begin(out, scenario, seed=seed)
        stack.callback(journal.close)
        seed = journal.head.get("seed", seed)
        if found is None:
            try:
                url = _launch(scenario, out, journal, console, stack, spent)
                found = attach(url, scenario, lengths, model, seed, screen.say, timeout, spent)
            except UserError as e:
                journal.head["stopped"] = f"the server did not start: {e}"
                journal.save()
                raise
        endpoint, server, recipe, warnings = found
        _note(server, warnings, scenario, journal, console)
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
        ascent = Ascent(scenario, setup, journal, endpoint, server, lengths, screen, spent, timeout)
        ascent.run(processes)
    return out


def _launch(
    scenario: Scenario, out: Path, journal: Journal, console: Console, stack: ExitStack, budget: Deadline | None
) -> str:
    """Start the scenario's container, which ends with `stack`; its URL."""
    assert scenario.launch is not None
    # answers are to be as long as asked, unless the scenario charges for more than comes back
    covers = endless(scenario.launch, out) if scenario.workload.max_new_tokens is None else {}
    seconds = START_SECONDS if budget is None else min(START_SECONDS, budget.left())
    running = stack.enter_context(launched(scenario.launch, scenario.server, out, console, covers, seconds))
    journal.head["container"] = running.described
    return running.url


def _note(
    server: health.Server, warnings: Iterable[str], scenario: Scenario, journal: Journal, console: Console
) -> None:
    """Write down what answers, with its flags and where each is from, and say warnings about it.

    Of a server that is not known to be of the scenario's engine no flags are kept: the scenario's are not its own.
    """
    head, said = journal.head, list(warnings)
    engine = engine_of(server, head.get("container"))
    _check_engine(head, engine, journal.path)
    for sentence in said:
        journal.warn(sentence)
    head |= {"info": server.info, "api": server.api, "engine": None if engine is None else msgspec.to_builtins(engine)}
    head["software"]["server"] = None if engine is None else engine.version
    asked = scenario.server.engine
    if is_engine(engine, scenario.server.declared):
        flags = flags_of(server, scenario, head.get("container"))
        head["flags"] = msgspec.to_builtins(flags)
        said += untold(flags, scenario.server.declared)
    else:
        head["scenario"].pop("server", None)
        said.append(f"the server is {named(engine)}: it is measured, and a forecast as {asked} needs --as {asked}")
    for line in folded(said, f"{journal.path}/run.json has all"):
        console.print(printable(line), highlight=False, soft_wrap=True)
    journal.save()


def _check_engine(head: dict[str, Any], engine: Identity | None, path: Path) -> None:
    """Raise `BadInput` where a run is resumed on a server of another engine than the one it was begun on."""
    said = head.get("engine")
    if not head.get("rungs") or "engine" not in head:  # of before it was recorded
        return
    before = (said.get("name"), said.get("version")) if isinstance(said, dict) else None
    if before != (None if engine is None else (engine.name, engine.version)):
        was = "an unknown engine" if before is None else " ".join(str(part) for part in before if part)
        raise BadInput(f"the run was begun on {was}, and {named(engine)} answers now", path=path / "run.json")


def listening(bind: str) -> tuple[str, int]:
    """HOST:PORT in its two parts."""
    host, _, port = bind.rpartition(":")
    if not host or not (port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536):
        raise BadInput(f"expected HOST:PORT, found {bind!r}", path="--bind")
    return host, int(port)


def attach(
    url: str,
    scenario: Scenario,
    lengths: RequestLengths | None,
    model: str | None,
    seed: int,
    say: Say,
    timeout: float | None = None,
    budget: Deadline | None = None,
) -> tuple[Endpoint, health.Server, Recipe, list[str]]:
    """The server at a URL, how to make prompts for it, and warnings about it and the scenario.

    `say` is told what is waited for; `timeout` limits each of the two phases, s.
    """
    seconds = health.PROBE_SECONDS if timeout is None else timeout
    endpoint = Endpoint(url, min(seconds, ANSWER_SECONDS))
    server = health.look(endpoint, model, wait_for(say, seconds, f"{endpoint.url} to say what it is", budget))
    warnings = health.check(server, scenario, lengths)
    learning = wait_for(say, seconds, f"{endpoint.url} to say how many tokens a prompt has", budget)
    recipe, unsure = learn(endpoint, server, scenario, lengths, model, seed, learning)
    extras, unheard = try_stream(endpoint, server, *sample(recipe, scenario, lengths, seed), learning)
    return endpoint, msgspec.structs.replace(server, extras=extras), recipe, [*warnings, *unsure, *unheard]


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, by an exception: `SystemExit` with the status of a terminated process."""
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
