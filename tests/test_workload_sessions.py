"""Turns of a session hold what was said before, and hit exactly its blocks of the prefix cache."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from measure.ladder.session import measure
from scenarios.forecast.simulate import simulate
from scenarios.load.parameters import calibration_of
from scenarios.load.scenario import load
from sim.cluster import ladder, testbed
from sim.cluster.clients import Clients
from sim.cluster.frontend import FrontEnd
from sim.cluster.replay import replay
from sim.cluster.sessions import Session, foreseen
from sim.engines import tgi_0_9_4
from sim.engines.vllm_v1 import Flags
from sim.model.calibration import Clocks, Delay, Noise
from sim.model.errors import BadInput, CannotFit
from sim.model.files.lengths import read_lengths
from sim.model.machine import Machine
from sim.model.request import Request
from sim.model.scenario import Load, Scenario
from sim.model.server import EngineFlags
from sim.model.status import Status
from sim.model.workload import Geometric, Lengths, RequestLengths, RequestSpec, Sessions, Workload, session_turns
from sim.run import Run
from sim.steptime.linear import affine

STEP_TIME = affine(a0=0.01, a1=1e-4, b0=0.02)
CHAT = Workload(
    prompt_tokens=Lengths(uniform=(20, 150)),
    output_tokens=Lengths(uniform=(20, 150)),
    sessions=Sessions(turns=Lengths(geometric=Geometric(mean=4)), think=3.0, system_prompt_tokens=400),
)
TGI = tgi_0_9_4.Flags(max_batch_total_tokens=50_000, max_input_length=3000, max_total_tokens=4000)


def fixed(prompt: int, output: int, turns: int, think: float = 0.0, system: int = 0) -> Workload:
    sessions = Sessions(turns=turns, think=think, system_prompt_tokens=system)
    return Workload(prompt_tokens=prompt, output_tokens=output, sessions=sessions)


class Simulated:
    """A ladder climbed, with the requests as the server saw them, by their sessions, and the vLLM engine."""

    def __init__(self, workload: Workload, flags: EngineFlags, seed: int = 1, **load: Any):
        self.requests: list[Request] = []
        self.sessions: dict[Session, list[Request]] = {}
        reach, made = FrontEnd.reach, testbed.scheduler
        self.engine: Any = None
        self.hit_tokens: list[int] = []  # of the engine when each request came
        self.left: list[Request] = []  # requests that had not ended when the run did

        def note(front: FrontEnd, request: Request) -> None:
            self.requests.append(request)
            self.hit_tokens.append(int(self.engine.counters().get("vllm:prefix_cache_hits_total", 0)))
            self.sessions.setdefault(request.session, []).append(request)
            reach(front, request)

        def keep(flags: EngineFlags) -> Any:
            self.engine = made(flags)
            return self.engine

        scenario = Scenario(name="chat", server=flags, workload=workload, load=Load(**load))

        def abort(clients: Clients) -> None:
            self.left += clients._in_flight.values()
            stop(clients)

        stop = Clients.abort
        delays = Clocks(turnaround=Delay(quantiles=[0.0, 0.01]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FrontEnd, "reach", note)
            patch.setattr(Clients, "abort", abort)
            patch.setattr(testbed, "scheduler", keep)
            self.run: Run = ladder.climb(scenario, Machine(STEP_TIME, flags, Noise(), delays), (seed, 0))

    def asked(self) -> dict[Any, list[tuple[int, int]]]:
        """Prompt and answer of each turn, by the names of sessions."""
        return {
            session.text[-1][1]: [(r.prompt_tokens, r.output_tokens) for r in turns]
            for session, turns in self.sessions.items()
        }


def alone(workload: Workload, **flags: Any) -> list[tuple[int, int]]:
    """Prompt tokens of a lone user's requests, and how many of them were hits."""
    simulated = Simulated(workload, Flags(num_gpu_blocks=1000, **flags), users=[1], seconds=10.0)
    ends = [*simulated.hit_tokens[1:], simulated.engine.scheduler.hit_tokens]
    found = [after - before for before, after in zip(simulated.hit_tokens, ends, strict=True)]
    return [(r.prompt_tokens, hit) for r, hit in zip(simulated.requests, found, strict=True)]


