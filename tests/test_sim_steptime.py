"""A run of steps in closed form: what its steps sum to, and an inverse that is exact to the ulp."""

from __future__ import annotations

import math
from fractions import Fraction

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.steptime.basis import columns
from sim.steptime.linear import FORMS, Linear, affine
from sim.steptime.segment import Segment
from sim.steptime.work import StepWork

starts = st.one_of(st.just(0.0), st.floats(0, 1e6))
firsts = st.one_of(st.sampled_from([1.0, 0.1, 1 / 3]), st.floats(1e-5, 10))
growths = st.one_of(st.just(0.0), st.floats(1e-9, 1e-2))
extras = st.one_of(st.just(0.0), st.floats(0, 5))
runs = st.builds(Segment, starts, firsts, growths, extras)


@given(runs, st.integers(0, 5000))
def test_the_end_of_k_steps_is_the_sum_of_their_times(run: Segment, k: int) -> None:
    first, growth, extra = Fraction(run.first), Fraction(run.growth), Fraction(run.once)
    exact = Fraction(run.start) + (extra + k * first + growth * k * (k - 1) / 2 if k else 0)
    assert run.end(k) == pytest.approx(float(exact), rel=1e-12)
    if k:
        assert run.ends(k)[-1] == run.end(k)
        assert len(run.ends(k)) == k


@given(runs, st.integers(1, 5000))
def test_the_inverse_is_right_at_a_boundary_and_one_ulp_to_either_side(run: Segment, k: int) -> None:
    end = run.end(k)
    for time in (math.nextafter(end, -math.inf), end, math.nextafter(end, math.inf)):
        by = run.steps_by(time)
        assert run.end(by) >= time
        assert by == 0 or run.end(by - 1) < time


@given(runs, st.floats(0, 1e5))
def test_the_inverse_is_right_at_any_time(run: Segment, after: float) -> None:
    time = run.start + after
    by = run.steps_by(time)
    assert run.end(by) >= time
    assert by == 0 or run.end(by - 1) < time


@given(
    st.fixed_dictionaries({name: st.floats(0, 1) for name in ("b0", "b1", "b2", "b3")}),
    st.lists(st.integers(1, 3000), min_size=1, max_size=8),
    st.integers(1, 50),
)
def test_a_forms_line_is_its_next_steps_as_every_context_grows_by_a_token(
    coefficients: dict[str, float], contexts: list[int], k: int
) -> None:
    for model in FORMS:
        levels = {"level_1": 0.1, "level_5": 0.7} if model.endswith("levels") else {}
        made = Linear(model, coefficients | levels)
        first, growth = made.decode(len(contexts), sum(contexts), max(contexts))
        later, same_growth = made.decode(len(contexts), sum(contexts) + k * len(contexts), max(contexts) + k)
        assert first + growth * k == pytest.approx(later, rel=1e-9, abs=1e-9)
        assert growth == same_growth


def test_the_forms_are_the_formulas_they_print() -> None:
    flash = affine(a0=1, a1=2, a2=3, a3=5, b0=7, b1=11, b2=13, b3=17, c0=19, c1=23, f0=29, f1=31)
    assert flash.prefill(2, 30, 500, 20) == 1 + 2 * 30 + 3 * (500 + 30) / 2 + 5 * 2
    assert flash.decode(3, 100, 60) == (7 + 11 * 3 + 13 * 100 + 17 * 60, 13 * 3 + 17)
    assert flash.line(StepWork(kept=4, joined=2, decode_longest=60)).first == 19 + 23 * 6
    rows = Linear("padded", {"a0": 1, "a1": 2, "a2": 3, "a3": 5, "a4": 37, "b0": 7, "b1": 11, "b2": 13, "b3": 17})
    assert rows.prefill(2, 30, 500, 20) == 1 + 2 * 40 + 3 * (800 + 40) / 2 + 5 * 2 + 37 * 1600
    assert rows.decode(3, 100, 60) == rows.decode(3, 180, 60)  # every row is as long as the longest
    assert rows.decode(1, 60, 60)[0] < rows.decode(2, 70, 60)[0]
    levels = Linear("affine_levels", {"level_2": 1.0, "level_4": 3.0, "b1": 0.25, "b2": 13, "b3": 17})
    assert [levels.decode(n, 0, 0)[0] for n in (1, 2, 3, 4, 6)] == [0.75, 1.0, 2.0, 3.0, 3.5]
    assert levels.decode(3, 100, 60) == (2.0 + 13 * 100 + 17 * 60, 13 * 3 + 17)
    mixed = Linear("mixed", {"s0": 1, "s1": 2, "s2": 3, "s3": 5, "s4": 7, "s5": 11})
    both = StepWork(1, 30, 2, 500, 20, 3, 100, 60)  # the constant of a pass is paid once
    assert mixed.line(both).first == 1 + 2 * 30 + 3 * 500 + 5 * 2 + 7 * 3 + 11 * 100
    assert mixed.line(both, StepWork(prefill_attention=400, decode_context=3, decode_longest=1)).growth == 1200 + 33
    assert {"affine", "affine_levels", "padded", "levels", "mixed"} == set(FORMS)


@given(st.sampled_from(sorted(FORMS)), st.lists(st.integers(1, 900), min_size=11, max_size=11))
def test_a_design_matrix_times_the_coefficients_is_what_a_simulation_takes(model: str, counts: list[int]) -> None:
    basis = FORMS[model].basis
    coefficients = {name: 0.5 + i / 8 for i, name in enumerate(basis)}
    levels = {"level_1": coefficients["b0"], "level_900": coefficients["b0"]} if model.endswith("levels") else {}
    if levels:
        coefficients |= {"b1": 0.0}
    form = Linear(model, coefficients | levels)
    step, extra = StepWork(1, *counts[1:8]), StepWork(0, 0, 0, 0, 0, 0, 0, *counts[7:])
    works = [msgspec.structs.asdict(work) for work in (step, extra)]
    row = columns(basis, *works)
    said = sum(coefficients[name] * float(value) for name, value in row.items())
    assert said == pytest.approx(form.line(step).first + form.line(extra).first, rel=1e-9)
