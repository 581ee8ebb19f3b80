"""A calibration of one engine, taken for another whose scheduler is simulated: how far its step times may be off.

TGI 0.9.4 computes prompts in steps of their own, vLLM beside decodes: the constants of a prefill and of a decode step
say nothing of one that mixes them. Only the user can say how uncertain that makes the step times (`--transfer`).
"""

from __future__ import annotations

import msgspec
import numpy as np

from sim.engines.catalog import kind_of
from sim.model.calibration import Calibration
from sim.model.errors import BadInput
from sim.model.identity import NotTheEngine, is_engine
from sim.model.server import Declaration
from sim.steptime.basis import PREFILL
from sim.steptime.linear import FORMS, LEVEL

DRAWS = 999  # where the calibration has none of its own


def check_transfer(
    calibration: Calibration, declared: Declaration, taken_as: str | None, spread: float | None, path: str | None
) -> None:
    """Raise `NotTheEngine` for a calibration of another simulated engine without a transfer uncertainty, and `BadInput`
    for an uncertainty where none belongs."""
    other = kind_of(calibration.engine)
    crosses = calibration.source.kind == "run" and other is not None and other.declared is not declared
    if crosses and spread is None:
        raise NotTheEngine(
            f"the calibration is of {calibration.engine}, and what its steps would take under {declared.name} is not "
            f"known: two constants do not define a mixed step; calibrate from a run of {declared.name}, or "
            f"simulate with --as {declared.name} --transfer 0.3, which draws step times that are off by some 30 %",
            path=path,
        )
    if spread is not None and (taken_as is None or is_engine(calibration.engine, declared)):
        raise BadInput("expected only with --as, and a calibration of another engine", path="--transfer")


def transferred(calibration: Calibration, spread: float, seed: int) -> Calibration:
    """The calibration with more uncertain step times: in every draw, prefill terms are multiplied by one log-normal
    factor of median 1 and relative spread `spread`, all other terms by another."""
    rng = np.random.default_rng([seed, 11])
    draws = calibration.draws or {name: [value] * DRAWS for name, value in calibration.values.items()}
    count = len(next(iter(draws.values())))
    prompts, others = np.exp(spread * rng.standard_normal((2, count)))
    basis = FORMS[calibration.model].basis
    widened = dict(draws)
    for name, values in draws.items():
        if name in basis or name.startswith(LEVEL):
            factor = prompts if name in basis and basis[name].of == PREFILL else others
            widened[name] = (np.array(values) * factor).tolist()
    return msgspec.structs.replace(calibration, draws=widened)
