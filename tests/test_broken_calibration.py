"""A calibration that cannot be is refused by every command that reads one: one line with the key, exit status 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from warned import texts

from scenarios.cli.main import status

SHIPPED = Path("scenarios/shipped/data/llama2-70b.calibration.json")
Values = dict[str, Any]


def _set(path: str, value: Any) -> Callable[[Values], None]:
    *folders, last = path.split("/")

    def change(values: Values) -> None:
        for name in folders:
            values = values[name]
        values[last] = value

    return change


def _without(path: str) -> Callable[[Values], None]:
    *folders, last = path.split("/")

    def change(values: Values) -> None:
        for name in folders:
            values = values[name]
        del values[last]

    return change


def _level(name: str) -> Callable[[Values], None]:
    def change(values: Values) -> None:
        values["model"] = "affine_levels"
        for table in (values["parameters"], values["draws"]):
            table[name] = table.pop("b0")

    return change


def _all(change: Callable[[list[float]], list[float]]) -> Callable[[Values], None]:
    def every(values: Values) -> None:
        values["draws"] = {name: change(column) for name, column in values["draws"].items()}

    return every


BROKEN = {
    "no b0": (_without("parameters/b0"), "parameters.b0: missing; the form affine requires it"),
    "no a1": (_without("parameters/a1"), "parameters.a1: missing; the form affine requires it"),
    "no draws of b0": (_without("draws/b0"), "draws.b0: missing; the form affine requires it in every draw"),
    "no draws of b1": (_without("draws/b1"), "draws.b1: missing; expected draws of it, whose interval is"),
    "no parameters": (_set("parameters", {}), "parameters.a1: missing; the form affine requires it"),
    "no level": (_set("model", "levels"), "parameters.level_1: missing; the form levels requires it"),
    "a batch of none": (_level("level_0"), "parameters.level_0: expected a batch of 1 to 100000 requests"),
    "a batch of 1e9": (_level("level_1000000000"), "parameters.level_1000000000: expected a batch of 1 to 100000"),
    "two names of one level": (_level("level_08"), "parameters.level_08: expected a batch of 1 to 100000"),
    "no token budget": (
        _set("parameters/max_batch_total_tokens/low", 0),
        "parameters.max_batch_total_tokens.low: expected 1 or more, found 0",
    ),
    "a negative token budget": (
        _set("parameters/max_batch_total_tokens/value", -36000),
        "parameters.max_batch_total_tokens.value: expected 1 or more, found -36000",
    ),
    "a draw of no token budget": (
        _set("draws/max_batch_total_tokens", [0.0] * 200),
        "draws.max_batch_total_tokens[0]: expected 1 or more, found 0",
    ),
    "nothing comes back": (_set("draws/output_attained", [0.0] * 200), "draws.output_attained[0]: expected"),
    "more comes back than was asked": (
        _set("parameters/output_attained/high", 1.5),
        "parameters.output_attained.high: expected at most 1, found 1.5",
    ),
    "a step of 1e300 s": (
        _set("parameters/b0/high", 1e300),
        "parameters.b0.high: expected at most 86400, found 1e+300",
    ),
    "a draw of 1e300 s": (_set("draws/b0", [1e300] * 200), "draws.b0[0]: expected at most 86400, found 1e+300"),
    "a negative step": (_set("parameters/b0/low", -0.05), "parameters.b0.low: expected 0 or more, found -0.05"),
    "a value beside its interval": (_set("parameters/b0/value", 0.9), "parameters.b0.value: expected low to high"),
    "an interval that is reversed": (_set("parameters/b0/low", 10), "parameters.b0.low: expected at most high"),
    "a negative error": (_set("parameters/b0/stderr", -1), "parameters.b0.stderr: expected 0 or more, found -1"),
    "draws of another machine": (_set("draws/b0", [0.9] * 200), "draws.b0: expected draws around the interval"),
    "draws of unequal lengths": (_set("draws/b0", [0.06] * 10), "draws.b0: expected 200 draws, found 10"),
    "draws that are empty": (_all(lambda column: []), "draws.a0: expected at least one value, found an empty list"),
    "prefills for nothing": (
        lambda values: [
            values["draws"].update({name: [0.0] * 200}) or values["parameters"][name].update(value=0.0, low=0.0)
            for name in ("a0", "a1", "a2", "a3")
        ],
        "parameters: expected a prefill to take some time; it takes none",
    ),
    "a range that is reversed": (_set("range/users", [9, 1]), "range.users: expected low up to high, found 9.0 to 1.0"),
    "a range of everything": (_set("range/users", [0, 1e300]), "range.users[1]: expected at most 9007199254740992"),
    "a range of nothing known": (_set("range/usrs", [1, 2]), "range.usrs: unknown range; did you mean users?"),
    "noise that is no factor": (
        _set("noise/decode", [5.0, 6.0, 7.0]),
        "noise.decode: expected factors whose mean is 1, found a mean of 6",
    ),
    "noise out of order": (
        _set("noise/decode", [0.9, 1.2, 1.0]),
        "noise.decode[2]: expected no less than the quantile before (1.2), found 1.0",
    ),
    "endless noise": (_set("noise/drift", 1e300), "noise.drift: expected at most 3, found 1e+300"),
    "an endless way": (_set("clocks/uplink/quantiles", [1e300]), "clocks.uplink.quantiles[0]: expected at most 86400"),
    "reading backward": (_set("clocks/reading", -1), "clocks.reading: expected 0 or more, found -1"),
    "no such parameter": (_set("correlations", [["a0", "zz", 0.9]]), "correlations[0]: unknown parameter"),
    "a correlation of 2": (_set("correlations", [["a0", "a1", 2]]), "correlations[0][2]: expected at most 1, found 2"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_calibration_is_refused_by_name(what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    change, said = BROKEN[what]
    values = json.loads(SHIPPED.read_bytes())
    change(values)
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(values, indent=1))
    out = tmp_path / "out"
    assert status(["simulate", "llama2-70b", "--set", f"calibration={file}", "-o", str(out), "--jobs", "1"]) == 2
    shown, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(f"servecast: {file}:") and said in line, line
    assert not shown and not out.exists()


def test_without_draws_it_is_said_what_bands_leave_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    values = json.loads(SHIPPED.read_bytes())
    values["draws"] = {}
    file = tmp_path / "undrawn.json"
    file.write_text(json.dumps(values))
    quick = ["--users", "1", "--set", "load.seconds=5", "--replicates", "19", "--jobs", "1", "--json"]
    for calibration, said in ((file, True), (SHIPPED, False)):
        assert status(["simulate", "llama2-70b-1500-100", "--set", f"calibration={calibration}", *quick]) == 0
        found = " ".join(texts(json.loads(capfd.readouterr().out)["warnings"]))
        assert ("the calibration has no draws, so bands leave out" in found) == said


def test_compare_and_the_stand_in_refuse_it_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    values = json.loads(SHIPPED.read_bytes())
    del values["parameters"]["b0"], values["draws"]["b0"]
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(values, indent=1))
    for command in (
        ["compare", "data/tgi-0.9.4-router-http/short", "--calibration", str(file), "--jobs", "1"],
        ["standin", "--calibration", str(file)],
    ):
        assert status(command) == 2
        assert "parameters.b0: missing; the form affine requires it" in capfd.readouterr().err
