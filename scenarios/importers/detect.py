"""Which tool wrote a file, recognised by its content, and its results as a run.

Each tool has its module, whose table maps its fields to those of a run. A run keeps what the tool recorded, and its
warnings say what is missing. Files that only hold aggregates, or do not record when each request was sent, are refused,
with the name of the file of the same tool that does (`AGGREGATES`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from scenarios.importers import aiperf, genai_perf, guidellm, inference_perf, locust_csv, vllm_bench
from scenarios.importers.results import has
from scenarios.importers.served import Served, with_engine
from scenarios.importers.sums import as_scenario
from sim.model.errors import BadInput
from sim.model.files.rows import read_text
from sim.run import Run

KNOWN = (
    "expected guidellm's JSON report, what `vllm bench serve --save-result --save-detailed` or sglang's bench_serving "
    f"with --output-details writes, aiperf's {aiperf.RECORDS} or its folder, genai-perf's profile_export.json, "
    "inference-perf's per_request_lifecycle_metrics.json, locust's _stats_history.csv, or the rows of locust-plugins' "
    "JmeterListener"
)
# Keys by which a file of aggregates is recognised, and what it is: a run needs each request
AGGREGATES = {
    ("results_ttft_s_mean", "num_concurrent_requests"): (
        "llmperf's summary: sums over all requests, and its other file does not say when each was sent, either; its "
        "means can be the `published` figures of a scenario"
    ),
    ("ttft_s", "end_to_end_latency_s"): (
        "llmperf's responses: they do not say when each request was sent, so the load is not known; the means "
        "can be the `published` figures of a scenario"
    ),
    ("load_summary", "successes"): (
        "inference-perf's sums of a stage; expected per_request_lifecycle_metrics.json, which it writes with "
        "report.request_lifecycle.per_request: true"
    ),
    ("request_throughput", "request_latency", "input_config"): (
        "genai-perf's sums; expected profile_export.json, which it writes beside them"
    ),
    ("prompt_tokens", "output_tokens"): "a trace, not a measurement; name it in a scenario, as workload.trace",
    ("input_length", "output_length"): "a trace, not a measurement; name it in a scenario, as workload.trace",
}
CSV_AGGREGATES = {
    "Metric,avg,": "aiperf's or genai-perf's sums; expected profile_export.jsonl or profile_export.json beside them",
    "TIMESTAMP,ContextTokens": "a trace, not a measurement; name it in a scenario, as workload.trace",
    "Timestamp,Model,Request tokens": "a trace, not a measurement; name it in a scenario, as workload.trace",
    "arrived_at,": "a trace, not a measurement; name it in a scenario, as workload.trace",
}


@np.errstate(over="ignore", invalid="ignore")  # impossible times are refused by name once they are together
def import_results(path: Path, served: Served | None = None) -> Run:
    """The run of another tool's results: a file, plain or `.gz`, or the folder of an aiperf sweep; `served` is the
    engine that the user names.

    Raises `BadInput` for what none of them wrote, or wrote without saying when each request was sent.
    """
    try:
        return with_engine(_read(path), served)
    except OverflowError as e:
        raise BadInput("a number of it is too large", path=path) from e
    except UnicodeEncodeError as e:  # what JSON's \\ud800 is
        raise BadInput("holds half a character", path=path) from e


def import_sums(path: Path, served: Served | None) -> str:
    """A scenario with the sums of another tool's results as its published figures."""
    documents = _documents(_text(path), path)
    return as_scenario(documents, path, served)


def _read(path: Path) -> Run:
    if path.is_dir():
        return _aiperf(aiperf.records_in(path), path)
    text = read_text(path, KNOWN.removeprefix("expected "))
    if locust_csv.recognises(text):
        return locust_csv.read(text, path)
    plain = text.lstrip().replace('"', "").replace(";", ",")
    for begins, what in CSV_AGGREGATES.items():
        if plain.startswith(begins):
            raise BadInput(what, path=path)
    documents = _documents(text, path)
    if len(documents) == 1 and isinstance(documents[0], list) and documents[0]:
        documents = documents[0]
    first = documents[0]
    if aiperf.is_summary(first) and not guidellm.recognises(first):
        return _aiperf([aiperf.records_of(path)], path)
    if aiperf.recognises(first):
        return aiperf.read({path: documents}, path)
    if guidellm.recognises(first):
        return guidellm.read(first, path)
    if vllm_bench.recognises(first):
        return vllm_bench.read(documents, path)
    if genai_perf.recognises(first):
        return genai_perf.read(first, path)
    if inference_perf.recognises(first):
        return inference_perf.read(documents, path)
    for keys, what in AGGREGATES.items():
        if has(first, *keys):
            raise BadInput(what, path=path)
    raise BadInput(f"not a known tool's results; {KNOWN}", path=path)


def _aiperf(files: list[Path], path: Path) -> Run:
    if not files:
        raise BadInput(f"no {aiperf.RECORDS} in it; {KNOWN}", path=path)
    for file in files:
        if not file.is_file():
            raise BadInput("missing; expected the requests, which aiperf --export-level records writes", path=file)
    return aiperf.read({file: _documents(_text(file), file) for file in files}, path)


def _text(path: Path) -> str:
    return read_text(path, KNOWN.removeprefix("expected "))


def _documents(text: str, path: Path) -> list[Any]:
    """A JSON document, or one a line, or several one after the other, as appending to a file leaves them."""
    try:
        return [msgspec.json.decode(text)]
    except (msgspec.DecodeError, RecursionError):
        found: list[Any] = []
    # Python's own reader knows where a document ends, and takes the Infinity that other tools write for a rate
    decoder = json.JSONDecoder(strict=False)
    at, length = 0, len(text)
    while True:
        while at < length and text[at] in " \t\r\n,":
            at += 1
        if at >= length:
            break
        try:
            document, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            line = text.count("\n", 0, at) + 1
            raise BadInput(f"not JSON ({str(e).partition(':')[0]}); {KNOWN}", path=path, line=line) from e
        found.append(document)
    if not found:
        raise BadInput(f"empty; {KNOWN}", path=path)
    return found
