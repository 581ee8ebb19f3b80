"""The constants that docs/calibration.md lists have the values of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from calibrate.regression import design, fit, posterior, priors, step_noise, variance_components
from calibrate.schedule import admission_timing

MODULES = {
    m.__name__.rpartition(".")[2]: m
    for m in (admission_timing, design, fit, posterior, priors, step_noise, variance_components)
}
PAGE = Path("docs/calibration.md").read_text()
ROWS = re.findall(r"^\| `(\w+)\.(\w+)` \| (.*?) \|", PAGE, re.MULTILINE)


def test_the_table_is_found():
    assert len(ROWS) > 20


@pytest.mark.parametrize(("module", "name", "value"), ROWS, ids=lambda x: x if x.isidentifier() else "")
def test_a_constant_has_the_value_that_the_page_says(module: str, name: str, value: str):
    assert getattr(MODULES[module], name) == ast.literal_eval(value)


@pytest.mark.parametrize("module", ["priors", "variance_components"])
def test_every_constant_of_the_priors_is_on_the_page(module: str):
    named = {name for of, name, _ in ROWS if of == module}
    constants = {name for name in vars(MODULES[module]) if name.isupper() and name[0] != "_"}
    imported = {"BLOCK_SECONDS", "LEVEL", "TREND", "MOST_SKEWED"}
    assert constants - imported - {"FAR", "MOST_INTERVALS", "LEAST_INTERVALS"} <= named
