"""What limits the server at a load: how full the engine's limits were, and where its time went."""

from __future__ import annotations

import pandas as pd

from scenarios.forecast.forecast import Bottleneck
from sim.model.scenario import Scenario

WAITING = 0.1  # of the requests in the system: fewer in the queue than that, and admission limits nothing
TURN = 0.2  # of the requests: more than their own prefills account for
FULL = 0.1  # of the requests admitted, or of the time: what is full more seldom limits nothing


def bottleneck(scenario: Scenario, rung: pd.Series) -> Bottleneck:
    """What limits one rung; `rung` holds the medians over replicates of the columns of `replicate`.

    In this order: requests are turned away (permits); they wait for room in one of the engine's limits, or for their
    turn by its rules; or no request waits and the steps take their time. An idle server is limited by its users.
    """
    load = float(rung["load"])
    queue, present = float(rung["queue"]), max(float(rung["in_flight"]), 1e-9)
    waiting = queue / present
    prefill, decode, idle = (float(rung[f"{what}_share"]) for what in ("prefill", "decode", "idle"))
    time = f"{prefill:.0%} of the time in prefills, {decode:.0%} in decode steps of {rung['mean_batch']:.3g} requests"
    server, declared = scenario.server, scenario.server.declared
    if rung["overloaded_rate"] > 0.001:
        share = f"{rung['overloaded_rate']:.0%} of the requests"
        if server.permits is None:
            return Bottleneck(load=load, binds="balancer", words=f"{share} turned away by the balancer; {time}")
        most = f"{server.permits} requests at once{'' if scenario.alone else ' on each replica'}"
        words = f"{most}, {share} turned away with {declared.overloaded_status}; {time}"
        return Bottleneck(load=load, binds="permits", words=words)
    for limit in declared.limits if waiting > WAITING else ():
        if rung[limit.full] > FULL:
            words = f"{queue:.0f} of {present:.0f} {limit.words}; {time}"
            return Bottleneck(load=load, binds=limit.name, words=words)
    if waiting > TURN:
        words = f"{queue:.1f} of {present:.0f} requests wait for their turn ({declared.turn}); {time}"
        return Bottleneck(load=load, binds="admission rule", words=words)
    if idle > 0.5:
        return Bottleneck(load=load, binds="users", words=f"idle {idle:.0%} of the time; {time}")
    what = "prefill compute" if prefill > decode else "decode compute"
    return Bottleneck(load=load, binds=what, words=time)
