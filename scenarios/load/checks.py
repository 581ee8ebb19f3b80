"""Checks of a scenario's values: against each other and against what the server accepts.

An error says what was expected and what was found; the caller adds the file and the line.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from sim.cluster.balancers.policies import check as check_balancer
from sim.model.errors import BadInput, CannotFit, UserError
from sim.model.files.shape import Fail, Key, known
from sim.model.flags import check_bounds
from sim.model.metric import COMPARED, LATENCIES, OF_A_LADDER
from sim.model.scenario import Figure, Launch, Load, Scenario
from sim.model.server import Bounds
from sim.model.text import NAME_BYTES, shortened_name
from sim.model.workload import Gamma, Lengths, RequestFile, Workload

SECRETS = {"--api-key": "VLLM_API_KEY", "--hf-token": "HF_TOKEN"}  # arguments of servers, and the variables they read


def check(s: Scenario, fail: Fail) -> None:
    """Raise an error for the first value that is not valid."""
    if len(s.name.encode(errors="replace")) > NAME_BYTES:
        raise fail(("name",), f"expected at most {NAME_BYTES} bytes, found {len(s.name.encode(errors='replace'))}")
    if not s.name.strip() or s.name.startswith(".") or set(s.name) & set("/\\") or s.name != shortened_name(s.name):
        raise fail(("name",), f"expected a name that can be a folder's, found {s.name!r}")
    _fleet(s, fail)

    def of_server(key: Key, message: str) -> UserError:
        return fail(("server", *key), message)

    check_bounds(s.server, of_server)
    s.server.check(of_server)
    _workload(s.workload, fail)
    _load(s.load, s.workload, fail)
    _fits(s, fail)
    if s.calibration and s.table:
        raise fail(("table",), "expected either calibration or table, found both")
    for i, figure in enumerate(s.published):
        _figure(figure, ("published", i), fail)
    for name in s.slo:
        known(name, (*LATENCIES, "error_rate"), "metric", ("slo", name), fail)
    for name in s.goal.slo if s.goal is not None else ():
        known(name, (*LATENCIES, "error_rate"), "metric", ("goal", "slo", name), fail)
    for name in s.tolerances:
        known(name, COMPARED, "metric", ("tolerances", name), fail)
    if s.launch is not None:
        _launch(s.launch, fail)
    files: list[tuple[Key, str | None]] = [(("calibration",), s.calibration), (("table",), s.table)]
    for i, part in enumerate(s.workload.parts):
        at: Key = ("workload", "classes", i) if s.workload.classes else ("workload",)
        for name in ("empirical", "trace"):
            if (given := getattr(part, name)) is not None:
                mapped = isinstance(given, RequestFile)
                files.append(((*at, name, "file") if mapped else (*at, name), given.file if mapped else given))
    for key, file in files:
        if file is not None and not Path(file).exists():
            raise fail(key, f"no such file: {file}")


def _launch(launch: Launch, fail: Fail) -> None:
    at: Key = ("launch",)
    for i, name in enumerate(launch.env):
        if "=" in name:
            raise fail((*at, "env", i), "expected only the name of a variable; its value stays in the environment")
    if not launch.command and not launch.model:
        raise fail((*at, "model"), "missing; expected a model for docker, or a command that starts the server")
    if launch.command and (launch.image or launch.volumes):
        key = "image" if launch.image else "volumes"
        raise fail((*at, key), "expected none beside a command, which runs without docker")
    given: list[tuple[Key, str]] = [(("command", i), word) for i, word in enumerate(launch.command)]
    given += [(("args", name), f"--{name}") for name in launch.args]
    for below, word in given:
        if (variable := SECRETS.get(word.partition("=")[0].replace("_", "-"))) is not None:
            raise fail((*at, *below), f"expected no secret in a file; put it into the environment ({variable})")


OF_A_CLASS = (*(name for name in LATENCIES if not name.startswith("itl")), "error_rate")  # steps have no class


def _fleet(s: Scenario, fail: Fail) -> None:
    at: Key = ("fleet",)
    if s.price is not None and s.price.replicas_per_node > 1 and s.price.per != "node":
        raise fail(("price", "replicas_per_node"), "expected it with per: node")
    if s.fleet is None:
        return
    if s.replicas != 1:
        raise fail(("replicas",), "expected fleet.replicas instead: there is a fleet")
    for name in ("failures", "autoscaler"):
        if getattr(s.fleet, name) is not None:
            raise fail((*at, name), f"expected none: {name} is not simulated yet")
    if isinstance(found := s.fleet.replicas, Bounds) and found.low > found.high:
        raise fail((*at, "replicas"), f"expected low <= high, found {found.low} and {found.high}")
    _groups(s, fail)
    most = found.high if isinstance(found, Bounds) else s.fleet.count
    if s.fleet.detection.active is not None and s.fleet.detection.passive is not None:
        raise fail((*at, "detection"), "expected either active or passive, found both")
    try:
        check_balancer(s.fleet)
    except BadInput as e:
        raise fail(tuple((e.key or "").split(".")), e.message) from None
    down: dict[int, float] = {}
    for i, outage in sorted(enumerate(s.fleet.outages), key=lambda entry: entry[1].at):
        key = (*at, "outages", i)
        if outage.replica >= most:
            raise fail((*key, "replica"), f"expected 0 to {most - 1}, found {outage.replica}")
        if outage.at < down.get(outage.replica, 0.0):
            raise fail((*key, "at"), f"expected a time after the outage before ({down[outage.replica]:g} s)")
        down[outage.replica] = outage.at + outage.seconds


def _groups(s: Scenario, fail: Fail) -> None:
    assert s.fleet is not None
    if s.fleet.groups and s.fleet.replicas != 1:
        raise fail(("fleet", "replicas"), "expected none beside groups, which have their own")
    for i, group in enumerate(s.fleet.groups):
        at: Key = ("fleet", "groups", i)
        if group.name in [other.name for other in s.fleet.groups[:i]]:
            raise fail((*at, "name"), f"expected another name: two groups are called {group.name!r}")
        if group.calibration is not None and not Path(group.calibration).exists():
            raise fail((*at, "calibration"), f"no such file: {group.calibration}")
        if group.server is None:
            continue
        if group.server.engine != s.server.engine:
            raise fail((*at, "server", "engine"), f"expected {s.server.engine}, as the scenario has it: no mix so far")

        def of_server(key: Key, message: str, at: Key = at) -> UserError:
            return fail((*at, "server", *key), message)

        check_bounds(group.server, of_server)
        group.server.check(of_server)


def _workload(w: Workload, fail: Fail) -> None:
    at: Key = ("workload",)
    if w.classes:
        _classes(w, fail)
        return
    _lengths_of(w, at, fail)


def _classes(w: Workload, fail: Fail) -> None:
    """Each class is a workload of its own, and nothing stands beside them."""
    at: Key = ("workload", "classes")
    for name in Workload.__struct_fields__:
        if name != "classes" and getattr(w, name) != getattr(Workload(), name):
            raise fail(("workload", name), "expected it in each of the classes")
    names = [each.name for each in w.classes]
    for i, each in enumerate(w.classes):
        if not each.name.strip() or names.index(each.name) < i:
            raise fail((*at, i, "name"), f"expected classes of different names, found {each.name!r}")
        for name in ("trace", "classes"):
            if getattr(each, name):
                raise fail((*at, i, name), "expected none: a class has lengths or empirical")
        _lengths_of(each, (*at, i), fail)
        for name in each.slo:
            known(name, OF_A_CLASS, "metric", (*at, i, "slo", name), fail)


def _lengths_of(w: Workload, at: Key, fail: Fail) -> None:
    given = [name for name in ("prompt_tokens", "output_tokens", "max_new_tokens") if getattr(w, name) is not None]
    lengths = given if given != ["max_new_tokens"] else []  # which may stand beside a file
    ways = [*lengths[:1], *(name for name in ("empirical", "trace") if getattr(w, name) is not None)]
    if len(ways) != 1:
        what = "none" if not ways else " and ".join(ways)
        raise fail(
            (*at, *ways[1:2]), f"expected prompt_tokens with output_tokens, or empirical, or trace; found {what}"
        )
    if lengths and (w.prompt_tokens is None or len(lengths) < 2):
        name = "prompt_tokens" if w.prompt_tokens is None else "output_tokens"
        raise fail((*at, name), "missing; expected a number of tokens or a distribution")
    for name in ("empirical", "trace"):
        if isinstance(source := getattr(w, name), RequestFile):
            _source(source, (*at, name), fail)
    for name in given:
        _lengths(getattr(w, name), (*at, name), fail)
    if w.sessions is not None:
        _lengths(w.sessions.turns, (*at, "sessions", "turns"), fail)
        if w.system_prompt_tokens:
            raise fail((*at, "system_prompt_tokens"), "expected it under workload.sessions")
    if w.conversations is not None and w.trace is not None:
        key = "sessions" if w.sessions is not None else "system_prompt_tokens"
        raise fail((*at, key), "expected none beside a trace, whose prompts are whole")
    if w.ignore_eos and w.max_new_tokens is not None and (w.output_tokens is not None or not lengths):
        raise fail((*at, "max_new_tokens"), "expected none: with ignore_eos every answer is as long as is asked for")
    if isinstance(w.output_tokens, int) and isinstance(w.max_new_tokens, int) and w.output_tokens > w.max_new_tokens:
        raise fail(
            (*at, "output_tokens"), f"expected at most max_new_tokens ({w.max_new_tokens}), found {w.output_tokens}"
        )


def _source(source: RequestFile, at: Key, fail: Fail) -> None:
    if source.window is not None and not source.window[0] < source.window[1]:
        raise fail((*at, "window"), f"expected [from, to] in s, found {list(source.window)}")
    for name in ("scale", "compress", "window"):
        if at[-1] == "empirical" and getattr(source, name) not in (1, None):
            raise fail((*at, name), "expected it under trace: lengths alone have no arrivals to change")


def _lengths(lengths: int | Lengths, key: Key, fail: Fail) -> None:
    if isinstance(lengths, int):
        return
    laws = [name for name in Lengths.__struct_fields__ if getattr(lengths, name) is not None]
    if len(laws) != 1:
        raise fail(key, f"expected one of {', '.join(Lengths.__struct_fields__)}, found {' and '.join(laws) or 'none'}")
    at = (*key, laws[0])
    if lengths.uniform is not None:
        low, high = lengths.uniform
        if low > high:
            raise fail(at, f"expected [low, high] with 1 <= low <= high, found [{low}, {high}]")
    law = lengths.lognormal or lengths.exponential or lengths.geometric
    if law is not None and law.high is not None and law.high < law.low:
        raise fail((*at, "high"), f"expected at least low ({law.low}), found {law.high}")


def _load(load: Load, workload: Workload, fail: Fail) -> None:
    at: Key = ("load",)
    ways = [name for name in ("users", "rate", "trace", "profile") if getattr(load, name) not in (None, False)]
    if len(ways) != 1:
        raise fail(
            (*at, *ways[1:2]), f"expected one of users, rate, trace, profile, found {' and '.join(ways) or 'none'}"
        )
    ladder: list[Any] | None = load.users if load.users is not None else load.rate
    for i, (before, after) in enumerate(pairwise(ladder or []), 1):
        if after <= before:  # users are added to those already running, and corners are read off rising loads
            what = "users" if ways[0] == "users" else "requests/s"
            raise fail((*at, ways[0], i), f"expected more {what} than the rung before ({before:g}), found {after:g}")
    if load.profile is not None:
        rates = load.profile.requests_per_second
        if len(rates) != 24 or not any(rates):
            what = f"{len(rates)} rates" if len(rates) != 24 else "no requests"
            raise fail((*at, "profile", "requests_per_second"), f"expected 24 rates, one for each hour, found {what}")
    if load.trace and workload.trace is None:
        raise fail((*at, "trace"), "expected a workload.trace to take the arrivals from")
    if not isinstance(load.arrivals, Gamma):
        known(load.arrivals, ("poisson", "constant", "gamma"), "arrivals", (*at, "arrivals"), fail)
        if load.arrivals == "gamma":
            raise fail((*at, "arrivals"), "expected its burstiness with it: {gamma: {cv: 2}}")


def _fits(s: Scenario, fail: Fail) -> None:
    """A request of fixed lengths that would hang the real server (`EngineFlags.check_fits`)."""
    for w in s.workload.parts:
        _fits_one(s, w, fail)


def _fits_one(s: Scenario, w: Workload, fail: Fail) -> None:
    asked = w.max_new_tokens if w.max_new_tokens is not None else w.output_tokens
    if not isinstance(w.prompt_tokens, int) or not isinstance(asked, int):
        return
    try:
        shared = 0 if w.conversations is None else w.conversations.system_prompt_tokens
        s.server.check_fits(shared + w.prompt_tokens, asked)
    except CannotFit as e:
        raise fail(("workload",), str(e)) from e


def _figure(figure: Figure, at: Key, fail: Fail) -> None:
    known(figure.metric, (*COMPARED, *OF_A_LADDER), "metric", (*at, "metric"), fail)
    if figure.users is None and figure.metric not in OF_A_LADDER:
        raise fail((*at, "users"), f"missing; {figure.metric} was measured at a number of users")
