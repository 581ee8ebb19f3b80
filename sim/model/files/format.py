"""The format of our files, and how data of an earlier format is read as one of today.

1. First.
2. `warnings` (with code, severity, text and advice) were `doubts` (sentences), `bottleneck` was `binding`,
   `latency_onset` was `takeoff`, `kind` was `door` (in a calibration's source, and a forecast's provenance).
   The parameter `a2` of a calibration multiplies Σ n (n + 1) / 2 over prompts of n tokens; it multiplied Σ n²
   (`sim.model.calibration.upgraded_attention`).
"""

from __future__ import annotations

from typing import Any

from sim.model.warning import KINDS, Severity

FORMAT = 2  # of what we write: runs, scenarios, calibrations, forecasts and comparisons alike
READ = (1, FORMAT)
RETIRED = {
    "roughness"
}  # parameters of noise that calibrations had, and that improved no forecast (`tools/ablation.py`)
EXPECTED = " or ".join(map(str, READ))
NOW: dict[str | int, str] = {"doubts": "warnings", "binding": "bottleneck", "takeoff": "latency_onset"}

# words of a sentence of format 1, and the code of the warning that it is today; the first that fit count
WORDS = {
    "(--as)": "taken-as",
    "no steady state from": "no-steady-state",
    "the step times are those of another": "other-machine",
    "nobody measured these step times": "assumed-times",
    "pads its batches": "padding-differs",
    "does not pad its batches": "padding-differs",
    "somebody else is using the server": "other-traffic",
    "other traffic runs on it": "other-traffic",
    "no simulated machine comes near the run": "no-machine-fits",
    "the figures do not hold together": "figures-inconsistent",
    "no form here follows this table": "table-no-form",
    "does not show what it was fitted to": "fit-check-failed",
    "not of the machine that": "different-machines",
    "counts as outside its tolerance": "no-verdict",
    "are not of the same": "scenarios-differ",
    "no request was completed in the window": "empty-window",
    "the server stopped answering": "server-stopped",
    "several servers behind one address": "several-servers",
    "scheduled here as": "other-engine-table",
    "its steps are scheduled as": "unknown-engine-table",
    "extrapolated": "extrapolated",
    "client-limited": "client-limited",
    "requests failed": "requests-failed",
    "do not pin down": "figures-undetermined",
    "of the steps are left out: their tokens came": "steps-lumped",
    "cannot be told apart": "one-prompt-length",
    "hardly told apart": "prefill-collinear",
    "moved together": "batch-context-collinear",
    "few machines show the figures": "figures-few-machines",
    "show the rest": "figure-left-out",
    "two patterns are stable": "two-patterns",
    "whose luck decides": "short-window-slo",
    "look alike": "table-collinear",
    "off by more than their bands say": "latency-only-lengths",
    "no step was seen": "no-steps",
    "are taken to have come back at output_attained": "output-attained",
    "are taken to have come back in full": "output-in-full",
    "do not tell noise from step to step": "figures-no-noise",
    "was read off a plot by eye": "read-off-plot",
    "tells neither": "table-no-noise",
    "times neither": "table-no-joining",
    "stands in for it": "ends-missing",
    "says why they ended, is left out": "closing-chunk",
    "are counted once": "duplicate-requests",
    "the last line was torn": "torn-line",
    "does not repeat": "not-a-repeat",
    "the forecast draws its own requests": "own-requests",
    "are replayed (load.settle, load.seconds)": "trace-cut",
    "has grown since it was fitted": "fitted-run-grown",
    "is taken for a run that was fitted": "fitted-run-guessed",
}


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """A document of ours in the present format. Values of a shape that no format has are left for others to refuse."""
    noise = values.get("noise")
    if isinstance(noise, dict) and noise.keys() & RETIRED:
        values = values | {"noise": {name: value for name, value in noise.items() if name not in RETIRED}}
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
        elif name == "warnings" and isinstance(value, list):
            value = [_warning(text) if isinstance(text, str) else text for text in value]
        now.setdefault(name, value)
    return now


def upgraded_step(line: dict[str, Any]) -> dict[str, Any]:
    """A line of `steps.jsonl` with the columns of today; one of format 1 has a `kind`.

    Unchanged where it does not say what was computed: then it has no statistics, either.
    """
    if not {"kind", "tokens", "prompt_sq", "max_prompt", "ended", "kept"} <= line.keys():
        return line
    work = {"passes": 1, "decode_context": line["tokens"], "decode_longest": line["max_prompt"]}
    work |= {"decode_sequences": line["sequences"], "prefill_tokens": line.get("chunk_tokens", 0)}
    work |= dict.fromkeys(("prefill_sequences", "prefill_attention", "prefill_longest", "begun", "replica"), 0)
    if line["kind"] == "prefill":
        work |= {name: 0 for name in work if name.startswith("decode_")}
        work |= {"prefill_sequences": line["sequences"], "prefill_tokens": line["tokens"], "begun": line["sequences"]}
        work |= {"prefill_attention": (line["prompt_sq"] + line["tokens"]) // 2, "prefill_longest": line["max_prompt"]}
    return work | {"chunk_share": 0.0, "dropped": line["ended"] if line["kept"] else 0} | line


def _warning(text: str) -> dict[str, Any]:
    code = next((code for words, code in WORDS.items() if words in text), "format-1")
    return {"code": code, "severity": KINDS.get(code, (Severity.BIASED,))[0], "text": text}
