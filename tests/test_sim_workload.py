"""Lengths and arrivals have the distributions they name, and depend on the generator alone."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import pytest

from sim.model.workload import (
    Cv,
    Exponential,
    Gamma,
    Lengths,
    Lognormal,
    RequestLengths,
    RequestSpec,
    Sampler,
    Trace,
    Workload,
    arrival_gaps,
    draw_lengths,
)
from sim.randomness import arrivals_at

N = 200_000


def draw(lengths: Lengths | int) -> np.ndarray:
    return draw_lengths(lengths, np.random.default_rng(1), N)


def test_uniform_lengths_include_both_ends() -> None:
    drawn = draw(Lengths(uniform=(3, 7)))
    assert set(drawn.tolist()) == {3, 4, 5, 6, 7}
    assert np.bincount(drawn)[3:] == pytest.approx(N / 5, rel=0.03)


def test_lognormal_lengths_have_the_mean_and_variation_asked() -> None:
    drawn = draw(Lengths(lognormal=Lognormal(mean=500.0, cv=1.5)))
    assert drawn.mean() == pytest.approx(500, rel=0.02)
    assert drawn.std() / drawn.mean() == pytest.approx(1.5, rel=0.05)
    assert draw(Lengths(lognormal=Lognormal(mean=1.2, cv=2.0))).min() == 1


def test_exponential_lengths_are_geometric_and_keep_their_bounds() -> None:
    drawn = draw(Lengths(exponential=Exponential(mean=200.0)))
    assert drawn.min() == 1
    assert drawn.mean() == pytest.approx(1 / -math.expm1(-1 / 200), rel=0.01)  # rounded up: geometric
    clipped = draw(Lengths(exponential=Exponential(mean=200.0, low=50, high=300)))
    assert (clipped.min(), clipped.max()) == (50, 300)


def test_a_number_is_that_number() -> None:
    assert set(draw(77).tolist()) == {77}


def test_what_comes_back_never_exceeds_what_is_charged() -> None:
    workload = Workload(
        prompt_tokens=Lengths(uniform=(1, 9)),
        output_tokens=Lengths(uniform=(1, 100)),
        max_new_tokens=Lengths(uniform=(40, 60)),
    )
    drawn = Sampler(workload, 3).requests(0)
    asked = [next(drawn) for _ in range(3000)]
    assert all(1 <= a.output_tokens <= a.max_new_tokens for a in asked)
    assert any(a.output_tokens < a.max_new_tokens for a in asked)
    assert any(a.output_tokens == a.max_new_tokens for a in asked)


def test_charged_is_what_comes_back_where_only_one_is_given() -> None:
    for given in ({"output_tokens": Lengths(uniform=(1, 9))}, {"max_new_tokens": Lengths(uniform=(1, 9))}):
        drawn = Sampler(Workload(prompt_tokens=5, **given), 3).requests(0)
        asked = [next(drawn) for _ in range(100)]
        assert all(a.output_tokens == a.max_new_tokens and a.prompt_tokens == 5 for a in asked)
        assert len({a.output_tokens for a in asked}) == 9


@pytest.mark.parametrize(
    ("given", "back"),
    [
        ({"output_tokens": 20}, 16),
        ({"max_new_tokens": 20}, 16),
        ({"output_tokens": 1}, 1),
        ({"output_tokens": 20, "max_new_tokens": 20}, 20),
        ({"output_tokens": 15, "max_new_tokens": 20}, 15),
    ],
)
def test_a_share_comes_back_of_answers_that_are_only_limited(given: dict[str, int], back: int) -> None:
    drawn = Sampler(Workload(prompt_tokens=5, **given), 3, attained=0.8).requests(0)
    assert next(drawn) == RequestSpec(5, back, max(given.values()))


def test_lengths_depend_on_the_seed_the_owner_and_the_request_only() -> None:
    workload = Workload(prompt_tokens=Lengths(uniform=(1, 999)), output_tokens=Lengths(uniform=(1, 999)))

    def asked(seed: int, owner: int, n: int = 2500) -> list[RequestSpec]:  # more than two blocks
        return list(islice(Sampler(workload, seed).requests(owner), n))

    mine = asked(1, 3)
    both = Sampler(workload, 1)
    one, other = both.requests(3), both.requests(4)
    together = [(next(one), next(other)) for _ in range(2500)]  # turn by turn
    assert [spec for spec, _ in together] == mine == asked(1, 3)
    assert [spec for _, spec in together] == asked(1, 4)
    assert len({tuple(asked(seed, owner, 9)) for seed in (1, 2) for owner in (-1, 0, 3, arrivals_at(3.0))}) == 8
    assert abs(np.corrcoef([a.prompt_tokens for a in mine], [a.output_tokens for a in mine])[0, 1]) < 0.06


PAIRS = RequestLengths(*(np.array(column) for column in ([10, 20, 30], [1, 2, 3], [5, 6, 7])))


def test_pairs_are_drawn_as_pairs_or_kept_in_order() -> None:
    rows = {RequestSpec(10, 1, 5), RequestSpec(20, 2, 6), RequestSpec(30, 3, 7)}
    drawn = Sampler(Workload(), 1, PAIRS, attained=0.5).requests(0)  # what came back was seen
    assert {next(drawn) for _ in range(200)} == rows
    in_order = Trace(PAIRS)
    assert [next(in_order.requests(user)).prompt_tokens for user in range(5)] == [10, 20, 30, 10, 20]


@pytest.mark.parametrize(
    ("arrivals", "cv"),
    [("constant", 0.0), ("poisson", 1.0), (Gamma(gamma=Cv(cv=2.0)), 2.0), (Gamma(gamma=Cv(cv=0.5)), 0.5)],
)
def test_gaps_between_arrivals_have_the_rate_and_variation_asked(arrivals: str | Gamma, cv: float) -> None:
    gaps = np.array(list(islice(arrival_gaps(arrivals, 4.0, 2), N)))
    assert gaps.mean() == pytest.approx(0.25, rel=0.02)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03, abs=1e-9)
    assert (gaps >= 0).all()
    if cv > 0:  # another rung of the rate, and another rate, have gaps of their own
        others = [arrival_gaps(arrivals, 4.0, 2, 1), arrival_gaps(arrivals, 5.0, 2)]
        for other in others:
            assert abs(np.corrcoef(gaps[:4000], list(islice(other, 4000)))[0, 1]) < 0.06
