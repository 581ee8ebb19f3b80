"""Numbers as they are printed."""

import math

import pytest

from scenarios.answer.numbers import percent, significant, with_band
from scenarios.forecast.forecast import Estimate


@pytest.mark.parametrize(
    ("low", "value", "high", "text"),
    [
        (0.96, 1.1, 1.21, "1.10 0.96–1.21"),  # half a width of 0.125: a 1, so two digits
        (6.76, 7.0, 7.43, "7.0 6.8–7.4"),
        (100.4, 116.2, 137.4, "116 100–137"),
        (1350.0, 1650.0, 1900.0, "1650 1350–1900"),
        (0.0003, 0.2, 9.6, "0.2 0.0–9.6"),  # never a bare 0 for something that is not
        (2.0, 2.0, 2.0, "2"),
        (2.04, 2.04, 2.04, "2.04"),
        (0.0, 0.0, 0.0, "0"),
        (None, None, None, "–"),
    ],
)
def test_numbers_have_the_digits_their_band_leaves(
    low: float | None, value: float | None, high: float | None, text: str
):
    assert with_band(Estimate(value=value, low=low, high=high)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.0123"), (99.96, "100"), (1234.5, "1234"), (1_234_567.0, "1234567"), (2.5e7, "2.5e+07"), (0.0, "0")],
)
def test_digits_that_count_are_no_power_of_ten_where_plain_ones_are_as_short(value: float, text: str):
    assert significant(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.0123, "+1.2%"), (-0.5, "-50.0%"), (12.3456, "+1235%"), (None, "–"), (math.nan, "–")]
)
def test_shares_in_percent(share: float | None, text: str):
    assert percent(share, "+") == text
