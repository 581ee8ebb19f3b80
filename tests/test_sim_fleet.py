"""Several replicas behind a balancer: what must hold whichever it chooses."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest
from msgspec.structs import replace

from scenarios.forecast.replicate import replicate
from scenarios.load.scenario import load
from sim.cluster import testbed
from sim.cluster.balancers.balancer import Balancer, Change, Ending, Starts, Target
from sim.cluster.balancers.policies import balancer_of
from sim.cluster.clients import Patience
from sim.cluster.clock import Clock
from sim.cluster.fleet import Fleet, seen_between
from sim.cluster.frontend import FrontEnd
from sim.cluster.ladder import climb
from sim.cluster.replica import Replica
from sim.cluster.testbed import Bench
from sim.engines import tgi_0_9_4, vllm_v1
from sim.model import fleet
from sim.model.calibration import Calibration, Clocks, Delay, Parameter, Source
from sim.model.errors import BadInput
from sim.model.fleet import ActiveChecks, Detection, Group, Outage, PassiveChecks
from sim.model.machine import Machine
from sim.model.price import Price
from sim.model.request import Request
from sim.model.scenario import Load, Scenario
from sim.model.server import EngineFlags
from sim.model.status import Status
from sim.model.steps import held_before
from sim.model.workload import Lengths, Sampler, Workload
from sim.replicate import tasks_for
from sim.results import metrics
from sim.run import Run, read_run, write_run
from sim.steptime.linear import affine
from sim.steptime.noise_parameters import Noise

STEP_TIME = affine(a0=0.02, a1=1e-4, b0=0.03, b1=5e-4, b2=1e-6)
NOISE = Noise(prefill=[0.9, 1.0, 1.1], decode=[0.8, 1.0, 1.2], drift=0.05, between=0.1)
CLOCKS = Clocks(
    uplink=Delay(quantiles=[1e-3, 4e-3], per_token=1e-5),
    downlink=Delay(quantiles=[1e-3, 2e-3]),
    turnaround=Delay(quantiles=[1e-3, 3e-3]),
    reading=1e-5,
)
TGI = tgi_0_9_4.Flags(max_batch_prefill_tokens=1024, max_batch_total_tokens=8000, max_concurrent_requests=20)
VLLM = vllm_v1.Flags(num_gpu_blocks=600, max_num_seqs=16, max_num_batched_tokens=512, max_model_len=2048)
SPREAD = Workload(prompt_tokens=Lengths(uniform=(10, 900)), output_tokens=Lengths(uniform=(1, 99)))


def asked(load: Load, server: EngineFlags = TGI, **fields: object) -> Scenario:
    return Scenario(server=server, name="fleet", workload=SPREAD, load=load, **fields)  # type: ignore[arg-type]


def simulated(load: Load, server: EngineFlags = TGI, seed: int = 1, **fields: object) -> Run:
    return climb(asked(load, server, **fields), Machine(STEP_TIME, server, NOISE, CLOCKS), (seed, 0))


@pytest.mark.parametrize("server", [TGI, VLLM], ids=["tgi", "vllm"])
@pytest.mark.parametrize(
    "load", [Load(users=[3, 30], seconds=20.0, spawn_rate=20.0), Load(rate=[6.0], seconds=30.0)], ids=["closed", "open"]
)
def test_a_fleet_of_one_is_a_server_without_a_fleet(load: Load, server: EngineFlags) -> None:
    alone, one = simulated(load, server), simulated(load, server, fleet=fleet.Fleet(replicas=1))
    pd.testing.assert_frame_equal(alone.requests, one.requests, check_exact=True)
    assert alone.steps is not None and one.steps is not None
    pd.testing.assert_frame_equal(alone.steps, one.steps, check_exact=True)
    assert alone.step_ends is not None and one.step_ends is not None
    assert all(map(np.array_equal, alone.step_ends, one.step_ends))
    assert alone.rungs == one.rungs


OUTAGES = [Outage(replica=0, at=11.3, seconds=9.0), Outage(replica=2, at=15.0, seconds=0.5)]
LOST = fleet.Fleet(replicas=3, outages=OUTAGES, detection=Detection(active=ActiveChecks(interval=2.0, fall=2, rise=1)))


@pytest.mark.parametrize("server", [TGI, VLLM], ids=["tgi", "vllm"])
@pytest.mark.parametrize("per", ["request", "connection"])
@pytest.mark.parametrize(
    "load", [Load(users=[45], seconds=25.0, spawn_rate=20.0), Load(rate=[15.0], seconds=25.0, settle=5.0)]
)
def test_no_request_is_lost_or_answered_twice(load: Load, per: str, server: EngineFlags) -> None:
    run = simulated(load, server, fleet=replace(LOST, per=per))
    requests, steps = run.requests, run.steps
    assert steps is not None
    assert requests["id"].is_unique  # each ends once
    assert set(requests["status"]) >= {"ok", "reset", "aborted"}
    assert set(requests["replica"]) - {-1} == {0, 1, 2}
    for replica, mine in steps.groupby("replica"):  # every token that was made was somebody's
        made = (mine["count"] * mine["decode_sequences"] + mine["begun"]).sum()
        given = requests.loc[requests["replica"] == replica, "output_tokens"].sum()
        assert abs(made - given) <= (server is VLLM)  # which may have scheduled the step that the end of the run cuts
        assert (mine["start"].to_numpy()[1:] >= mine["end"].to_numpy()[:-1] - 1e-9).all()
    ok = requests[requests["status"] == "ok"]
    assert (ok["output_tokens"] == ok["max_new_tokens"]).all()
    if load.users:  # a closed loop: the next request is sent after the last one has ended
        for _, mine in requests.sort_values("sent").groupby("user"):
            assert (mine["sent"].to_numpy()[1:] >= mine["ended"].to_numpy()[:-1]).all()


class Watched:
    """A balancer that notes which replica it chose when."""

    def __init__(self, inner: Balancer):
        self.inner, self.cancels, self.queue_timeout = inner, inner.cancels, inner.queue_timeout
        self.ended, self.changed = inner.ended, inner.changed
        self.chosen: list[tuple[float, int | Status | None]] = []

    def choose(
        self, request: Request, targets: Sequence[Target], now: float, tried: Sequence[int] = ()
    ) -> int | Status | None:
        self.chosen.append((now, self.inner.choose(request, targets, now, tried)))
        return self.chosen[-1][1]


@pytest.mark.parametrize("passive", [False, True], ids=["active", "passive"])
@pytest.mark.parametrize("per", ["request", "connection"])
def test_a_dead_replica_answers_nobody_and_is_sent_nothing_once_that_is_known(
    per: str, passive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Watched] = []

    def watched(spec: fleet.Fleet, seed: Sequence[int]) -> Watched:
        made.append(Watched(balancer_of(spec, seed)))
        return made[-1]

    monkeypatch.setattr(testbed, "balancer_of", watched)
    detection = Detection(passive=PassiveChecks(max_fails=1, fail_timeout=30.0)) if passive else LOST.detection
    run = simulated(Load(users=[45], seconds=25.0, spawn_rate=20.0), fleet=replace(LOST, per=per, detection=detection))
    assert run.steps is not None
    for outage in OUTAGES:
        start, end = outage.at, outage.at + outage.seconds
        steps, requests = (table[table["replica"] == outage.replica] for table in (run.steps, run.requests))
        assert not ((steps["start"] < end) & (steps["end"] > start)).any()
        lost = requests[requests["status"] == Status.RESET]
        assert len(lost) and np.allclose(lost["ended"], start, atol=0.01)  # s: of the network
        over = (requests["first_token"] < start - 0.01) & (requests["ended"] > start + 0.01)
        assert not over.any()
        ok = requests[requests["status"] == Status.OK]
        assert not ((ok["last_token"] > start + 0.01) & (ok["last_token"] < end)).any()
    # checks at 12 and 14 s fail, and the one at 22 s is answered; the second outage lasts for no check but that at 16 s
    since, until = (11.4, 20.0) if passive else (14.0, 22.0)
    assert not [now for now, target in made[0].chosen if target == 0 and since < now < until]
    assert [now for now, target in made[0].chosen if target == 0 and now < 11.3]
    if not passive:  # or requests that were lost told at once
        assert [now for now, target in made[0].chosen if target == 0 and 11.3 <= now < 14.0]
    if not passive and per == "request":  # connections stay where they went
        assert [now for now, target in made[0].chosen if target == 0 and now > 22.0]
    again = run.requests[(run.requests["sent"] > 11.4) & (run.requests["sent"] < 14.0)]
    assert set(again["replica"]) == {1, 2} and Status.CONNECT not in set(again["status"])  # offered to the others


def test_with_all_replicas_dead_the_balancer_refuses() -> None:
    dead = [Outage(replica=i, at=5.0, seconds=3.0) for i in range(2)]
    run = simulated(Load(users=[4], seconds=10.0), fleet=fleet.Fleet(replicas=2, outages=dead))
    nobody = run.requests[run.requests["status"] == Status.GENERATION]  # nginx: 502
    assert len(nobody) and (nobody["replica"] == -1).all() and (nobody["output_tokens"] == 0).all()
    assert np.allclose(nobody["ended"] - nobody["sent"], 0.005, atol=0.005)


@pytest.mark.parametrize(
    ("start", "end", "seen"), [(11.3, 20.3, (14.0, 22.0)), (12.0, 16.0, (14.0, 16.0)), (11.0, 14.0, None)]
)
def test_when_checks_notice_an_outage(start: float, end: float, seen: tuple[float, float] | None) -> None:
    """By hand, with checks at 12, 14, 16 ... s, two of which must fail."""
    assert seen_between(start, end, ActiveChecks(interval=2.0, fall=2, rise=1)) == seen


def test_a_kept_connection_stays_with_its_replica() -> None:
    load = Load(users=[10], seconds=20.0)
    by_request, by_connection = (
        simulated(load, fleet=fleet.Fleet(replicas=3, per=per)).requests.groupby("user")["replica"].nunique()
        for per in ("request", "connection")
    )
    assert (by_connection == 1).all() and by_request.max() == 3
    lost = simulated(
        load, fleet=fleet.Fleet(replicas=3, per="connection", outages=[Outage(replica=1, at=9.0, seconds=99)])
    )
    r = lost.requests
    moved = set(r.loc[(r["replica"] == 1), "user"])
    assert moved and (r[r["user"].isin(moved)].groupby("user")["replica"].nunique() == 2).all()


def test_who_gives_up_leaves_no_place_taken() -> None:
    """Clients that leave in the queue, while tokens are counted and while they are served."""
    scenario = asked(Load(users=[40], seconds=10.0, spawn_rate=20.0), fleet=fleet.Fleet(replicas=2))
    model = Machine(STEP_TIME, TGI, NOISE, replace(CLOCKS, uplink=Delay(quantiles=[1e-3], per_token=1e-3)))
    bench = Bench(scenario, model, (1, 0), Sampler(SPREAD, 0), patience=Patience(0.9, whole=True))
    for user in range(40):
        bench.clients.add_user(user)
    bench.clock.run(until=20.0)
    present = dict(bench.clients._in_flight)
    run = bench.run()
    assert (run.requests["status"] == Status.TIMEOUT).sum() > 100
    made = bench.clients.server
    assert isinstance(made, Fleet)
    held = {r.id for r in present.values() if r.replica >= 0}
    assert sum(peer.connections for peer in made.balancer._peers) == len(held)  # type: ignore[attr-defined]
    assert all(front.in_use <= 20 for front in made.fronts)


def test_two_equal_halves_are_two_servers() -> None:
    """One user each: latencies, batches and shares of one server with one user; twice the rate, and the cost."""
    work = Workload(prompt_tokens=100, output_tokens=20)
    price = Price(usd_per_hour=3.0)
    one = Scenario(server=TGI, name="one", workload=work, load=Load(users=[1], seconds=30.0), price=price)
    two = replace(one, load=Load(users=[2], seconds=30.0), replicas=2)
    model = Machine(STEP_TIME, TGI)
    alone, both = (metrics.table(climb(s, model, (1, 0))).iloc[0] for s in (one, two))
    for name in ("e2e_p50", "ttft_p50", "itl_p50", "itl_mean", "itl_p99", "mean_batch", "budget_share"):
        assert both[name] == pytest.approx(alone[name], rel=1e-6), name
    for name in ("idle_share", "decode_share", "prefill_share"):
        assert both[name] == pytest.approx(alone[name], abs=0.01), name
    assert both["rps"] == pytest.approx(2 * alone["rps"], rel=0.02)
    assert both["output_tokens_per_s"] == pytest.approx(2 * alone["output_tokens_per_s"], rel=0.01)
    assert (one.usd_per_hour, two.usd_per_hour) == (3.0, 6.0)
    assert replace(two, price=Price(usd_per_hour=5.0, per="node", replicas_per_node=2), replicas=3).usd_per_hour == 10.0


def test_gaps_between_tokens_are_those_of_each_replica() -> None:
    """ITL of a fleet against the token times of its steps, replica by replica."""
    run = simulated(Load(users=[30], seconds=20.0, spawn_rate=20.0), fleet=fleet.Fleet(replicas=3))
    quiet = climb(asked(Load(users=[30], seconds=20.0, spawn_rate=20.0), replicas=3), Machine(STEP_TIME, TGI), (1, 0))
    for each in (run, quiet):
        assert each.steps is not None
        row = metrics.table(each).iloc[0]
        r = each.requests[each.requests["status"] == "ok"]
        several = r[(r["output_tokens"] > 1) & (r["last_token"] >= each.rungs[0].settled)]
        span = (several["last_token"] - several["first_token"]).sum() / (several["output_tokens"] - 1).sum()
        assert row["itl_mean"] == pytest.approx(span, rel=0.03)
        ends = r["last_token"].between(each.rungs[0].settled, each.rungs[0].end)
        assert row["output_tokens_per_s"] == pytest.approx(r["output_tokens"][ends].sum() / 20.0, rel=0.1)


def test_another_replica_changes_no_random_number() -> None:
    """Two and three replicas are asked the same requests at the same times, and the first two are the same machines."""
    load = Load(rate=[2.0], seconds=40.0)
    two, three = (simulated(load, replicas=n) for n in (2, 3))
    same = ["id", "sent", "prompt_tokens", "max_new_tokens"]
    pd.testing.assert_frame_equal(two.requests[same], three.requests[same], check_exact=True)
    firsts = []
    for run in (two, three):
        assert run.steps is not None and run.step_ends is not None
        starts = run.steps.groupby("replica").first()
        firsts.append(starts.loc[[0, 1], ["prefill_tokens", "start", "end"]])
    pd.testing.assert_frame_equal(firsts[0], firsts[1], check_exact=True)
    took = (firsts[0]["end"] - firsts[0]["start"]) / (0.02 + 1e-4 * firsts[0]["prefill_tokens"])
    assert abs(took[0] / took[1] - 1) > 0.01  # each has its own noise


def test_groups_have_their_own_server_and_speed() -> None:
    """A group of twice the speed, with a limit of its own, beside one that is the scenario's."""
    few = replace(TGI, max_concurrent_requests=3)
    groups = [Group(name="slow", replicas=2), Group(name="fast", server=few, weight=2)]
    scenario = asked(Load(users=[40], seconds=20.0, spawn_rate=20.0), fleet=fleet.Fleet(groups=groups))
    fast = affine(a0=0.01, a1=5e-5, b0=0.015, b1=2.5e-4, b2=5e-7)
    slow, quick = Machine(STEP_TIME, TGI), Machine(fast, few)
    run = climb(scenario, slow, (1, 0), groups=[slow, quick])
    assert run.steps is not None
    prefills = run.steps[run.steps["decode_sequences"] == 0]
    for replica, mine in prefills.groupby("replica"):
        took = 0.02 + 1e-4 * mine["prefill_tokens"]
        assert np.allclose(mine["end"] - mine["start"], took / (2 if replica == 2 else 1), rtol=0.01)
    refused = run.requests[run.requests["status"] == Status.OVERLOADED]
    assert len(refused) and (refused["replica"] == 2).all()
    assert run.steps.loc[run.steps["replica"] == 2, "decode_sequences"].max() == 3
    assert [server.permits for server in run.scenario.servers] == [20, 20, 3]
    with pytest.raises(BadInput, match=r"fleet\.groups"):
        climb(scenario, slow, (1, 0))