@pytest.mark.parametrize("flags", [TGI, Flags(num_gpu_blocks=1000)])
def test_the_prompt_of_a_turn_holds_all_that_was_said_before(flags: EngineFlags) -> None:
    simulated = Simulated(fixed(30, 20, turns=3, system=100), flags, users=[1], seconds=30.0)
    asked = [(r.prompt_tokens, r.output_tokens) for r in simulated.requests]
    assert asked[:7] == [(130, 20), (180, 20), (230, 20), (130, 20), (180, 20), (230, 20), (130, 20)]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_lone_session_hits_every_whole_block_that_it_has_computed(ahead: bool) -> None:
    found = alone(fixed(30, 20, turns=3, system=100), async_scheduling=ahead)
    # the first turn computes 130 + 19 tokens (the last one of an answer is never fed): 9 blocks of 16; the next one
    # 180 + 19: 12 blocks. The second session begins with the same 100 tokens: 6 blocks, and goes on like the first
    assert found[:6] == [(130, 0), (180, 9 * 16), (230, 12 * 16), (130, 6 * 16), (180, 9 * 16), (230, 12 * 16)]


def test_a_block_in_which_the_system_prompt_ends_is_not_shared() -> None:
    assert alone(fixed(40, 8, turns=1, system=96))[1] == (136, 96)
    assert alone(fixed(40, 8, turns=1, system=95))[1] == (135, 80)
    assert alone(fixed(40, 8, turns=1))[1] == (40, 0)
    assert alone(fixed(40, 8, turns=1, system=96), enable_prefix_caching=False)[1] == (136, 0)


def test_requests_without_sessions_may_share_a_system_prompt() -> None:
    workload = Workload(prompt_tokens=80, output_tokens=5, system_prompt_tokens=320)
    simulated = Simulated(workload, Flags(num_gpu_blocks=2000), rate=[2.0], seconds=60.0)
    engine, asked = simulated.engine, len(simulated.requests)
    assert engine.scheduler.queried_tokens == 400 * asked
    assert engine.scheduler.hit_tokens == 320 * (asked - 1)  # all but the first: a share of 80 %


def test_no_session_is_lost() -> None:
    for asked in ({"users": [5, 9], "think": 1.0}, {"rate": [0.2, 0.5], "settle": 5.0}):
        simulated = Simulated(CHAT, TGI, seconds=100.0, **asked)
        begun = set(simulated.sessions)
        over = {session for session in begun if session.over}
        assert len(begun) > 30
        pending = Counter(r.session for r in simulated.left)  # in flight, or its user thinks
        assert set(pending.values()) == {1}
        assert set(pending) & begun == begun - over
        prompts = [[r.prompt_tokens for r in turns] for turns in simulated.sessions.values()]
        assert all(each == sorted(each) for each in prompts)


@pytest.mark.parametrize(
    ("flags", "turns"),
    [
        (Flags(num_gpu_blocks=1000, max_model_len=300), 4),  # 130, 180, 230, 280: the answer to the last fits exactly
        (Flags(num_gpu_blocks=1000, max_model_len=299), 3),  # vLLM would cut it
        (tgi_0_9_4.Flags(max_batch_total_tokens=9000, max_input_length=280, max_total_tokens=300), 4),
        (tgi_0_9_4.Flags(max_batch_total_tokens=9000, max_input_length=279, max_total_tokens=300), 3),
    ],
)
def test_a_session_ends_before_it_outgrows_the_server(flags: EngineFlags, turns: int) -> None:
    simulated = Simulated(fixed(30, 20, turns=9, system=100), flags, users=[1], seconds=30.0)
    assert len(simulated.sessions) > 3
    assert Counter(len(asked) for session, asked in simulated.sessions.items() if session.over).keys() == {turns}
    assert {r.status for r in simulated.requests if r.session.over} == {Status.OK}
    prompts = [
        one.prompt_tokens for one, _ in zip(foreseen(fixed(30, 20, 9, system=100), flags), range(9), strict=False)
    ]
    assert prompts == [r.prompt_tokens for r in simulated.requests[:9]]


