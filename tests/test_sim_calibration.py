"""What is wrong in a calibration, or in the head of a run, is one line with file, line and key."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from sim.model.calibration import Calibration, Parameter, Source, read_calibration
from sim.model.errors import BadInput
from sim.run import read_run

GOOD = Calibration(
    source=Source(kind="assumed"),
    model="affine",
    parameters={
        "a1": Parameter(value=0.0003, stderr=0.0, low=0.0003, high=0.0003),
        "b0": Parameter(value=0.06, stderr=0.001, low=0.058, high=0.062),
    },
    draws={"a1": [0.0003, 0.0003], "b0": [0.059, 0.061]},
    range={"prompt_tokens": (1, 1500)},
)
TEXT = msgspec.json.format(msgspec.json.encode(GOOD), indent=1).decode()


def _first_difference(text: str) -> int:
    lines = TEXT.splitlines(), text.splitlines()
    return next((i for i, (a, b) in enumerate(zip(*lines, strict=False), 1) if a != b), max(1, len(lines[1])))


def test_what_is_written_is_read(tmp_path: Path):
    (tmp_path / "c.json").write_text(TEXT)
    assert read_calibration(tmp_path / "c.json") == GOOD


UPLINK = '"uplink": {\n   "quantiles": [\n    0.0'

# What replaces what, how many lines before the difference the key stands, and the complaint.
BAD = [
    ('"format": 2', '"format": 7', 0, "format: expected 1 or 2, found 7"),
    ('"format": 2', '"format": "1"', 0, 'format: expected 1 or 2, found "1"'),
    ('"affine"', '"roofline"', 0, "model: unknown step-time form; "),
    ('"affine"', "3", 0, "model: expected text, found 3"),
    ('"draws"', '"drawz"', 0, "drawz: unknown key; did you mean draws?"),
    ('"stderr": 0.001', '"sterr": 0.001', 0, "parameters.b0.sterr: unknown key; did you mean stderr?"),
    ('"low": 0.058', '"low": "58 ms"', 0, "parameters.b0.low: expected a number, found '58 ms'"),
    ('"b0": {', '"uplnik": {', 0, "parameters.uplnik: unknown parameter; did you mean uplink?"),
    ('"low": 0.058', '"low": 0.6', 0, "parameters.b0.low: expected at most high (0.062), found 0.6"),
    ('"value": 0.06', '"value": -0.06', 0, "parameters.b0.value: expected 0 or more, found -0.06"),
    ("0.061", "-0.061", 0, "draws.b0[1]: expected 0 or more, found -0.061"),
    ("0.061", "null", 0, "draws.b0[1]: expected a number, found nothing"),
    (",\n   0.061", "", 1, "draws.b0: expected 2 draws, found 1"),
    ('"draws": {\n  "a1"', '"draws": {\n  "a7"', 0, "draws.a7: expected only names of parameters"),
    ("1500", "0", 2, "range.prompt_tokens: expected low up to high, found 1.0 to 0.0"),
    ('"affine"', '"affine', 0, "not JSON: Invalid control character at"),
    ('"model": ', '"model" ', 0, "not JSON: Expecting ':' delimiter"),
    ('"affine"', '"levels"', -8, "parameters.b1: missing; the form levels requires it"),
    ("0.059", "0.0", 6, "draws: expected a decode step to take some time; it takes none"),
    ('"drift": 0.0', '"drift": -1', 0, "noise.drift: expected 0 or more, found -1"),
    ('"memory": 0.0', '"memory": 2', 0, "noise.memory: expected at most 1, found 2"),
    ('"returned": 0.0', '"returned": 2', 0, "noise.returned: expected at most 1, found 2"),
    ('"drift_skew": 0.0', '"drift_skew": -3', 0, "noise.drift_skew: expected -2 or more, found -3"),
    ('"prefill_share": 1.0', '"prefill_share": -1', 0, "noise.prefill_share: expected 0 or more, found -1"),
    ('"memory_steps": 1.0', '"memory_steps": 0', 0, "noise.memory_steps: expected more than 0, found 0"),
    ('"decode": []', '"decode": [0.0, 2.0]', 0, "noise.decode[0]: expected more than 0, found 0"),
    (
        '"uplink": {\n   "quantiles": [\n    0.0',
        '"uplink": {\n   "quantiles": [\n    -1',
        0,
        "clocks.uplink.quantiles[0]: expected 0 or more, found -1",
    ),
    (UPLINK, UPLINK.replace("\n    0.0", ""), 1, "clocks.uplink.quantiles: expected at least one value, found an"),
    (TEXT[len(TEXT) // 2 :], "", 0, "not JSON: it ends too early"),
    (TEXT, "[]", 0, "expected a calibration file"),
    (TEXT, "", 0, "not JSON: it ends too early"),
]


@pytest.mark.parametrize(("old", "new", "before", "message"), BAD)
def test_a_bad_calibration_names_its_line(old: str, new: str, before: int, message: str, tmp_path: Path):
    text = TEXT.replace(old, new)
    assert text != TEXT
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(BadInput) as caught:
        read_calibration(file)
    assert str(caught.value).startswith(f"{file}:{_first_difference(text) - before}: {message}")


def test_not_a_number_is_not_json(tmp_path: Path):
    (tmp_path / "c.json").write_text(TEXT.replace("1500", "NaN"))
    with pytest.raises(BadInput, match=r"c\.json: not JSON: NaN is not a number in JSON"):
        read_calibration(tmp_path / "c.json")


def test_a_key_that_is_there_twice_is_not_json(tmp_path: Path):
    (tmp_path / "c.json").write_text(TEXT.replace("{", '{"model": "affine", "model": "padded", ', 1))
    with pytest.raises(BadInput, match=r"c\.json: not JSON: key 'model' is there twice"):
        read_calibration(tmp_path / "c.json")


def test_a_missing_calibration():
    with pytest.raises(BadInput, match=r"^nowhere\.json: missing; expected a calibration file$"):
        read_calibration(Path("nowhere.json"))


def test_a_truncated_run_names_its_file_and_line(tmp_path: Path):
    head = json.dumps({"format": 2, "kind": "measured", "rungs": []}, indent=1)
    (tmp_path / "run.json").write_text(head[:30])
    with pytest.raises(BadInput, match=r"run\.json:3: not JSON: it ends too early; expected the head of a run"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(head)
    with pytest.raises(BadInput, match=r"requests\.jsonl: missing"):
        read_run(tmp_path)
    (tmp_path / "requests.jsonl").write_text('{"id": 1, "sent"\n{"id": 2}\n')
    with pytest.raises(BadInput, match=r"requests\.jsonl:1: not a JSON object"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(head.replace("2,", "9,"))
    with pytest.raises(BadInput, match=r"run\.json:2: format: expected 1 or 2, found 9"):
        read_run(tmp_path)
    with pytest.raises(BadInput, match=r"run\.json: missing; expected the head of a run"):
        read_run(tmp_path / "nowhere")