def test_a_scenario_of_groups_from_its_file(tmp_path: Path) -> None:
    """Flags over the scenario's, own calibrations with own draws, prices added up."""
    slow, quick = (
        Calibration(
            source=Source(kind="assumed"),
            model="affine",
            parameters={n: Parameter(value=v, stderr=0.0, low=v * 0.8, high=v * 1.2) for n, v in true.items()},
            draws={n: [v * 0.9, v, v * 1.1] for n, v in true.items()},
        )
        for true in ({"a0": 0.02, "a1": 1e-4, "b0": b0, "b1": 5e-4, "b2": 1e-6} for b0 in (0.03, 0.015))
    )
    (tmp_path / "slow.json").write_bytes(msgspec.json.encode(slow))
    (tmp_path / "quick.json").write_bytes(msgspec.json.encode(quick))
    file = tmp_path / "groups.yaml"
    file.write_text(
        """
format: 2
name: groups
server: {max_batch_prefill_tokens: 1024, max_batch_total_tokens: 8000}
workload: {prompt_tokens: 100, output_tokens: 20}
load: {users: [3], seconds: 20}
calibration: slow.json
price: {usd_per_hour: 4}
fleet:
  groups:
    - {name: slow, price: {usd_per_hour: 3}}
    - {name: quick, replicas: 2, calibration: quick.json, server: {max_waiting_tokens: 5}}
"""
    )
    scenario = load(file)
    assert scenario.usd_per_hour == 3 + 2 * 4
    assert [server.max_waiting_tokens for server in scenario.servers] == [20, 5, 5]  # type: ignore[attr-defined]
    (task,) = tasks_for(scenario, slow, 0, [0])
    run = task.run()
    assert set(run.requests["replica"]) == {0, 1, 2} and replicate(task).iloc[0]["e2e_mean"] > 0
    assert [machine.step_time.decode(1, 0, 0)[0] for machine in task.groups] == pytest.approx([0.0305, 0.0155])
    places = {
        tuple(machine.step_time.decode(1, 0, 0)[0] for machine in each.groups)
        for each in tasks_for(scenario, slow, 0, range(1, 30))
    }
    assert len(places) > 3  # a group with its own calibration has its own draw
    written = read_run(write_run(run, tmp_path / "run")).scenario.groups
    assert [Path(group.calibration or "").resolve().name for group in written] == ["slow.json", "quick.json"]
    assert Path(written[1].calibration or "").resolve() == (tmp_path / "quick.json").resolve()


