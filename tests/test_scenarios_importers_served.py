"""Which engine served what another tool recorded: its file says, or the user. Sums become published figures."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from warned import texts

from scenarios.cli.main import status
from scenarios.importers.detect import import_results
from scenarios.importers.served import served_by
from scenarios.load.scenario import load
from sim.engines import vllm_v1
from sim.engines.tgi_0_9_4 import Flags
from sim.model.errors import BadInput
from sim.model.identity import NotTheEngine
from sim.run import Run, read_run, write_run

SAMPLES = Path(__file__).parent / "samples"
VLLM = SAMPLES / "vllm.json.gz"
GUIDELLM = SAMPLES / "guidellm.json.gz"
SERVER = "name: mine\nserver: {engine: vllm-v1, max_num_seqs: 4, num_gpu_blocks: 300}\nmachine: {gpu: cpu}\n"
ASKED = "workload: {prompt_tokens: 40, output_tokens: 36}\nload: {users: [1, 2]}\n"


def again(run: Run, folder: Path) -> Run:
    """The run, written and read."""
    return read_run(write_run(run, folder))


def vllm_with(folder: Path, **more: object) -> Path:
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(gzip.decompress(VLLM.read_bytes()).splitlines()[0]) | more))
    return path


def aiperf(folder: Path, metrics: object = None) -> Path:
    """One folder of aiperf's, with what it keeps of the server's metrics."""
    with tarfile.open(SAMPLES / "aiperf.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    found = folder / "aiperf" / "sweep" / "concurrency_2"
    if metrics is not None:
        (found / "server_metrics_export.json").write_text(json.dumps({"metrics": metrics}))
    return found


def test_without_a_name_a_run_is_of_no_engine(tmp_path: Path) -> None:
    run = again(import_results(VLLM), tmp_path / "run")
    assert run.engine is None
    assert any("does not say which engine served" in text for text in texts(run.warnings))
    with pytest.raises(NotTheEngine, match=r"nothing says which engine .* --as tgi-0\.9\.4 or --as vllm-v1"):
        _ = run.server


@pytest.mark.parametrize("path", [VLLM, GUIDELLM])
def test_the_user_names_the_engine_and_its_version(path: Path, tmp_path: Path) -> None:
    run = again(import_results(path, served_by("vllm-0.25.1")), tmp_path / "run")
    assert (str(run.engine), run.known, run.taken_as) == ("vllm 0.25.1", True, None)
    assert isinstance(run.server, vllm_v1.Flags) and run.server.version == "0.25.1"
    assert [text.split()[0] for text in texts(run.untold)] == ["max_num_batched_tokens", "max_num_seqs"]
    assert isinstance(import_results(path, served_by("tgi-0.9.4")).server, Flags)
    other = again(import_results(path, served_by("sglang-0.4.1")), tmp_path / "other")
    with pytest.raises(NotTheEngine, match=r"is of sglang 0\.4\.1"):
        _ = other.server


def test_or_a_scenario_with_the_flags_of_its_server(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(SERVER + ASKED)
    run = again(import_results(VLLM, served_by(str(tmp_path / "mine.yaml"))), tmp_path / "run")
    server = run.server
    assert isinstance(server, vllm_v1.Flags)
    assert (server.max_num_seqs, server.num_gpu_blocks, server.async_scheduling) == (4, 300, False)
    assert run.scenario.machine.gpu == "cpu"
    assert run.flags["max_num_seqs"].source == "scenario"
    assert [text.split()[0] for text in texts(run.untold)][:1] == ["max_num_batched_tokens"]


def test_metadata_and_backends_of_vllm_bench_name_the_engine(tmp_path: Path) -> None:
    told = import_results(vllm_with(tmp_path, engine="vllm", version="0.32.0"))
    assert (str(told.engine), told.engine and told.engine.source, told.known) == ("vllm 0.32.0", "file", True)
    with pytest.raises(BadInput, match=r"--engine tgi 0\.9\.4: is of vllm 0\.32\.0 by the file itself"):
        import_results(vllm_with(tmp_path, engine="vllm", version="0.32.0"), served_by("tgi-0.9.4"))
    assert str(import_results(vllm_with(tmp_path, backend="tgi")).engine) == "tgi"
    assert import_results(vllm_with(tmp_path, backend="vllm")).engine is None  # any OpenAI-style server
    bare = again(import_results(vllm_with(tmp_path, engine="vllm")), tmp_path / "run")
    with pytest.raises(NotTheEngine, match="expected --as vllm-v1"):  # nor TGI, where only the version is missing
        _ = bare.server
    assert import_results(vllm_with(tmp_path, engine="vllm"), served_by("vllm-0.32.0")).known


def test_guidellm_names_it_by_a_label_or_its_own_backend(tmp_path: Path) -> None:
    document = json.loads(gzip.decompress(GUIDELLM.read_bytes()))
    path = tmp_path / "report.json"
    document["config"]["metadata"]["labels"] = {"engine": "vLLM", "version": "0.20.2"}
    path.write_text(json.dumps(document))
    assert str(import_results(path).engine) == "vllm 0.20.2"
    document["config"]["metadata"]["labels"] = {}
    document["config"]["spec"]["backend"]["kind"] = "vllm_python"
    path.write_text(json.dumps(document))
    assert str(import_results(path).engine) == "vllm"


def test_aiperf_names_it_by_the_metrics_that_it_scraped(tmp_path: Path) -> None:
    labels = {"num_gpu_blocks": "65", "block_size": "32", "enable_prefix_caching": "False"}
    metrics = {"vllm:cache_config_info": {"series": [{"labels": labels}]}, "vllm:num_requests_running": {"series": []}}
    run = import_results(aiperf(tmp_path / "a", metrics), served_by("vllm-0.32.0"))
    server = run.server
    assert isinstance(server, vllm_v1.Flags)
    assert (server.num_gpu_blocks, server.block_size, server.enable_prefix_caching) == (65, 32, False)
    assert run.flags["num_gpu_blocks"].source == "server"
    for odd in ({}, [], {"sglang:x": {}}, {"vllm:cache_config_info": 3}):
        found = import_results(aiperf(tmp_path / "b", odd))
        assert found.engine is None or odd == {"vllm:cache_config_info": 3}


def sums(path: Path, out: Path, *more: str) -> dict[tuple[int, str], tuple[float, float]]:
    """The published figures that a file's sums become: by users and metric, value and rounding."""
    assert status(["import", str(path), "-o", str(out), *more]) == 0
    return {(f.users or 0, f.metric): (f.value, f.rounding) for f in load(out).published}


