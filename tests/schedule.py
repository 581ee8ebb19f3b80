"""Replay a recorded schedule of the real router (`formats.md`, Schedule witnesses) through the simulator."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import msgspec

from sim.clock import Clock
from sim.replica import Replica
from sim.request import Request
from sim.server import ServerConfig


class TickTime:
    """The witness's cost model: integer ticks."""

    def __init__(self, cost: dict[str, Any]):
        self.cost = cost

    def prefill(self, sequences: int, tokens: int, tokens_sq: int, longest: int) -> float:
        return float(self.cost["p0"] + tokens // self.cost["p_den"])

    def decode(self, sequences: int, context: int, longest: int) -> tuple[float, float]:
        return float(self.cost["d0"] + sequences // self.cost["d1"]), 0.0

    def concat(self, old: int, new: int) -> float:
        return float(self.cost["concat"])

    def filter(self, kept: int, finished: int) -> float:
        return float(self.cost["filt"])


def read_witnesses(path: Path) -> list[dict[str, Any]]:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    return [msgspec.json.decode(line) for line in raw.splitlines() if line.strip()]


def config_of(witness: dict[str, Any]) -> ServerConfig:
    flags = {k: v for k, v in witness["config"].items() if k in ServerConfig.__struct_fields__}
    return ServerConfig(**flags, max_input_length=10**9, max_total_tokens=10**9)


def replay(witness: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """The calls the simulated router makes, one per step, and what became of each request."""
    clock = Clock()
    calls: list[dict[str, Any]] = []
    times: dict[int, list[int]] = {a["uid"]: [] for a in witness["arrivals"]}
    replica: Replica

    def on_call(op: str, start: float, end: float, members: list[Request], count: int) -> None:
        uids = [r.id for r in members]
        if op == "filter":
            calls.append({"op": op, "t1": end, "uids": uids} | after_decode(op))
            return
        run = replica._run
        for j in range(count):
            t0, t1 = (
                (start, end)
                if run is None or op == "prefill"
                else (run.end(replica._done - count + j), run.end(replica._done - count + j + 1))
            )
            calls.append({"op": op, "t0": t0, "t1": t1, "uids": uids} | after_decode(op))
            for r in members:
                if not r.gone or j < count - 1:
                    times[r.id].append(int(t1))

    def after_decode(op: str) -> dict[str, Any]:
        # what the shard reports for the batch it keeps; after a prefill that is the new batch alone, which we do not hold
        last = calls[-1]["op"] if calls else None
        return {"next_max_tokens": replica.batcher.batch.used} if op == "filter" and last == "decode" else {}

    outcome: dict[int, str] = {}
    replica = Replica(
        clock,
        config_of(witness),
        TickTime(witness["cost_model"]),
        lambda r: outcome.setdefault(r.id, r.status),
        on_call=on_call,
    )
    requests = {
        a["uid"]: Request(a["uid"], a["input_length"], a["actual_new_tokens"], a["max_new_tokens"])
        for a in witness["arrivals"]
    }

    def leave(r: Request) -> None:
        if r.id not in outcome and r.queued == r.queued:
            outcome[r.id] = "gone"
            replica.leave(r)

    for a in witness["arrivals"]:
        if a["client_drop_t"] is not None:
            clock.at(a["client_drop_t"]).callbacks.append(lambda e, r=requests[a["uid"]]: leave(r))
    for a in witness["arrivals"]:
        clock.at(a["t"]).callbacks.append(lambda e, r=requests[a["uid"]]: replica.submit(r))
    clock.run()
    return calls, {uid: {"outcome": outcome.get(uid), "token_times": times[uid]} for uid in times}


NAMES = {"ok": "ok", "overloaded": "429", "gone": "client_dropped"}


def differences(witness: dict[str, Any]) -> list[str]:
    """Where the simulated schedule departs from the recorded one; empty when it is the same."""
    calls, requests = replay(witness)
    found = []
    recorded = [c for c in witness["calls"] if c["op"] != "clear"]
    for i, (mine, theirs) in enumerate(zip(calls, recorded)):
        for key in ("op", "t0", "t1", "uids", "next_max_tokens"):
            if key == "next_max_tokens" and "next_max_tokens" not in mine:
                continue
            if key in mine and key in theirs and mine[key] != theirs[key]:
                found.append(f"call {i}: {key} {mine[key]} instead of {theirs[key]} ({theirs})")
    if len(calls) != len(recorded):
        found.append(f"{len(calls)} calls instead of {len(recorded)}")
    recorded_requests = {int(k): v for k, v in witness["requests"].items()}
    for uid, theirs in recorded_requests.items():
        mine = requests[uid]
        if NAMES.get(mine["outcome"]) != theirs["outcome"]:
            found.append(f"request {uid}: {mine['outcome']} instead of {theirs['outcome']}")
        if mine["token_times"] != theirs.get("token_times", []):
            found.append(f"request {uid}: tokens at {mine['token_times']} instead of {theirs['token_times']}")
    return found