def test_a_replica_starts_again_with_all_its_permits() -> None:
    two = replace(TGI, max_concurrent_requests=2)
    outages = [Outage(replica=0, at=5.0, seconds=1.0)]
    run = simulated(Load(users=[2], seconds=15.0), two, fleet=fleet.Fleet(replicas=1, outages=outages))
    assert (run.requests["status"] == Status.RESET).sum() == 2
    assert Status.OVERLOADED not in set(run.requests["status"])
    assert len(run.requests[(run.requests["sent"] > 6.5) & (run.requests["status"] == Status.OK)]) > 5


def test_a_replica_begins_with_an_empty_cache() -> None:
    """Tokens held before each row, by hand: a replica's first row has none, whatever another's last row left."""
    steps = pd.DataFrame({"replica": [0, 0, 2, 2], "used": [5, 7, 4, 0]})
    assert held_before(steps).tolist() == [0, 5, 0, 4]


class OneQueue:
    """A queue for all, and one request at a time for each target."""

    cancels, queue_timeout = True, math.inf

    def __init__(self, targets: int):
        self.free, self.queue = list(range(targets)), deque[Request]()

    def choose(
        self, request: Request, targets: Sequence[Target], now: float, tried: Sequence[int] = ()
    ) -> int | Status | None:
        if self.free:
            return self.free.pop()
        self.queue.append(request)
        return None

    def ended(self, request: Request, target: int | None, how: Ending, targets: Sequence[Target], now: float) -> Starts:
        assert target is not None
        if self.queue:
            return [(self.queue.popleft(), target)]
        self.free.append(target)
        return []

    def changed(self, target: int, change: Change, targets: Sequence[Target], now: float) -> Starts:
        return []


