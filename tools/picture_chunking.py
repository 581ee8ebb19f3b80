"""Draw the picture in docs/engines.md: eight chats and one long prompt, under TGI 0.9.4 and under vLLM V1.

Both engines have the same step times, from the shipped vLLM scenario's table. What differs is the schedule: TGI 0.9.4
prefills the whole prompt while the chats wait; vLLM computes a chunk of it in each step, beside the next tokens.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes  # noqa: TID251  axes are given to it by scenarios/report/figure.py

from scenarios.load.parameters import calibration_of
from scenarios.report.figure import BLUE, GREEN, ORANGE, figure, plain, svg
from servecast import load
from sim.engines import tgi_0_9_4, vllm_v1
from sim.engines.engine import Engine
from sim.engines.vllm_v1 import Flags
from sim.model.machine import draw_machine
from sim.model.request import Request
from sim.steptime.linear import Linear

PICTURE = Path(__file__).parent.parent / "docs" / "chunking.svg"
SCENARIO = "llama2-70b-vllm"
CHATS, PROMPT, ARRIVES = 8, 6000, 3.0  # chats of 100 tokens in, 200 out; tokens of the long prompt; s


def schedule(engine: Engine, step_time: Linear) -> tuple[list[list[float]], float]:
    """When each chat's tokens come, and the TTFT of the long prompt, s."""
    chats = [Request(uid, 100, 200, 200) for uid in range(CHATS)]
    prompt = Request(CHATS, PROMPT, 5, 5)
    times: dict[Request, list[float]] = {request: [] for request in [*chats, prompt]}
    due, now = [prompt], 0.0
    for chat in chats:
        engine.submit(chat)
    while (plan := engine.plan()) is not None:
        before = {request: engine.received(request, 0) for request in times}
        now += step_time.line(plan.work).first + (step_time.line(plan.once).first if plan.once else 0.0)
        while due and now >= ARRIVES:
            engine.submit(due.pop())
        outcome = engine.commit(plan, 1)
        for request in times:
            if request in outcome.finished or engine.received(request, 0) > before[request]:
                times[request].append(now)
    return [times[chat] for chat in chats], times[prompt][0] - ARRIVES


def draw(ax: Axes) -> None:
    """The gaps between the tokens of one chat, over time."""
    scenario = load(SCENARIO)
    step_time = draw_machine(calibration_of(SCENARIO, scenario), scenario.server, None).step_time
    tgi = tgi_0_9_4.Flags(
        max_batch_prefill_tokens=8192, max_batch_total_tokens=100_000, max_input_length=8000, max_total_tokens=8192
    )
    budgets = {
        budget: Flags(max_model_len=8192, max_num_batched_tokens=budget, num_gpu_blocks=10_000)
        for budget in (2048, 512)
    }
    servers: list[tuple[str, str, Engine]] = [("TGI 0.9.4", ORANGE, tgi_0_9_4.Engine(tgi))]
    for (budget, flags), colour in zip(budgets.items(), (BLUE, GREEN), strict=True):
        servers.append((f"vLLM, {budget:,} tokens a step", colour, vllm_v1.Engine(flags)))
    for name, colour, engine in servers:
        (chat, *_), ttft = schedule(engine, step_time)
        gaps = [(later, 1e3 * (later - earlier)) for earlier, later in pairwise(chat)]
        ax.plot(
            *zip(*gaps, strict=True),
            color=colour,
            marker=".",
            markersize=3,
            linewidth=0.8,
            label=f"{name}: TTFT {ttft:.2f} s",
        )
        print(
            f"{name}: longest gap of a chat {max(gap for _, gap in gaps):.0f} ms, TTFT of the long prompt {ttft:.2f} s"
        )
    ax.set_yscale("log")
    ax.set_ylim(30, 3000)
    plain(ax.yaxis)
    ax.set_xlim(ARRIVES - 1, ARRIVES + 5)
    ax.set_title(f"A prompt of {PROMPT:,} tokens beside {CHATS} chats")
    ax.set_xlabel("time, s")
    ax.set_ylabel("gap between tokens of a chat, ms")
    ax.legend(loc="upper right", fontsize=8)


if __name__ == "__main__":
    with figure(7.0, 3.4, 1) as (picture, (axes,)):
        draw(axes)
        PICTURE.write_bytes(svg(picture))
    print(PICTURE)
