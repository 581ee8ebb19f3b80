"""Warnings: why not to trust a number, how much that matters, and what to do about it.

`KINDS` has every kind of warning with its severity and advice; the text is written where the warning arises, which is
where its numbers are. Output shows the few that matter most, files keep all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum

import msgspec

SHOWN = 3  # as many as are read


class Severity(StrEnum):
    """What is wrong with the number; the first matters most. A forecast's band holds what its draws hold."""

    WRONG = "wrong"  # it is a number of something else: another machine, server or traffic, or nothing steady
    BIASED = "biased"  # it is off by an amount that its band does not include
    UNCERTAIN = "uncertain"  # its band includes the reason, and is wider for it
    NOTE = "note"  # how an input was read: nothing is off


class Notice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A warning. `code` is the same for all of a kind, and in every version."""

    text: str
    code: str = "stated"  # by the author of a scenario
    severity: Severity = Severity.BIASED
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.text}. {self.advice}" if self.advice else self.text

    def of(self, what: str) -> Notice:
        """The same warning about a part (a run, a load), which its text then begins with."""
        return msgspec.structs.replace(self, text=f"{what}: {self.text}")


KINDS: dict[str, tuple[Severity, str]] = {
    "assumed-times": (Severity.WRONG, "Calibrate from a run of your own server."),
    "different-machines": (Severity.WRONG, "Calibrate each machine from its own runs."),
    "empty-window": (Severity.WRONG, "Measure a longer window (load.seconds)."),
    "engines-differ": (Severity.WRONG, "Compare two runs of one engine."),
    "figures-inconsistent": (Severity.WRONG, "Check the figures and the flags they were measured with."),
    "fit-check-failed": (Severity.WRONG, "Measure the loads that its check is off at again, and calibrate from that."),
    "no-machine-fits": (Severity.WRONG, "Check the scenario's flags against the server's launch command."),
    "no-requests": (Severity.WRONG, "Check that the server can be reached (`servecast doctor`), and measure again."),
    "no-steady-state": (Severity.WRONG, "Lower the rate, or add replicas."),
    "no-verdict": (
        Severity.WRONG,
        "Measure longer windows (load.seconds), or leave this metric out of the tolerances.",
    ),
    "other-engine-table": (Severity.WRONG, "Calibrate from a run of your own server."),
    "other-machine": (Severity.WRONG, "Calibrate from a run of this machine."),
    "other-traffic": (Severity.WRONG, "Measure while no other client uses the server."),
    "padding-differs": (Severity.WRONG, "Calibrate from a run of a server with this setting."),
    "scenarios-differ": (Severity.WRONG, "Compare two of the same."),
    "server-stopped": (Severity.WRONG, "Look at the server's log."),
    "several-servers": (Severity.WRONG, "Measure one server at a time, without a balancer in between."),
    "table-no-form": (Severity.WRONG, "Calibrate from a run instead."),
    "taken-as": (Severity.WRONG, "Calibrate from a run of the engine that is forecast."),
    "unknown-engine-table": (
        Severity.WRONG,
        "Add a column `engine` to the table, or calibrate from a run of your own server.",
    ),
    "answers-limited": (Severity.BIASED, "Shorten the prompts or answers, or raise the limit."),
    "answers-long": (
        Severity.BIASED,
        "Make the server apply max_tokens, or write the lengths that come back into the scenario.",
    ),
    "answers-short": (
        Severity.BIASED,
        "Make the server apply the requested length, or write the lengths that come back into the scenario.",
    ),
    "broken-streams": (Severity.BIASED, "Find out why they broke off, and measure again."),
    "burst": (Severity.BIASED, "Measure with a fixed number of users, or at a fixed rate."),
    "client-late": (Severity.BIASED, "Use more --processes, fewer users, or a faster client."),
    "client-limited": (Severity.BIASED, "Use more --processes, fewer users, or a faster client."),
    "cut-short": (Severity.BIASED, "Give a larger budget, or continue with --resume."),
    "extrapolated": (Severity.BIASED, "Measure and calibrate at such a load (`calibrate --advise`)."),
    "failures-in-sums": (Severity.BIASED, "Find the cause of the errors, and measure again."),
    "fit-unchecked": (Severity.BIASED, "Measure whole windows (load.seconds)."),
    "flag-default": (Severity.BIASED, "Look it up in the server's launch command, and write it into the scenario."),
    "flag-differs": (Severity.BIASED, "Correct the scenario."),
    "flag-unconfirmed": (Severity.BIASED, "Check it against the server's launch command."),
    "flags-contradicted": (Severity.BIASED, "Compare the scenario's flags with the server's launch command."),
    "headers-only": (Severity.BIASED, "Measure streamed answers with `servecast measure`."),
    "imprecise-window": (Severity.BIASED, "Raise load.max_seconds."),
    "in-flight-off": (Severity.BIASED, "Measure a longer window (load.seconds)."),
    "load-capped": (
        Severity.BIASED,
        "Measure again without the tool's limit of concurrent requests, or give users in place of the rate.",
    ),
    "lumped-tokens": (Severity.BIASED, "Check proxies and the client between server and load generator for buffering."),
    "never-scheduled": (Severity.BIASED, "Shorten the prompts or answers, or raise the limit."),
    "no-draws": (Severity.BIASED, "Calibrate again to have them."),
    "no-first-token": (Severity.BIASED, "Stream the answers, and record when the first token came."),
    "no-prompt-lengths": (Severity.BIASED, "Give the prompt lengths in a scenario, or measure again."),
    "no-streaming": (Severity.BIASED, "Turn streaming on, or expect a calibration from latencies only."),
    "not-forecast": (Severity.BIASED, "Simulate longer windows (load.seconds), or give the forecast these loads."),
    "not-settled": (Severity.BIASED, "Raise load.max_seconds."),
    "not-steady": (Severity.BIASED, "Lower the rate, or measure a longer window (load.seconds)."),
    "only-sums": (Severity.BIASED, "Record every request: locust's events, or servecast measure."),
    "outlying-rung": (Severity.BIASED, "Measure this load again."),
    "prefix-cached": (
        Severity.BIASED,
        "Measure with prompts that share no beginning, or with the server's prefix cache off.",
    ),
    "prompt-length-off": (Severity.BIASED, "Check --model and the tokenizer of the prompts."),
    "prompt-length-unconfirmed": (Severity.BIASED, "Check the length of a prompt with the server's tokenizer."),
    "ramp-in-window": (
        Severity.BIASED,
        "Measure for longer, or with `servecast measure`, whose windows leave the ramp out.",
    ),
    "rate-changed": (Severity.BIASED, "Send requests at one rate to measure a load."),
    "refused-lengths": (Severity.BIASED, "Shorten the prompts or answers, or raise the limit."),
    "requests-failed": (Severity.BIASED, "Find the cause of the errors, and measure again."),
    "requests-refused": (Severity.BIASED, "Raise max_input_length and max_total_tokens, or shorten the requests."),
    "requests-sampled": (Severity.BIASED, "Run guidellm without sample_size."),
    "short-window": (Severity.BIASED, "Measure a longer window (load.seconds)."),
    "steps-disagree": (
        Severity.BIASED,
        "Compare the client's record with the server's /metrics before trusting the fit.",
    ),
    "table-unit-odd": (Severity.BIASED, "Check the unit of the table's times."),
    "time-unit-odd": (Severity.BIASED, "Set `time_unit` of the trace."),
    "tokens-guessed": (
        Severity.BIASED,
        "Measure with a version of the tool that counts tokens, or with `servecast measure`.",
    ),
    "unknown-user": (Severity.BIASED, "Record the user of each request to replay it as it was."),
    "unstreamed-answers": (Severity.BIASED, "Stream every answer."),
    "users-missing": (Severity.BIASED, "Give all files of the run."),
    "users-not-started": (Severity.BIASED, "Raise load.spawn_rate or load.max_seconds."),
    "version-unknown": (Severity.BIASED, "Compare the forecast with a run of this version before trusting it."),
    "whole-seconds": (Severity.BIASED, "Write them with JmeterListener(timestamp_format='%Y-%m-%d %H:%M:%S.%f')."),
    "batch-context-collinear": (
        Severity.UNCERTAIN,
        "Measure one rung with other output lengths (`--advise` says which).",
    ),
    "budget-bounded": (Severity.UNCERTAIN, "Write it into the scenario if it is known."),
    "budget-differs": (Severity.UNCERTAIN, "Write it into the scenario."),
    "budget-inferred": (Severity.UNCERTAIN, "Write it into the scenario if it is known."),
    "budget-unseen": (
        Severity.UNCERTAIN,
        "Measure a load at which requests wait for it, or write it into the scenario.",
    ),
    "client-limited-steps": (Severity.UNCERTAIN, "Measure those loads with more --processes or a faster client."),
    "figure-left-out": (Severity.UNCERTAIN, "Check this figure, and the flags and lengths it was measured with."),
    "figures-few-machines": (Severity.UNCERTAIN, "Check the figures and their rounding, or measure a run of your own."),
    "figures-prior": (Severity.UNCERTAIN, "Calibrate from a run of this machine to be independent of that."),
    "figures-undetermined": (Severity.UNCERTAIN, "Measure a run of your own to narrow them."),
    "latency-only": (Severity.UNCERTAIN, "Stream the answers to measure steps."),
    "latency-only-lengths": (Severity.UNCERTAIN, "Stream the answers to forecast other lengths."),
    "no-single-user": (Severity.UNCERTAIN, "Measure a rung of one user."),
    "no-steps": (Severity.UNCERTAIN, "Stream the answers to measure steps."),
    "one-prompt-length": (Severity.UNCERTAIN, "Measure one rung with other prompt lengths (`--advise` says which)."),
    "prefill-collinear": (Severity.UNCERTAIN, "Measure one rung with other prompt lengths (`--advise` says which)."),
    "run-without-steps": (Severity.UNCERTAIN, "Stream the answers to measure steps."),
    "windows-only": (Severity.UNCERTAIN, "Ask for fewer days, or for a window of the trace, to simulate all of it."),
    "short-window-slo": (
        Severity.UNCERTAIN,
        "Simulate longer windows (load.seconds) to know the long-run probability.",
    ),
    "steps-lumped": (
        Severity.UNCERTAIN,
        "Check proxies and the client between server and load generator for buffering.",
    ),
    "steps-stalled": (
        Severity.UNCERTAIN,
        "Look for other work on the server's machine at that time; forecasts do not include stalls.",
    ),
    "table-collinear": (Severity.UNCERTAIN, "Add rows with more, or fewer, tokens out than in."),
    "table-one-batch": (Severity.UNCERTAIN, "Add rows of larger batches."),
    "turnaround-assumed": (Severity.UNCERTAIN, "Measure a ladder of users to know it."),
    "two-patterns": (Severity.UNCERTAIN, "Compare several runs of this load, since each follows one of them."),
    "answers-cut": (Severity.NOTE, "Correct max_new_tokens in the file if the answers were that long."),
    "blank-lines": (Severity.NOTE, ""),  # corrected on reading
    "bundled-tokens": (Severity.NOTE, "Compare TPOT in place of ITL, or let the server send one token an event."),
    "closing-chunk": (Severity.NOTE, ""),  # corrected on reading
    "column-chosen": (Severity.NOTE, "Name the column under `columns` to choose another."),
    "decimal-commas": (Severity.NOTE, ""),  # read as they were meant
    "due-times-missing": (
        Severity.NOTE,
        "Expect TTFT and E2E without the wait before the send; `servecast measure` includes it.",
    ),
    "duplicate-requests": (Severity.NOTE, ""),  # corrected on reading
    "ends-missing": (Severity.NOTE, ""),  # no tool records the end of a request that it gave up
    "engine-unknown": (
        Severity.NOTE,
        "Import it with --engine, such as vllm-0.32.0, or forecast it with --as.",
    ),
    "engine-differs": (Severity.NOTE, "Correct server.engine if the forecast is to be of this server."),
    "figures-no-noise": (Severity.NOTE, "Calibrate from a run of your own to measure them."),
    "fitted-run-grown": (Severity.NOTE, "Calibrate again to use all of it."),
    "fitted-run-guessed": (Severity.NOTE, "Calibrate again to record the file as it is now."),
    "impossible-info": (Severity.NOTE, "Check what the server answers at /info."),
    "impossible-requests": (Severity.NOTE, "Check the clock and the tool that wrote the run."),
    "itl-not-compared": (Severity.NOTE, "Compare TPOT, which does not depend on how tokens are sent."),
    "labels-merged": (Severity.NOTE, "Import a file with the rows of one label to keep them apart."),
    "lengths-missing": (Severity.NOTE, "Add their lengths to the file if they belong to the workload."),
    "limits-missing": (
        Severity.NOTE,
        "Write max_new_tokens into the scenario if more was asked for: the token budget is charged for it.",
    ),
    "load-differs": (Severity.NOTE, "Check the load tool and its machine if the other load was meant."),
    "load-guessed": (Severity.NOTE, "Say which load it was if that is wrong."),
    "load-missing": (Severity.NOTE, "Measure or simulate both at the same loads."),
    "mixed-loads": (Severity.NOTE, "Import users and rates as two runs to compare each with a forecast."),
    "no-metrics": (Severity.NOTE, "Check /metrics of the server."),
    "no-token-count": (Severity.NOTE, "Write the lengths into the scenario to simulate it."),
    "no-token-times": (Severity.NOTE, "Measure with `servecast measure` to have them."),
    "not-a-repeat": (Severity.NOTE, "Give a run of the same loads and lengths, with whole windows."),
    "nothing-held-out": (Severity.NOTE, "Hold rungs out (--held-out), or compare with a run that was not fitted."),
    "odd-requests": (Severity.NOTE, ""),  # they count by the times recorded, and what is odd is in the text
    "output-attained": (Severity.NOTE, "Give figures whose answers came back in full, or a run of your own."),
    "output-in-full": (
        Severity.NOTE,
        "Write `lengths: limit` beside a figure whose answers were only asked to be that long.",
    ),
    "own-requests": (Severity.NOTE, "Give --calibration to replay the recorded requests, which is closer."),
    "parameter-refused": (Severity.NOTE, ""),  # answers-short or no-token-count says what follows
    "permits-exceeded": (
        Severity.NOTE,
        "Raise it (TGI: max_concurrent_requests, vLLM: max_num_queued_reqs), or end the ladder below it.",
    ),
    "read-off-plot": (Severity.NOTE, "Give figures that were printed as numbers, or a run of your own."),
    "rows-left-out": (Severity.NOTE, "Correct these rows if they belong to the workload."),
    "scrapes-failed": (Severity.NOTE, "Check that the server answers at /metrics under load."),
    "sends-rebuilt": (Severity.NOTE, "Measure with a version of the tool that writes start_times."),
    "shared-ids": (Severity.NOTE, ""),  # an id only names a request in messages
    "sums": (
        Severity.NOTE,
        "Record every request (locust's events, or `servecast measure`) for percentiles and a calibration.",
    ),
    "surplus-chunks": (
        Severity.NOTE,
        "Measure with `servecast measure`, which goes by the server's own count of tokens.",
    ),
    "table-machine-chosen": (Severity.NOTE, "Choose another with --where."),
    "table-no-budget": (Severity.NOTE, "Write it into the scenario."),
    "table-no-joining": (Severity.NOTE, "Calibrate from a run to include both."),
    "table-no-mixed-steps": (
        Severity.NOTE,
        "Compare the forecast with a run before trusting TTFT beside long prompts.",
    ),
    "table-no-noise": (Severity.NOTE, "Calibrate from a run to include both."),
    "table-waves": (Severity.NOTE, "Write a cache size within these bounds into the scenario."),
    "time-unit-assumed": (Severity.NOTE, "Set `time_unit` of the trace if that is wrong."),
    "times-unordered": (Severity.NOTE, ""),  # corrected on reading
    "tokens-spread": (Severity.NOTE, "Use a server that counts tokens in every event (vLLM: continuous_usage_stats)."),
    "torn-line": (Severity.NOTE, ""),  # the writer was stopped within it; nothing else is lost
    "trace-cut": (Severity.NOTE, "Raise load.seconds to replay more of it."),
    "unsent-left-out": (Severity.NOTE, ""),  # they were no load
    "warm-up-left-out": (Severity.NOTE, ""),  # as the tool means it
}
_BEYOND = re.compile(r"([\d,.]+) [^\d();]*\(calibrated (?:up to|from) ([\d,.]+)")


def notice(code: str, text: str) -> Notice:
    """The warning of a kind; `LookupError` for a code that is not in `KINDS`."""
    severity, advice = KINDS[code]
    return Notice(code=code, severity=severity, text=text, advice=advice)


def ranked(notices: Iterable[Notice]) -> list[Notice]:
    """Each once, those that matter most first; equals stay in the order given."""
    order = list(Severity)
    return sorted(dict.fromkeys(notices), key=lambda found: (order.index(found.severity), -_factor(found.text)))


def _factor(text: str) -> float:
    """How far beyond the calibrated range a text says that it goes, as a factor; 1 where it says nothing."""
    found = (
        (float(asked.replace(",", "")), float(known.rstrip(".,").replace(",", "")))
        for asked, known in _BEYOND.findall(text)
    )
    return max((max(asked / known, known / asked) for asked, known in found if asked and known), default=1.0)


def folded(notices: Iterable[Notice], rest: str, most: int | None = SHOWN) -> list[str]:
    """The lines to be shown of some warnings: the `most` that matter most (None: all), and how many more there are;
    `rest` says where those are."""
    order = ranked(notices)
    shown = order[:most]
    more = len(order) - len(shown)
    return [f"warning: {found}" for found in shown] + ([f"warning: and {more} more; {rest}"] if more else [])