def test_sums_become_published_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = vllm_with(tmp_path)
    document: dict[str, Any] = json.loads(alone.read_text())
    for name in ("ttfts", "itls", "input_lens", "output_lens", "start_times", "errors", "latencies", "queue_times"):
        document.pop(name)
    alone.write_text(json.dumps(document))
    assert status(["import", str(alone), "-o", str(tmp_path / "run")]) == 2
    assert "-o NAME.yaml makes published figures of the sums" in capsys.readouterr().err
    assert status(["import", str(alone), "-o", str(tmp_path / "x.yaml")]) == 2
    assert "expected --engine with it" in capsys.readouterr().err
    found = sums(alone, tmp_path / "sums.yaml", "--engine", "vllm-0.25.1")
    value, rounding = found[1, "ttft_mean"]
    assert value == pytest.approx(0.044833, rel=1e-4)
    assert rounding == pytest.approx(1.96 * 0.0080506 / 24**0.5, rel=1e-2)
    scenario = load(tmp_path / "sums.yaml")
    assert (scenario.published[0].prompt_tokens, scenario.published[0].output_tokens) == (40, 34)  # 972 and 808 of 24
    assert isinstance(scenario.server, vllm_v1.Flags) and scenario.server.version == "0.25.1"
    assert status(["import", str(alone), "-o", str(tmp_path / "sums.yaml"), "--engine", "tgi-0.9.4"]) == 2


def test_sums_of_other_tools_do_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = sums(GUIDELLM, tmp_path / "g.yaml", "--engine", "tgi-0.9.4")
    assert {users for users, _ in found} == {1, 2, 4}
    assert found[1, "ttft_mean"][0] == pytest.approx(0.0499054, rel=1e-4)
    summary = aiperf(tmp_path) / "profile_export_aiperf.json"
    found = sums(summary, tmp_path / "a.yaml", "--engine", "llama3-8b-vllm")
    assert found[2, "tpot_mean"][0] == pytest.approx(0.0248808, rel=1e-4)
    assert load(tmp_path / "a.yaml").machine.gpu == "A100-40GB"
    capsys.readouterr()
    trace = tmp_path / "trace.json"
    trace.write_text('{"prompt_tokens": 3, "output_tokens": 4}')
    assert status(["import", str(trace), "-o", str(tmp_path / "t.yaml"), "--engine", "tgi-0.9.4"]) == 2
    assert "expected the sums of `vllm bench serve`, aiperf or guidellm" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["vllm", "", "no-such-engine", "no/such.yaml"])
def test_an_engine_that_says_nothing_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["import", str(VLLM), "-o", str(tmp_path / "run"), "--engine", text]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "run").exists()
