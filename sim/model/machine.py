"""A simulated machine, by one draw of a calibration: step times, noise, clocks, a known token budget."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import numpy as np

from sim.model.calibration import Calibration, Clocks, SystemParameters
from sim.model.errors import BadInput
from sim.model.scenario import Hardware
from sim.model.server import EngineFlags
from sim.steptime.linear import FORMS, Linear, step_time
from sim.steptime.noise_parameters import Noise


@dataclass(frozen=True)
class Machine:
    """The parameters of a simulated server, from one draw of a calibration and the flags of a scenario."""

    step_time: Linear  # how long the work of a step takes, s
    server: EngineFlags  # with a settled size of the KV cache, tokens
    noise: Noise = field(default_factory=Noise)
    clocks: Clocks = field(default_factory=Clocks)
    output_attained: float = 1.0  # share of `max_new_tokens` that comes back where a workload only limits an answer


@dataclass(frozen=True)
class Draw:
    """What replicate `number` draws before it begins: independent of everything that is drawn in it. `of` tells the
    machines of a fleet apart."""

    seed: int
    number: int
    of: int = 0

    @property
    def place(self) -> float:
        """Where among a calibration's joint draws its own is, from 0 up to 1.

        Replicates are spread evenly over them, and two in succession are half of them apart (the sequence of van der
        Corput, begun anywhere), where a fit puts a draw's opposite: of 99 chosen by chance the median was off by an
        eighth of the spread, up to 4 % of latencies that were known to a third.
        """
        turned = int(f"{self.number:032b}"[::-1], 2) / 2**32
        return float(turned + Draw(self.seed, 0, self.of).rng().random()) % 1.0

    def rng(self) -> np.random.Generator:
        """For what else is drawn once."""
        # zeros at the end of a seed do not count, and no stream of a ladder or a replay is a ninth
        return np.random.default_rng([self.seed, self.number, self.of, 9])

    def values(self, calibration: Calibration) -> dict[str, float]:
        """Its parameters."""
        return calibration.draw(self.place)


def draw_machine(
    calibration: Calibration, server: EngineFlags, draw: Draw | None, machine: Hardware | None = None
) -> Machine:
    """The machine of one joint draw, or of the central values. The server runs on the calibration's `machine`,
    if on no other.

    The size of the KV cache is the scenario's if it names one, else the calibration's (`EngineFlags.settled`).
    """
    if calibration.model not in FORMS:
        raise BadInput(f"expected one of {', '.join(sorted(FORMS))}, found {calibration.model!r}", key="model")
    values = calibration.values if draw is None else draw.values(calibration)
    system, clocks = SystemParameters.of(values), calibration.clocks
    if system.uplink is not None:  # fitted together with the step times: a draw of one goes with a draw of the other
        uplink = clocks.uplink.shifted(system.uplink, system.uplink_per_token)
        clocks = msgspec.structs.replace(clocks, uplink=uplink)

    def uniform(low: int, high: int) -> int:
        return (low + high) // 2 if draw is None else int(draw.rng().integers(low, high + 1))

    return Machine(
        step_time=step_time(calibration.model, values),
        server=server.settled(system.capacity(server.declared), uniform, machine or calibration.machine),
        noise=calibration.noise,
        clocks=clocks,
        output_attained=system.output_attained,
    )
