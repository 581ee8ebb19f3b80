"""How fast a run of many requests is read, and how much memory that takes.

    python tools/bench_read.py [--requests N] [--tokens N]

Writes a run of made-up requests into a temporary folder and reads it in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HEAD = {"format": 2, "kind": "measured", "name": "many", "scenario": {"name": "many"}}


def main() -> None:
    """Write, read, print."""
    parser = argparse.ArgumentParser(description="Read a run of many requests.")
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.read is not None:
        read(asked.read)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        write(path, asked.requests, asked.tokens)
        size = (path / "requests.jsonl").stat().st_size
        print(f"{asked.requests:,} requests of {asked.tokens} tokens, {size / 1e6:,.0f} MB of JSON", flush=True)
        subprocess.run([sys.executable, __file__, "--read", str(path)], check=True)


def write(path: Path, requests: int, tokens: int) -> None:
    """A run of 100 users who ask one after another, a second each."""
    path.mkdir()
    rung = {"start": 0.0, "ramped": 1.0, "settled": 2.0, "end": requests / 100, "users": 100, "status": "complete"}
    (path / "run.json").write_text(json.dumps(HEAD | {"rungs": [rung]}))
    with (path / "requests.jsonl").open("w") as out:
        for i in range(requests):
            sent = i / 100
            times = ",".join(f"{sent + (k + 1) / (tokens + 1):.6f}" for k in range(tokens))
            out.write(
                f'{{"id":{i},"rung":0,"user":{i % 100},"sent":{sent:.6f},"ended":{sent + 1:.6f},"prompt_tokens":400,'
                f'"max_new_tokens":{tokens},"output_tokens":{tokens},"token_times":[{times}],"status":"ok",'
                '"finish_reason":"length"}\n'
            )


def read(path: Path) -> None:
    """Read it here, and print what that took."""
    from sim.run import read_run

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    run = read_run(path)
    took = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"read in {took:.1f} s of one core, {len(run.requests) / took:,.0f} requests/s")
    print(f"peak memory {peak / 1e6:.2f} GB, {1e3 * (peak - before) / len(run.requests):,.0f} bytes a request")


if __name__ == "__main__":
    main()
