"""Checks the lengths and flags of a scenario against the limits that a server tells."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from measure.server.detection import Server, is_length
from sim.engines.tgi_0_9_4 import Flags
from sim.model.errors import BadInput, UserError
from sim.model.flags import SCENARIO, names, told_by
from sim.model.identity import is_engine
from sim.model.scenario import Scenario
from sim.model.server import EngineFlags
from sim.model.warning import Notice, notice
from sim.model.workload import Lengths, RequestLengths

FITTING = ("max_batch_total_tokens", "max_input_length", "max_total_tokens")
LIMITS = {  # of TGI's `/info`, by their names in 0.9.4: the names in later versions
    "max_input_length": ("max_input_length", "max_input_tokens"),
    "max_total_tokens": ("max_total_tokens",),
    "max_batch_prefill_tokens": ("max_batch_prefill_tokens",),
    "max_batch_total_tokens": ("max_batch_total_tokens",),
}


class Unfit(UserError):
    """The server cannot serve the scenario's workload."""


def bounds(lengths: int | Lengths | None, column: Any = None) -> tuple[int, int | None]:
    """The least and the greatest number of tokens; None if the distribution is unbounded."""
    if column is not None:
        return int(column.min()), int(column.max())
    if isinstance(lengths, int):
        return lengths, lengths
    if lengths is not None and lengths.uniform is not None:
        return lengths.uniform
    drawn = None if lengths is None else lengths.lognormal or lengths.exponential or lengths.geometric
    return (1, None) if drawn is None else (drawn.low, drawn.high)


def _check_fits(info: dict[str, Any], server: EngineFlags, prompt: int | None, new: int | None) -> None:
    """Raise `CannotFit` if a request would block the server's queue for ever (fixed in TGI 2.0).

    `/info` does not tell the prefill budget: it is taken from the scenario.
    """
    known = {name: info[name] for name in FITTING if isinstance(info.get(name), int)}
    flags = msgspec.structs.replace(server if isinstance(server, Flags) else Flags(), **known)
    if not isinstance(flags.max_batch_total_tokens, int) or new is None:
        return
    longest = min(prompt or flags.max_input_length, flags.max_input_length)
    flags.check_fits(longest, min(new, flags.max_total_tokens - longest))


def _check_lengths(server: Server, prompt: tuple[int, int | None], total: tuple[int, int | None]) -> Iterable[Notice]:
    """Compare (least, greatest) lengths with the limits that the server tells; returns warnings."""
    warnings = []
    limits = dict(server.limits)
    for name, called in LIMITS.items():
        for found in ((server.info or {}).get(key) for key in called):
            if found is not None and is_length(found):
                limits[name] = found
    for name, limit in limits.items():
        alone = name in ("max_input_length", "max_batch_prefill_tokens")
        (least, most), what = (prompt, "prompts") if alone else (total, "prompts plus answers")
        if server.api == "tgi":
            if least > limit:
                flag = f"--{name.replace('_', '-')}"
                raise Unfit(
                    f"the server's {name} is {limit}, the scenario's {what} have {least} tokens: start it with "
                    f"{flag} {least}"
                )
            if "batch" in name and most is not None and most > limit:
                warnings.append(
                    notice(
                        "never-scheduled",
                        f"{what} may exceed the server's {name} {limit}; such requests may never be scheduled",
                    )
                )
            elif "batch" not in name and (most is None or most > limit):
                warnings.append(
                    notice(
                        "refused-lengths",
                        f"{what} may exceed the server's {name} {limit}; such requests end with status validation",
                    )
                )
        elif max(least, most or 0) > limit:
            raise Unfit(
                f"the server's {name} is {limit}, the scenario's {what} have up to {most or least} tokens: answers "
                f"would be cut short or refused; raise it (vLLM: --max-model-len {most or least}), or ask for less"
            )
        elif most is None:
            warnings.append(
                notice(
                    "answers-limited",
                    f"{what} may exceed the server's {name} {limit}; such answers are cut short or refused",
                )
            )
    return warnings


def check_measurable(scenario: Scenario) -> None:
    """Raise `BadInput` for a workload that the load generator cannot send, and for a fleet."""
    scenario.check_alone("measured")
    for key, given in (("workload.classes", scenario.workload.classes), ("load.profile", scenario.load.profile)):
        if given:
            raise BadInput("is simulated only, so far: measure each load on its own", key=key)
    if scenario.workload.conversations is not None:
        key = "sessions" if scenario.workload.sessions is not None else "system_prompt_tokens"
        raise BadInput("is simulated only: the load generator sends independent prompts", key=f"workload.{key}")


def check_limits(server: Server, scenario: Scenario, lengths: RequestLengths | None = None) -> list[Notice]:
    """Warnings about measuring this scenario on this server; raises `Unfit` if no request can succeed, and `CannotFit`
    if one could never be scheduled."""
    check_measurable(scenario)
    info, warnings = server.info or {}, [*server.warnings, *(lengths.warnings if lengths is not None else ())]
    work = scenario.workload
    new = work.max_new_tokens if work.max_new_tokens is not None else work.output_tokens
    prompt = bounds(work.prompt_tokens, None if lengths is None else lengths.prompt_tokens)
    answer = bounds(new, None if lengths is None else lengths.max_new_tokens)
    total = (prompt[0] + answer[0], None if prompt[1] is None or answer[1] is None else prompt[1] + answer[1])
    if lengths is not None:
        total = bounds(None, lengths.prompt_tokens + lengths.max_new_tokens)
    warnings += _check_lengths(server, prompt, total)
    if server.api == "tgi" and str(info.get("version", "")).startswith(("0.9.", "1.")):
        _check_fits(info, scenario.server, prompt[1], answer[1])
    ours = is_engine(server.engine, scenario.server.declared)
    told = told_by(type(scenario.server), info) if ours else {}
    written = scenario.flags
    for name, value in told.items():
        wanted = getattr(scenario.server, name)
        if written[name].source == SCENARIO and isinstance(wanted, type(value)) and wanted != value:
            warnings.append(
                notice(
                    "flag-differs",
                    f"the server's {name} is {value}, the scenario's {wanted}; the server's value is used",
                )
            )
    if ours:
        used = scenario.server.as_told(told)
        warnings += [
            notice(
                "flag-differs",
                f"the scenario's {name} {getattr(scenario.server, name)} is not used: the server tells its "
                f"{', '.join(told)}",
            )
            for name in names(type(used))
            if getattr(used, name) is None and getattr(scenario.server, name) is not None
        ]
    permits = permits_of(server, scenario)
    if permits is not None and max(scenario.load.users or [0]) > permits:
        warnings.append(
            notice(
                "permits-exceeded",
                f"the ladder goes to {max(scenario.load.users or [0])} users, but the server accepts {permits} at a "
                "time",
            )
        )
    return warnings


def permits_of(server: Server, scenario: Scenario) -> int | None:
    """How many requests the server accepts at a time, if it tells (TGI), or the scenario knows (vLLM's
    max_num_queued_reqs); None for no known limit."""
    told = (server.info or {}).get("max_concurrent_requests")
    if isinstance(told, int):
        return told
    asked = scenario.server
    return asked.permits if server.api != "tgi" and is_engine(server.engine, asked.declared) else None
