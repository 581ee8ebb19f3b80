"""Where each flag of a server is from: its own word, its launch command, the scenario, a default; and what to check."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from servers import Standin, quick_calibration, standin
from warned import texts

from measure.server.detection import Server
from measure.server.limits import check_limits
from scenarios.cli.main import status
from sim.engines import vllm_v1
from sim.engines.tgi_0_9_4 import Flags
from sim.model.flags import arguments, launched_by, told_by
from sim.model.identity import Identity
from sim.model.scenario import Load, Scenario
from sim.model.workload import Workload

pytestmark = pytest.mark.usefixtures("no_fit_check")
DATA = Path(__file__).parent.parent / "data" / "tgi-0.9.4-router-http"
QUICK = ("--replicates", "19", "--jobs", "1")
SMALL = """
name: small
server: {max_batch_total_tokens: 20000, max_waiting_tokens: 15}
workload: {prompt_tokens: 60, output_tokens: 10}
load: {users: [1, 2], spawn_rate: 20, seconds: 1}
slo: {e2e_p95: 9}
calibration: calibration.json
"""


def run(*arguments: str | Path) -> int:
    return status([str(argument) for argument in arguments])


def folded(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("scenario")
    quick_calibration(made)
    (made / "small.yaml").write_text(SMALL)
    (made / "extending.yaml").write_text("extends: small.yaml\nserver: {waiting_served_ratio: 1.2}\n")
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Any:
    with standin("--calibration", str(folder / "calibration.json")) as process:
        yield process


def test_a_value_that_a_scenario_writes_is_told_from_the_same_by_default(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("simulate", folder / "extending.yaml", "--set", "server.max_input_length=1024", *QUICK)
    assert run(*asked, "-o", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "small" / "forecast.json").read_text())
    sources = {name: flag["source"] for name, flag in found["flags"].items()}
    written = ("max_batch_total_tokens", "max_waiting_tokens", "waiting_served_ratio", "max_input_length")
    assert {name for name, source in sources.items() if source == "scenario"} == set(written)  # file, extends, --set
    assert set(sources.values()) == {"scenario", "default"}
    assert found["flags"]["max_batch_prefill_tokens"] == {"value": 4096, "source": "default"}
    assert any("max_batch_prefill_tokens 4096 is only the default" in text for text in texts(found["warnings"]))
    simulated = json.loads((tmp_path / "out" / "small" / "run" / "run.json").read_text())
    assert {name: flag["source"] for name, flag in simulated["flags"].items()} == sources
    assert "written" not in found["scenario"]
    shown = folded(capsys.readouterr().out)
    assert "Flags from the scenario: max_batch_total_tokens 20000" in shown
    assert "defaults: max_batch_prefill_tokens 4096" in shown
    assert run("report", tmp_path / "out" / "small", "-o", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "The server&#39;s flags" in page
    assert ">from the scenario<" in page
    assert ">defaults<" in page


def test_plan_says_which_flags_are_assumed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", folder / "small.yaml", *QUICK, "--users", "1", "--set", "fleet.replicas=1") in (0, 1)
    assert "defaults: max_batch_prefill_tokens 4096" in folded(capsys.readouterr().out)


def test_what_the_server_tells_is_not_what_the_scenario_says(
    server: Standin, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = ("--set", "server.max_batch_prefill_tokens=3000")
    assert run("doctor", folder / "small.yaml", "--url", server.url, *change) in (0, 1)
    shown = folded(capsys.readouterr().out)
    assert "max_waiting_tokens 20: told by the server" in shown  # the scenario says 15
    assert "max_batch_prefill_tokens 3000 is the scenario's: the server does not tell it" in shown
    assert "Check it against the server's launch command" in shown
    assert "requires_padding false: default" in shown
    made = tmp_path / "run"
    assert run("measure", folder / "small.yaml", "--url", server.url, "-o", made, *change) == 0
    assert "max_batch_prefill_tokens 3000 is the scenario's" in folded(capsys.readouterr().err)
    # resumed with the same values, however they are written: it is the same scenario
    again = ("measure", folder / "small.yaml", "--url", server.url, "-o", made, "--resume")
    assert run(*again, *change, "--set", "server.max_input_length=1024") == 0
    assert run(*again) == 2
    assert run("calibrate", made, "-o", tmp_path / "c.json") in (0, 1)
    found = json.loads((tmp_path / "c.json").read_text())
    (flags,) = found["server"]
    assert (flags["max_waiting_tokens"], flags["sources"]["max_waiting_tokens"]) == (20, "server")
    assert flags["sources"]["max_batch_prefill_tokens"] == "scenario"
    assert any("max_batch_prefill_tokens 3000 is the scenario's" in text for text in texts(found["warnings"]))
    assert run("report", made, "-o", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert ">told by the server<" in page
    assert ">from the scenario<" in page
    with standin("--calibration", str(tmp_path / "c.json")) as likewise:  # it takes its flags
        assert likewise.url


def test_what_is_on_the_launch_command_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "run"
    shutil.copytree(DATA / "short", made)
    head = json.loads((made / "run.json").read_text())
    image = "ghcr.io/huggingface/text-generation-inference:0.9.4"
    head["container"] = {"image": image, "argv": ["--model-id", "m", "--max-batch-prefill-tokens", "9000"]}
    (made / "run.json").write_text(json.dumps(head))
    assert run("calibrate", made, "-o", tmp_path / "c.json") in (0, 1)
    found = json.loads((tmp_path / "c.json").read_text())
    (flags,) = found["server"]
    assert (flags["max_batch_prefill_tokens"], flags["sources"]["max_batch_prefill_tokens"]) == (9000, "launch")
    assert not any("the server does not tell it" in text for text in texts(found["warnings"]))


def test_a_run_of_before_sources_were_recorded_takes_what_is_there_for_the_scenarios(tmp_path: Path) -> None:
    assert "flags" not in json.loads((DATA / "short" / "run.json").read_text())
    assert run("calibrate", DATA / "short", "-o", tmp_path / "c.json") in (0, 1)
    (flags,) = json.loads((tmp_path / "c.json").read_text())["server"]
    told = {name for name, source in flags["sources"].items() if source == "server"}
    assert told == set(flags["sources"]) - {"max_batch_prefill_tokens", "requires_padding"}
    assert flags["sources"]["max_batch_prefill_tokens"] == "scenario"


def test_what_was_written_is_no_key_of_a_scenario(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.yaml").write_text(SMALL + "written: [engine]\n")
    assert run("simulate", tmp_path / "s.yaml") == 2
    assert "written: unknown key" in capsys.readouterr().err
    assert run("schema") == 0
    assert "written" not in json.loads(capsys.readouterr().out)["$defs"]["Scenario"]["properties"]


@pytest.mark.parametrize(
    ("name", "head", "row", "said"),
    [
        ("table.csv", "", "", "the table does not say which engine was timed"),
        ("vllm_a100.csv", "", "", "the step times are of vllm, scheduled here as tgi-0.9.4"),
        ("table.csv", ",engine", ",SGLang 0.3.0", "the step times are of SGLang 0.3.0, scheduled here as tgi-0.9.4"),
        ("table.csv", ",engine", ",tgi-0.9.4", None),
    ],
)
def test_step_times_of_another_engine_are_taken_with_a_warning(
    name: str, head: str, row: str, said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"phase,sequences,tokens_per_sequence,seconds{head}"]
    for n in (1, 2, 4, 8):
        for tokens in (64, 256):
            lines.append(f"prefill,{n},{tokens},{0.01 + 1e-4 * n * tokens}{row}")
            lines.append(f"decode,{n},{tokens},{0.02 + 1e-3 * n}{row}")
    (tmp_path / name).write_text("\n".join(lines))
    assert run("calibrate", tmp_path / name, "-o", tmp_path / "c.json") in (0, 1)
    warned = [text for text in texts(json.loads((tmp_path / "c.json").read_text())["warnings"]) if "scheduled" in text]
    assert [text.startswith(said) for text in warned] == [True] if said is not None else warned == []
    (tmp_path / "s.yaml").write_text(SMALL.replace("calibration.json", "c.json"))
    capsys.readouterr()
    if said is not None:
        assert run("simulate", tmp_path / "s.yaml", "--json", *QUICK) == 0
        assert sum(text.startswith(said) for text in texts(json.loads(capsys.readouterr().out)["warnings"])) == 1


def test_a_command_line_is_read_as_the_servers_read_it() -> None:
    line = "vllm serve m --max-num-batched-tokens 8k --max-model-len=4K --no-enable-prefix-caching --async-scheduling"
    line += " --num-gpu-blocks-override 65 --scheduling-policy priority --long-prefill-token-threshold=1m"
    words = f"{line} --max-num-seqs many --watermark".split()
    assert launched_by(vllm_v1.Flags, words) == {
        "max_num_batched_tokens": 8000,
        "max_model_len": 4096,
        "enable_prefix_caching": False,
        "async_scheduling": True,
        "num_gpu_blocks": 65,
        "scheduling_policy": "priority",
        "long_prefill_token_threshold": 1_000_000,
    }
    assert launched_by(Flags, ["--max-waiting-tokens", "20", "--waiting-served-ratio=1"]) == {
        "max_waiting_tokens": 20,
        "waiting_served_ratio": 1.0,
    }


@pytest.mark.parametrize(
    "flags",
    [
        vllm_v1.Flags(num_gpu_blocks=65, enable_prefix_caching=False, scheduling_policy="priority", watermark=0.1),
        Flags(max_batch_total_tokens=36000, waiting_served_ratio=1.5, requires_padding=True),
    ],
)
def test_arguments_give_the_flags_that_they_were_written_from(flags: Any) -> None:
    every = flags.__struct_fields__
    assert type(flags)(**launched_by(type(flags), arguments(flags, every))) == flags
    assert arguments(flags, ()) == []


def test_what_vllm_tells_is_taken_where_it_can_be_meant() -> None:
    told = {"version": "0.25.1", "max_model_len": 1e3, "block_size": True, "enable_prefix_caching": False}
    assert told_by(vllm_v1.Flags, told | {"num_gpu_blocks": -1, "gpu_memory_utilization": 7}) == {
        "version": "0.25.1",
        "max_model_len": 1000,
        "enable_prefix_caching": False,
    }


def test_more_users_than_the_queue_of_vllm_takes_are_said_to_be_refused() -> None:
    scenario = Scenario(
        name="x",
        server=vllm_v1.Flags(max_num_queued_reqs=8),
        workload=Workload(prompt_tokens=10, output_tokens=5),
        load=Load(users=[4, 16]),
    )
    server = Server(api="completions", engine=Identity(name="vllm", version="0.32.0"))
    (said,) = check_limits(server, scenario)
    assert (said.code, "16 users, but the server accepts 8" in said.text) == ("permits-exceeded", True)