def test_one_queue_before_servers_of_one_request_is_m_m_c() -> None:
    """Erlang C: the share of arrivals that wait, and for how long (Gross et al., Fundamentals of Queueing Theory,
    5th ed., section 3.3)."""
    servers, load, count = 3, 0.75 * 3, 20_000
    rng = np.random.default_rng(5)
    clock, ended = Clock(), list[Request]()
    flags = vllm_v1.Flags(num_gpu_blocks=10_000, max_num_seqs=1, max_model_len=100_000)
    step = affine(a0=0.0, a1=0.0, b0=0.001, b1=0.0)  # a request of n tokens takes (n - 1) ms
    fronts = []
    for index in range(servers):
        front = FrontEnd(clock, ended.append, index=index)
        front.replica = Replica(clock, vllm_v1.Engine(flags), step, front.ended, index=index)
        fronts.append(front)
    made = Fleet(clock, fronts, OneQueue(servers), ended.append)
    tokens = np.rint(rng.exponential(1000.0, count)).astype(int) + 1
    times = np.cumsum(rng.exponential(1 / load, count))
    for i, (at, n) in enumerate(zip(times.tolist(), tokens.tolist(), strict=True)):
        clock.call(at, made.reach, Request(i, 1, n, n, sent=at))
    clock.run()
    assert len(ended) == count
    waited = np.array([r.arrived - r.sent for r in ended])
    blocked = load**servers / math.factorial(servers) * servers / (servers - load)
    erlang_c = blocked / (sum(load**k / math.factorial(k) for k in range(servers)) + blocked)
    assert (waited > 1e-9).mean() == pytest.approx(erlang_c, rel=0.05)
    assert waited.mean() == pytest.approx(erlang_c / (servers - load), rel=0.1)
