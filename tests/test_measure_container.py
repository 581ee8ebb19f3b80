"""The server started by a real docker engine; left out, and said so, where none answers."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import msgspec
import pytest
from docker.models.containers import ContainerCollection
from rich.console import Console
from standin_image import build

from measure.ladder.generator import free_port
from measure.ladder.session import measure
from measure.server.docker import LABEL, connect, launched, leftovers
from measure.server.doctor import diagnose
from measure.server.launch import CannotStart, command_line
from measure.server.tokenizer_patch import patched_tokenizer
from sim.engines import vllm_v1
from sim.engines.tgi_0_9_4 import Flags
from sim.model.scenario import Launch, Load, Scenario
from sim.model.workload import Workload
from sim.run import read_run

SERVER = Flags(max_input_length=500, max_total_tokens=700, max_batch_prefill_tokens=2000)
SERVED = Scenario(name="x", server=SERVER)
CHILD = """
import sys
from pathlib import Path
import msgspec
from measure.ladder.session import measure
from sim.engines.catalog import convert
from sim.model.scenario import Scenario
measure(msgspec.json.decode(sys.argv[1], type=Scenario, dec_hook=convert), None, Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def client() -> Iterator[docker.DockerClient]:
    try:
        found = connect()
    except CannotStart as e:
        pytest.skip(f"left out, it needs a docker engine: {e}")
    yield found
    found.close()


@pytest.fixture(scope="module")
def image(client: docker.DockerClient) -> Iterator[str]:
    name = build(client)
    yield name
    client.images.remove(name, force=True)


def scenario(image: str, **launch: object) -> Scenario:
    return Scenario(
        name="launched",
        server=SERVER,
        workload=Workload(prompt_tokens=100, output_tokens=10),
        load=Load(users=[2], spawn_rate=20.0, seconds=1.0),
        launch=Launch(**{"image": image, "model": "tiny", "num_shard": 4, "gpus": None, "port": free_port()} | launch),  # type: ignore[arg-type]
    )


def start(launch: Launch, out: Path) -> None:
    with (
        Path(os.devnull).open("w") as null,
        launched(launch, SERVED, out, Console(file=null)),
    ):
        pass


def ours(client: docker.DockerClient, image: str) -> list[str]:
    found = client.containers.list(all=True, ignore_removed=True, filters={"label": LABEL, "ancestor": image})
    return [str(c.name) for c in found]


def test_the_flags_are_the_scenarios_own() -> None:
    launch = Launch(
        model="llama", num_shard=4, port=8080, args={"quantize": "gptq", "trust_remote_code": True, "x": False}
    )
    s = Scenario(name="x", server=Flags(max_batch_prefill_tokens=14000, max_batch_total_tokens=36000), launch=launch)
    argv = command_line(launch, s, 8080)
    flags = dict(itertools.pairwise(argv))
    assert flags["--max-batch-prefill-tokens"] == "14000"
    assert flags["--max-batch-total-tokens"] == "36000"
    assert flags["--waiting-served-ratio"] == "1.2"
    assert flags["--num-shard"] == "4"
    assert flags["--quantize"] == "gptq"
    assert "--trust-remote-code" in argv and "--x" not in argv


def test_vllm_gets_the_flags_that_were_written_and_those_that_decide_who_waits() -> None:
    launch = Launch(model="llama", num_shard=2, args={"dtype": "half"})
    flags = vllm_v1.Flags(max_model_len=300, enable_prefix_caching=False, kv_cache_tokens=4000, version="0.25.1")
    argv = command_line(launch, Scenario(name="x", server=flags, launch=launch), 80)
    assert " ".join(argv) == (
        "--model llama --host 127.0.0.1 --port 80 --tensor-parallel-size 2 --max-model-len 300 --max-num-seqs 256 "
        "--max-num-batched-tokens 2048 --no-enable-prefix-caching --dtype half"
    )


def test_a_launched_server_is_measured_and_removed(
    client: docker.DockerClient, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hush-hush")
    s = scenario(image, env=["SECRET_TOKEN"], volumes={str(tmp_path): "/data"})
    with Path(os.devnull).open("w") as null:
        measure(s, None, tmp_path / "run", console=Console(file=null))
    run = read_run(tmp_path / "run")
    assert [r.status for r in run.rungs] == ["complete"]
    assert run.info is not None
    assert (run.info["max_input_length"], run.info["max_total_tokens"]) == (500, 700)  # what is simulated is what ran
    head = json.loads((tmp_path / "run" / "run.json").read_text())
    assert head["container"]["digest"].startswith("sha256:")
    assert head["container"]["argv"][:2] == ["--model-id", "tiny"]
    assert head["container"]["env"] == ["SECRET_TOKEN"]
    assert not any(b"hush-hush" in file.read_bytes() for file in (tmp_path / "run").iterdir())
    assert b"http://127.0.0.1:" in (tmp_path / "run" / "server.log").read_bytes()
    assert ours(client, image) == []


def test_so_is_one_of_vllm(client: docker.DockerClient, image: str, tmp_path: Path) -> None:
    s = scenario(image, args={"engine": "vllm-v1"}, num_shard=1)
    flags = vllm_v1.Flags(max_num_seqs=16, num_gpu_blocks=300, max_model_len=1024)
    s = msgspec.structs.replace(s, server=flags, written=["max_num_seqs", "num_gpu_blocks", "max_model_len"])
    with Path(os.devnull).open("w") as null:
        measure(s, None, tmp_path / "run", console=Console(file=null))
    run = read_run(tmp_path / "run")
    assert (str(run.engine), run.known, [r.status for r in run.rungs]) == ("vllm 0.32.0", True, ["complete"])
    assert (run.flags["max_num_seqs"].source, run.flags["num_gpu_blocks"].source) == ("launch", "server")
    assert not run.untold
    head = json.loads((tmp_path / "run" / "run.json").read_text())
    assert 0 < head["cold_start"]["healthy"] < head["cold_start"]["first_token"]
    assert "process" not in head and head["container"]["covered"] == []
    assert ours(client, image) == []


def test_the_end_token_is_covered_in_the_container_and_nowhere_else(
    client: docker.DockerClient, image: str, tmp_path: Path
) -> None:
    model = tmp_path / "llama"
    model.mkdir()
    (model / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}, "unk_token": "<unk>", "x": 1}')
    (model / "special_tokens_map.json").write_text("{}")
    launch = scenario(image, model="/data/llama", volumes={str(tmp_path): "/data"}).launch
    assert launch is not None
    mounts = patched_tokenizer(launch, tmp_path)
    assert list(mounts.values()) == ["/data/llama/tokenizer_config.json"]
    with (
        Path(os.devnull).open("w") as null,
        launched(launch, SERVED, tmp_path, Console(file=null), mounts) as running,
    ):
        (name,) = ours(client, image)
        program = "print(open('/data/llama/tokenizer_config.json').read())"
        python = str(Path(sys.executable).resolve())
        _, said = client.containers.get(name).exec_run([python, "-c", program])
        assert json.loads(said) == {"eos_token": "<unk>", "unk_token": "<unk>", "x": 1}
        assert running.described["covered"] == ["/data/llama/tokenizer_config.json"]
    assert "</s>" in (model / "tokenizer_config.json").read_text()
    assert (
        patched_tokenizer(Launch(model="meta-llama/Llama-2-70b-hf", volumes={str(tmp_path): "/data"}), tmp_path) == {}
    )


def test_a_server_that_will_not_start_shows_its_last_lines_and_is_removed(
    client: docker.DockerClient, image: str, tmp_path: Path
) -> None:
    launch = scenario(image, args={"fault": "nonsense=1"}).launch
    assert launch is not None
    with pytest.raises(CannotStart, match="expected one of reset"):
        start(launch, tmp_path)
    assert b"nonsense" in (tmp_path / "server.log").read_bytes()
    assert ours(client, image) == []


def test_what_is_missing_is_said(client: docker.DockerClient, image: str, tmp_path: Path) -> None:
    for launch, message in (
        (
            scenario("nobody/has-this:1").launch,
            r"no image nobody/has-this:1; pull it with: docker pull nobody/has-this:1",
        ),
        (scenario(image, env=["NOT_SET_ANYWHERE"]).launch, "NOT_SET_ANYWHERE is not set"),
    ):
        assert launch is not None
        with pytest.raises(CannotStart, match=message):
            start(launch, tmp_path)
    assert ours(client, image) == []


def test_kill_9_leaves_no_container(client: docker.DockerClient, image: str, tmp_path: Path) -> None:
    text = msgspec.json.encode(scenario(image)).decode()
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, text, str(tmp_path / "run")], stderr=subprocess.DEVNULL
    ) as child:
        deadline = time.monotonic() + 60
        while not ours(client, image):
            assert time.monotonic() < deadline, "no container was started"
            time.sleep(0.05)
        child.kill()
    deadline = time.monotonic() + 30
    while ours(client, image):
        assert time.monotonic() < deadline, "the container is still there"
        time.sleep(0.1)


