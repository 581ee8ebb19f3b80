"""What one draw of a calibration makes of a scenario's server: step times, noise, clocks, a settled token budget."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import numpy as np

from sim.calibration import Calibration, Clocks, Noise
from sim.errors import BadInput
from sim.forms import FORMS, step_time
from sim.server import Bounds, ServerConfig
from sim.steptime import StepTime


@dataclass(frozen=True)
class Model:
    """Everything a simulated server needs.

    `output_attained` is the share of `max_new_tokens` that comes back of an answer that the workload only limits.
    """

    step_time: StepTime
    server: ServerConfig
    noise: Noise = field(default_factory=Noise)
    clocks: Clocks = field(default_factory=Clocks)
    output_attained: float = 1.0


def drawing(seed: int, number: int) -> np.random.Generator:
    """What the draw of replicate `number` is made with: independent of everything else that is drawn in it."""
    # zeros at the end of a seed do not count, and no stream of a ladder or a replay is a ninth
    return np.random.default_rng([seed, number, 0, 9])


def draw_model(calibration: Calibration, server: ServerConfig, rng: np.random.Generator | None) -> Model:
    """The model of one joint draw; with no `rng`, of the central values.

    The token budget is the scenario's if it names one, else the calibration's. Of bounds, what the calibration inferred
    within them; else it is drawn.
    """
    if calibration.model not in FORMS:
        raise BadInput(f"expected one of {', '.join(sorted(FORMS))}, found {calibration.model!r}", key="model")
    values = calibration.values if rng is None else calibration.draw(rng)
    clocks = calibration.clocks
    if "uplink" in values:  # fitted together with the step times: a draw of one goes with a draw of the other
        uplink = clocks.uplink.shifted(values["uplink"], values.get("uplink_per_token"))
        clocks = msgspec.structs.replace(clocks, uplink=uplink)
    budget = server.max_batch_total_tokens
    inferred = values.get("max_batch_total_tokens")
    if isinstance(budget, Bounds) and inferred is not None and budget.low <= inferred <= budget.high:
        budget = round(inferred)
    elif isinstance(budget, Bounds):
        budget = (budget.low + budget.high) // 2 if rng is None else int(rng.integers(budget.low, budget.high + 1))
    elif budget is None and inferred is not None:
        budget = round(inferred)
    elif budget is None and not server.requires_padding:
        raise BadInput(
            "expected a number of tokens here or in the calibration, which has none",
            key="server.max_batch_total_tokens",
        )
    return Model(
        step_time=step_time(calibration.model, values),
        server=msgspec.structs.replace(server, max_batch_total_tokens=budget),
        noise=calibration.noise,
        clocks=clocks,
        output_attained=values.get("output_attained", 1.0),
    )
