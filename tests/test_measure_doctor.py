"""The doctor says what is missing, and the command that fixes it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from servers import quick_calibration, standin

from measure.server.doctor import Finding, diagnose
from sim.engines.tgi_0_9_4 import Flags
from sim.model.scenario import Launch, Load, Scenario
from sim.model.workload import Workload


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {f.what: f for f in findings}


def scenario(prompt: int = 100, **more: object) -> Scenario:
    return Scenario(server=Flags(), name="x", workload=Workload(prompt_tokens=prompt, output_tokens=10), **more)  # type: ignore[arg-type]


def test_without_docker_a_launch_cannot_be_and_a_url_does_not_care(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    launched = by_name(diagnose(scenario(launch=Launch(model="m"))))
    assert launched["docker"].ok is False
    assert "no docker engine answers" in launched["docker"].found
    assert launched["docker"].fix
    assert by_name(diagnose(scenario()))["docker"].ok is None
    assert launched["locust"].ok is True


def test_a_server_is_held_against_the_scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with standin("--calibration", str(quick_calibration(tmp_path))) as process:
        good = by_name(diagnose(scenario(load=Load(users=[200])), process.url))
        bad = by_name(diagnose(scenario(prompt=1500), process.url))
    gone = by_name(diagnose(scenario(), process.url))
    assert good["server"].found == "TGI 0.9.4, servecast/stand-in"
    assert good["workload"].ok is True
    assert "200 users, but the server accepts 128" in good["flags"].found
    assert bad["workload"].ok is False
    assert "--max-input-length 1500" in bad["workload"].found
    assert gone["server"].ok is False


def test_more_users_want_more_open_files() -> None:
    found = by_name(diagnose(scenario(load=Load(users=[10**7]))))["open files"]
    assert (found.ok, found.fix) == (False, "ulimit -n 20000100")


def test_a_port_in_use_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from measure.server.doctor import _port

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert _port(port, needed=True).ok is False
    assert _port(port, needed=True).ok is True
