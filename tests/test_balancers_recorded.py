"""Our balancers choose what real ones chose, to every tie, and start what waits when they did."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from msgspec.structs import replace
from recorded_balancers import BalancerRecording, differences, read_balancer_recordings
from schedule import BadSchedules

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "data" / "balancers.jsonl.gz"


def test_choices_of_the_real_balancer(balancer_recording: BalancerRecording) -> None:
    found = list(differences(balancer_recording).values())
    assert not found, "\n".join(found[:10])


@pytest.fixture(scope="module")
def shipped() -> dict[str, BalancerRecording]:
    return {r.name: r for r in read_balancer_recordings(SHIPPED)}


def test_the_shipped_file_has_84_recordings_of_four_balancers(shipped: dict[str, BalancerRecording]) -> None:
    assert len(shipped) == 84
    assert sum(len(r.events) for r in shipped.values()) == 14_270
    assert Counter(r.software for r in shipped.values()) == {
        "nginx": 30,
        "haproxy": 38,
        "vllm-router": 8,
        "sglang-router": 8,
    }


@pytest.mark.parametrize(
    ("name", "field", "change"),
    [
        ("haproxy-lc-maxconn", "backend", lambda was: 1 - min(was, 1)),
        ("haproxy-lc-maxconn", "t_start", lambda was: was + 1),
        ("haproxy-lc-maxconn-drops", "status", lambda was: "cut"),
        ("nginx-lc-equal", "t_end", lambda was: was + 1),
        ("nginx-random-two", "draws", lambda was: (*was, 1)),
        ("nginx-random-two", "draws", lambda was: was[:1]),
        ("vllm-router-random", "backend", lambda was: 99),
        ("vllm-router-p2", "candidates", lambda was: tuple(replace(c, load=c.load + 1) for c in was)),
    ],
)
def test_differences_sees_one_choice_that_is_not_as_recorded(shipped, name, field, change) -> None:
    recording = shipped[name]
    event = recording.events[-1]
    wrong = replace(event, **{field: change(getattr(event, field))})
    assert differences(replace(recording, events=(*recording.events[:-1], wrong))).keys() == {event.uid}


def test_bad_files_are_one_line_that_names_the_place(tmp_path: Path) -> None:
    line = gzip.decompress(SHIPPED.read_bytes()).splitlines()[0]
    bad = {
        "empty.jsonl": (b"\n", "no recordings of balancers"),
        "torn.jsonl": (line + b"\n" + line[:-200], "torn.jsonl:2: not a recording of a balancer"),
        "other.jsonl": (b'{"a": 1}', "other.jsonl:1: not a recording of a balancer (Object missing required field"),
        "policy.jsonl": (line.replace(b'"first"', b'"last"'), "policy.jsonl:1: a balancer that is not known here"),
        "backend.jsonl": (
            line.replace(b'"backend":0', b'"backend":9'),
            "backend.jsonl:1: backend: expected one of 3",
        ),
    }
    for name, (content, message) in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadSchedules) as raised:
            read_balancer_recordings(tmp_path / name)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)


def test_pytest_balancers_judges_another_file_plain_or_gz(tmp_path: Path) -> None:
    lines = gzip.decompress(SHIPPED.read_bytes()).splitlines()
    (tmp_path / "good.jsonl.gz").write_bytes(gzip.compress(lines[0] + b"\n" + lines[1]))
    (tmp_path / "wrong.jsonl").write_bytes(lines[2].replace(b'"backend":0', b'"backend":1', 1))

    options = [word for f in ("good.jsonl.gz", "wrong.jsonl") for word in ("--balancers", str(tmp_path / f))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "-k", "choices_of", __file__]
    both = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert both.returncode == 1
    assert "1 failed, 2 passed" in both.stdout