def test_the_doctor_finds_engine_image_and_port(client: docker.DockerClient, image: str) -> None:
    found = {f.what: f for f in diagnose(scenario(image, env=["NOT_SET_ANYWHERE"]))}
    assert [found[what].ok for what in ("docker", "image", "disk", "port")] == [True] * 4
    assert (found["NOT_SET_ANYWHERE"].ok, found["NOT_SET_ANYWHERE"].fix) == (False, "export NOT_SET_ANYWHERE=...")
    missing = {f.what: f for f in diagnose(scenario("nobody/has-this:1", gpus="all"))}
    assert (missing["image"].ok, missing["image"].fix) == (False, "docker pull nobody/has-this:1")
    assert missing["GPUs"].ok is False or "needed" in missing["GPUs"].found


def test_a_container_that_goes_while_leftovers_are_looked_for_is_none(
    client: docker.DockerClient, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: ContainerCollection, name: str) -> None:
        raise docker.errors.NotFound(name)

    container = client.containers.create(image, labels={LABEL: "nobody"})
    try:
        with monkeypatch.context() as patched:
            patched.setattr(ContainerCollection, "get", gone)
            assert leftovers() == []
    finally:
        container.remove()


def test_what_a_crash_left_over_is_found(client: docker.DockerClient, image: str) -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    container = client.containers.create(image, labels={LABEL: str(gone.pid)})
    mine = client.containers.create(image, labels={LABEL: str(os.getpid())})
    try:
        found = leftovers()
        assert container.name in found
        assert mine.name not in found
    finally:
        container.remove()
        mine.remove()


def test_no_engine_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(CannotStart, match=r"no docker engine answers at unix:.* doctor"):
        connect()
