"""What limits the server at a load, in words, from how full its budgets were and where its time went."""

from __future__ import annotations

import pandas as pd

from scenarios.forecast.forecast import Bottleneck
from sim.model.scenario import Scenario

WAITING = 0.1  # of the requests in the system: fewer in the queue than that, and admission limits nothing
TURN = 0.2  # of the requests: more than their own prefills account for
FULL = 0.1  # of the requests admitted: a budget that ends no admission limits nothing


def bottleneck(scenario: Scenario, rung: pd.Series) -> Bottleneck:
    """What limits one rung; `rung` holds the medians over replicates of the columns of `replicate`.

    In this order: requests are turned away (permits); they wait for room in the token budget or in a prefill, or until
    the router looks at its queue; or nobody waits and the steps themselves take their time. An idle server is limited
    by its users.
    """
    load = float(rung["load"])
    queue, present = float(rung["queue"]), max(float(rung["in_flight"]), 1e-9)
    waiting = queue / present
    prefill, decode, idle = (float(rung[f"{what}_share"]) for what in ("prefill", "decode", "idle"))
    time = f"{prefill:.0%} of the time in prefills, {decode:.0%} in decode steps of {rung['mean_batch']:.3g} requests"
    permits = scenario.server.max_concurrent_requests
    if rung["overloaded_rate"] > 0.001:
        share = f"{rung['overloaded_rate']:.0%} of the requests"
        return Bottleneck(
            load=load, binds="permits", words=f"{permits} requests at once, {share} turned away with 429; {time}"
        )
    if waiting > WAITING and rung["budget_full"] > FULL:
        words = f"{queue:.0f} of {present:.0f} requests wait for room in max_batch_total_tokens; {time}"
        return Bottleneck(load=load, binds="token budget", words=words)
    if waiting > WAITING and rung["prefill_full"] > FULL:
        words = f"{queue:.0f} of {present:.0f} requests wait while max_batch_prefill_tokens is full; {time}"
        return Bottleneck(load=load, binds="prefill budget", words=words)
    if waiting > TURN:
        rules = "waiting_served_ratio, max_waiting_tokens"
        words = f"{queue:.1f} of {present:.0f} requests wait for their turn ({rules}); {time}"
        return Bottleneck(load=load, binds="admission rule", words=words)
    if idle > 0.5:
        return Bottleneck(load=load, binds="users", words=f"idle {idle:.0%} of the time; {time}")
    what = "prefill compute" if prefill > decode else "decode compute"
    return Bottleneck(load=load, binds=what, words=time)