def test_a_first_turn_that_is_too_long_is_refused_and_ends_its_session() -> None:
    flags = tgi_0_9_4.Flags(max_batch_total_tokens=9000, max_input_length=100, max_total_tokens=200)
    workload = Workload(
        prompt_tokens=Lengths(uniform=(50, 150)), output_tokens=20, sessions=Sessions(turns=1, think=0.0)
    )
    simulated = Simulated(workload, flags, users=[2], seconds=30.0)
    for (asked,) in simulated.sessions.values():
        assert asked.prompt_tokens > 100 or asked.status in (Status.OK, Status.ABORTED)
        assert asked.prompt_tokens <= 100 or asked.status in (Status.VALIDATION, Status.ABORTED)
    assert {r.status for r in simulated.requests} >= {Status.OK, Status.VALIDATION}


def test_who_thinks_and_how_long() -> None:
    simulated = Simulated(fixed(30, 20, turns=2, think=5.0), TGI, users=[1], seconds=60.0, think=11.0)
    table = simulated.run.requests
    pauses = (table["sent"].to_numpy()[1:] - table["ended"].to_numpy()[:-1]).tolist()
    assert len(pauses) > 4
    assert pauses == pytest.approx([5.0, 11.0] * (len(pauses) // 2) + [5.0] * (len(pauses) % 2), abs=0.01)


def test_a_rate_counts_the_sessions_that_begin() -> None:
    simulated = Simulated(fixed(30, 20, turns=5, think=1.0), TGI, rate=[0.5], arrivals="constant", seconds=100.0)
    assert len(simulated.sessions) == 0.5 * 130 - 1  # the first after one gap, the last before the end
    whole = [asked for session, asked in simulated.sessions.items() if session.over]
    assert {len(asked) for asked in whole} == {5}
    window = simulated.run.requests["last_token"]
    assert ((window >= 30.0) & (window < 130.0)).sum() == pytest.approx(250, abs=5)


def test_sessions_are_the_same_whatever_the_server_and_the_other_users() -> None:
    wide = Flags(num_gpu_blocks=3000)
    narrow = Flags(num_gpu_blocks=300, max_model_len=1500, max_num_seqs=2, enable_prefix_caching=False)
    first = Simulated(CHAT, wide, users=[3], seconds=200.0).asked()
    for other in (
        Simulated(CHAT, narrow, users=[3], seconds=200.0),
        Simulated(CHAT, TGI, users=[7], seconds=200.0),
    ):
        compared = 0
        for name, turns in other.asked().items():
            both = min(len(turns), len(first.get(name, ())))
            assert turns[:both] == first.get(name, [])[:both]
            compared += both
        assert compared > 50
    one, two = (Simulated(CHAT, wide, users=[3], seconds=50.0).run.requests for _ in range(2))
    assert one.equals(two)
    assert Simulated(CHAT, wide, seed=2, users=[3], seconds=200.0).asked() != first


def test_turns_are_geometric_and_belong_to_their_session() -> None:
    law = CHAT.sessions
    assert law is not None
    drawn = [turns for turns, _ in zip(session_turns(law, 1, 0), range(20_000), strict=False)]
    assert sum(drawn) / len(drawn) == pytest.approx(4.0, abs=0.1)  # sd 3.5, standard error 0.025
    assert drawn.count(1) / len(drawn) == pytest.approx(0.25, abs=0.015)
    assert drawn[:50] == [turns for turns, _ in zip(session_turns(law, 1, 0), range(50), strict=False)]
    assert drawn[:50] != [turns for turns, _ in zip(session_turns(law, 1, 1), range(50), strict=False)]


def turn(session: Session, status: Status, received: int, user: int = 0) -> Request:
    ask = session.turn(0)
    assert ask is not None
    request = Request(1, *ask.asked[:3], user)
    request.text, request.status, request.received = session.text, status, received
    return request


def new_session() -> Session:
    turns: list[tuple[RequestSpec, tuple[float, ...]]] = [(RequestSpec(30, 20, 20), ()), (RequestSpec(5, 6, 7), ())]
    return Session("s", 16, turns, lambda prompt, new: False)


def test_a_turn_that_failed_is_repeated_and_its_answer_is_another_one() -> None:
    session = new_session()
    failed = turn(session, Status.OVERLOADED, 0)
    again = session.after(failed)
    assert again is not None and again.asked == RequestSpec(30, 20, 20)
    assert session.text == ((16, "system"), (0, "s"))
    failed.status, failed.received = Status.TIMEOUT, 7
    assert session.after(failed) == again
    assert session.text == ((16, "system"), (30, "s"), (0, ("s", 2)))
    failed.status, failed.received = Status.OK, 20
    following = session.after(failed)
    assert following is not None and following.asked == RequestSpec(55, 6, 7)


def test_a_turn_that_failed_ends_a_session_of_an_open_loop() -> None:
    session = new_session()
    assert session.after(turn(session, Status.OVERLOADED, 0, user=-1)) is None
    assert session.over


def test_overloaded_users_repeat_the_turn() -> None:
    flags = tgi_0_9_4.Flags(max_batch_total_tokens=50_000, max_concurrent_requests=2, max_total_tokens=4000)
    simulated = Simulated(fixed(30, 20, turns=3), flags, users=[4], seconds=20.0)
    assert simulated.engine is not None
    for session, asked in simulated.sessions.items():
        answered = [r.prompt_tokens for r in asked if r.status == Status.OK]
        assert answered == [30, 80, 130][: len(answered)]
        if session.over:
            assert len(answered) == 3
    assert {r.status for r in simulated.requests} >= {Status.OK, Status.OVERLOADED}


def test_a_session_that_would_wait_for_ever_is_refused() -> None:
    flags = tgi_0_9_4.Flags(
        max_batch_total_tokens=9000, max_batch_prefill_tokens=200, max_input_length=1000, max_total_tokens=2000
    )
    with pytest.raises(CannotFit):
        Simulated(fixed(150, 20, turns=3), flags, users=[1], seconds=5.0)
    workload = Workload(empirical="pairs.csv", sessions=Sessions(turns=3))
    pairs = RequestLengths(*(np.array([tokens]) for tokens in (150, 20, 20)))
    with pytest.raises(CannotFit):
        ladder.check_servable(Scenario(name="chat", server=flags, workload=workload), flags, pairs)


def test_users_have_sessions_of_their_own() -> None:
    simulated = Simulated(CHAT, TGI, users=[2], seconds=300.0)
    turns: dict[int, list[int]] = {0: [], 1: []}
    for session, asked in simulated.sessions.items():
        if session.over:
            turns[asked[0].user].append(len(asked))
    most = min(map(len, turns.values()))
    assert most > 5
    assert turns[0][:most] != turns[1][:most]


SCENARIO = """
format: 2
name: chat
server: {max_batch_total_tokens: 20000}
workload: {prompt_tokens: 100, output_tokens: 50%s}
load: {users: [2], seconds: 5}
"""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("sessions: {turns: 0}", "workload.sessions.turns: expected more than 0, found 0"),
        ("sessions: {turns: 20000}", "workload.sessions.turns: expected at most 10000, found 20000"),
        ("sessions: {turns: {geometric: {mean: 0.5}}}", "workload.sessions.turns.geometric.mean: expected 1 or more"),
        ("sessions: {turns: {geometric: {maen: 5}}}", "workload.sessions.turns.geometric.maen: unknown key"),
        (
            "sessions: {turns: {}}",
            "workload.sessions.turns: expected one of uniform, lognormal, exponential, geometric",
        ),
        ("sessions: {think: 3}", "workload.sessions.turns: missing"),
        ("sessions: {turns: 3, think: -1}", "workload.sessions.think: expected 0 or more, found -1"),
        (
            "sessions: {turns: 3, system_prompt_tokens: -1}",
            "workload.sessions.system_prompt_tokens: expected 0 or more",
        ),
        ("system_prompt_tokens: -1", "workload.system_prompt_tokens: expected 0 or more, found -1"),
        ("sessions: {turns: 3}, system_prompt_tokens: 9", "workload.system_prompt_tokens: expected it under"),
        ("max_new_tokens: 60, ignore_eos: true", "workload.max_new_tokens: expected none: with ignore_eos"),
        ("ignore_eos: 3", "workload.ignore_eos: expected true or false, found 3"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(more: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.yaml"
    path.write_text(SCENARIO % f", {more}")
    with pytest.raises(BadInput) as e:
        load(path)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_shared_system_prompt_counts_where_a_prompt_would_wait_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "chat.yaml"
    path.write_text(SCENARIO % ", system_prompt_tokens: 3949")
    wide = "server.max_input_length=4096", "server.max_total_tokens=5000", "workload.output_tokens=951"
    assert load(path, *wide).workload.conversations is not None
    with pytest.raises(BadInput, match=r"workload: a request of 4049 \+ 951 tokens .*max_batch_total_tokens"):
        load(path, *wide, "server.max_batch_total_tokens=5000")  # 4064 + 960 in blocks of 16


def test_a_trace_has_no_sessions(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("arrived,prompt_tokens,output_tokens\n0,1,2\n1,1,2\n")
    path = tmp_path / "chat.yaml"
    path.write_text("format: 2\nname: t\nworkload: {trace: t.csv, sessions: {turns: 2}}\nload: {trace: true}\n")
    with pytest.raises(BadInput, match=r"workload\.sessions: expected none beside a trace"):
        load(path)


def test_sessions_are_neither_measured_nor_replayed(tmp_path: Path) -> None:
    scenario = Scenario(name="chat", server=TGI, workload=CHAT, load=Load(users=[1], seconds=5.0))
    with pytest.raises(BadInput, match=r"workload\.sessions: is simulated only"):
        measure(scenario, "http://127.0.0.1:9", tmp_path / "run")
    model = Machine(STEP_TIME, TGI, Noise(), Clocks())
    with pytest.raises(BadInput, match="a run of sessions is not replayed"):
        replay(ladder.climb(scenario, model, (1, 0)), model, (1, 0))


@pytest.mark.parametrize("ignore", [False, True])
def test_answers_reach_their_limit_where_the_end_of_a_sequence_is_ignored(ignore: bool) -> None:
    workload = Workload(prompt_tokens=50, output_tokens=20, ignore_eos=ignore)
    assert next(foreseen(workload, TGI, attained=0.5)).output_tokens == (20 if ignore else 10)


@pytest.mark.parametrize("ahead", [False, True])
def test_hits_of_many_sessions_are_what_each_of_them_has_in_a_cache_that_forgets_nothing(ahead: bool) -> None:
    flags = Flags(num_gpu_blocks=100_000, max_model_len=3000, async_scheduling=ahead)
    simulated = Simulated(CHAT, flags, users=[12], seconds=120.0)
    expected = asked = 0
    last: dict[Session, Request] = {}
    for request in simulated.requests:  # the queue is first come, first served
        if asked == simulated.engine.scheduler.queried_tokens:
            break
        before = last.get(request.session)
        known = 400 if before is None else before.prompt_tokens + before.output_tokens - 1
        if last:
            expected += known // 16 * 16
        last[request.session] = request
        asked += request.prompt_tokens
    assert asked == simulated.engine.scheduler.queried_tokens
    assert len(last) > 50
    assert simulated.engine.scheduler.hit_tokens == expected
    assert expected / asked > 0.7


def test_a_file_of_lengths_is_asked_for_as_it_was_answered_where_the_end_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("prompt_tokens,output_tokens,max_new_tokens\n10,20,90\n")
    for ignore, most in ((False, 90), (True, 20)):
        found = read_lengths(Workload(empirical=str(tmp_path / "pairs.csv"), ignore_eos=ignore))
        assert found is not None and found.max_new_tokens.tolist() == [most]


def test_a_forecast_of_a_rate_of_sessions_counts_their_turns() -> None:
    sets = "load.users=", "load.rate=[0.5]", "load.settle=60", "load.seconds=300", "workload.sessions.turns=5"
    more = "workload.prompt_tokens=30", "workload.output_tokens=20", "workload.sessions.think=1"
    scenario = load("llama2-70b-chat", *sets, *more, "load.arrivals=constant")
    forecast = simulate(scenario, calibration_of("llama2-70b-chat", scenario), replicates=19)
    (rps,) = forecast.rows("rps")
    assert rps.value == pytest.approx(0.5 * 5, rel=0.02)
    assert forecast.unit == "sessions/s"
