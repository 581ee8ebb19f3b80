"""Checks this machine and a server for what a measurement needs, with the command that fixes what is missing."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from measure.apis.http_error import shown_url
from measure.deadline import Say, run_within, wait_for
from measure.server.detection import PROBE_SECONDS, Server, detect
from measure.server.docker import PORT, connect, image_present, leftovers, runtimes
from measure.server.endpoint import ANSWER_SECONDS, Endpoint
from measure.server.launch import CannotStart
from measure.server.limits import check_limits
from measure.server.provenance import check_forecastable, flags_of, recognised
from sim.engines import catalog
from sim.model.errors import UserError
from sim.model.files.lengths import read_lengths
from sim.model.flags import DEFAULT, WORDS, plain_flag, untold
from sim.model.identity import is_engine, named
from sim.model.scenario import Launch, Scenario

IMAGE_GB = 12.0  # TGI 0.9.4's image unpacked, before any weights
DOCKER_SECONDS = 60.0
FILES_PER_USER, SPARE_FILES = 2, 100


class Finding(NamedTuple):
    """One check: whether it is `ok` (None: not needed here), what was found, and the command that fixes it."""

    what: str
    ok: bool | None
    found: str
    fix: str = ""


def diagnose(
    scenario: Scenario | None = None,
    url: str | None = None,
    say: Say = lambda line: None,
    timeout: float = PROBE_SECONDS,
) -> list[Finding]:
    """Check this machine and, if given, a server against a scenario.

    `say` is told what is awaited; docker and the server get `timeout` s each.
    """
    launch = None if scenario is None else scenario.launch
    command = None if launch is None or not launch.command else launch.command[0]
    needed = url is None and launch is not None and command is None
    engine = catalog.DEFAULT if scenario is None else scenario.server.engine
    usual = Launch(model="", image=catalog.declared(engine).image)
    found = [_library("locust"), _library("geventhttpclient"), _cores(), _files(scenario)]
    if command is not None:
        program = shutil.which(command)
        found.append(Finding("command", program is not None, program or f"no program {command}", "see launch.command"))
    host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    seconds = min(timeout, DOCKER_SECONDS)
    wait_for(say, seconds, f"docker at {shown_url(host)}")
    try:
        found += run_within(seconds, lambda: list(_docker(usual if launch is None or command else launch, needed)))
    except TimeoutError:
        missing = False if needed else None
        found.append(Finding("docker", missing, f"does not answer within {seconds:g} s", _start_docker()))
    if url is not None:
        found += _server(url, scenario, say, timeout)
    return found


def _library(name: str) -> Finding:
    try:
        return Finding(name, True, version(name))
    except PackageNotFoundError:
        return Finding(name, False, "not installed", f"pip install {name}")


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0))
    return Finding("cores", cores > 1, f"{cores}; the load generator needs one of its own")


def _files(scenario: Scenario | None) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    users = max((scenario.load.users if scenario is not None else None) or [128])
    wanted = FILES_PER_USER * users + SPARE_FILES
    return Finding("open files", soft >= wanted, f"{soft} allowed, {wanted} needed", f"ulimit -n {wanted}")


def _docker(launch: Launch, needed: bool) -> Iterator[Finding]:
    try:
        client = connect()
    except CannotStart as e:
        yield Finding("docker", False if needed else None, str(e).partition(";")[0], _start_docker())
        return
    with closing(client):
        about: dict[str, Any] = client.info()
        yield Finding("docker", True, f"{about.get('ServerVersion')} ({about.get('OperatingSystem')})")
        present = image_present(client, launch.image)
        yield Finding(
            "image",
            present or (None if not needed else False),
            f"{launch.image} is {'present' if present else 'missing'}",
            f"docker pull {launch.image}",
        )
        yield _disk(Path(about.get("DockerRootDir") or "/"), 0.0 if present else IMAGE_GB, needed)
        if launch.gpus is not None:
            yield from _gpus(launch, needed, "nvidia" in runtimes(client))
    yield _port(launch.port or PORT, needed)
    for name in launch.env:
        yield Finding(name, name in os.environ, "set" if name in os.environ else "not set", f"export {name}=...")
    names = leftovers()
    yield Finding(
        "leftovers",
        not names,
        ", ".join(names) if names else "no containers of crashed measurements",
        f"docker rm --force {' '.join(names)}",
    )


def _start_docker() -> str:
    if shutil.which("dockerd") is None:
        return "apt-get install docker.io"
    socket_file = Path("/var/run/docker.sock")
    if socket_file.exists() and not os.access(socket_file, os.W_OK):
        return "sudo usermod -aG docker $USER, then log in again"
    return "systemctl start docker"


def _disk(root: Path, wanted: float, needed: bool) -> Finding:
    while not root.exists():
        root = root.parent
    free = shutil.disk_usage(root).free / 1e9
    ok = free >= wanted or (None if not needed else False)
    return Finding("disk", ok, f"{free:.0f} GB free at {root}, {wanted:.0f} GB needed", "docker system prune")


def _gpus(launch: Launch, needed: bool, runtime: bool) -> Iterator[Finding]:
    missing = False if needed else None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        yield Finding("GPUs", missing, "nvidia-smi does not answer: no driver", "apt-get install nvidia-driver")
        return
    boards = [line.strip() for line in output.splitlines() if line.strip()]
    wanted = launch.num_shard or 1
    enough = len(boards) >= wanted or missing
    yield Finding("GPUs", enough, f"{len(boards)} ({boards[0] if boards else 'none'}), {wanted} needed")
    yield Finding(
        "container toolkit",
        runtime or missing,
        "docker knows the nvidia runtime" if runtime else "docker does not know the nvidia runtime",
        "apt-get install nvidia-container-toolkit && nvidia-ctk runtime configure && systemctl restart docker",
    )


def _port(port: int, needed: bool) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as e:
            return Finding("port", False if needed else None, f"{port}: {e.strerror}", "change launch.port")
    return Finding("port", True, f"{port} is free")


def _server(url: str, scenario: Scenario | None, say: Say, timeout: float) -> Iterator[Finding]:
    try:
        endpoint = Endpoint(url, min(timeout, ANSWER_SECONDS))
        server = detect(endpoint, deadline=wait_for(say, timeout, f"{endpoint.url} to say what it is"))
    except UserError as e:
        yield Finding("server", False, str(e), "start it, or correct --url")
        return
    info = server.info or {}
    if server.api == "tgi":
        name = f"TGI {info.get('version')}"
    else:
        name = f"OpenAI style ({server.api})" if server.engine is None else f"{server.engine} ({server.api})"
    yield Finding("server", True, f"{name}, {server.model}")
    if scenario is None:
        for warning in server.warnings:
            yield Finding("server", None, str(warning))
        return
    scenario = recognised(scenario, server)
    yield _engine(server, scenario)
    try:
        warnings = check_limits(server, scenario, read_lengths(scenario.workload))
    except UserError as e:
        yield Finding("workload", False, str(e))
        return
    yield Finding("workload", True, "the server can serve it")
    for warning in warnings:
        yield Finding("flags", None, str(warning))
    try:
        check_forecastable(server, scenario)
    except UserError as e:
        yield Finding("forecast", None, str(e))
    if is_engine(server.engine, scenario.server.declared):
        yield from _flags(server, scenario)


def _engine(server: Server, scenario: Scenario) -> Finding:
    """Whether the server is of the scenario's engine."""
    asked, found = scenario.server.engine, named(server.engine)
    if is_engine(server.engine, scenario.server.declared):
        return Finding("engine", True, f"{found}, as the scenario says")
    if catalog.kind_of(server.engine) is not None:
        return Finding("engine", None, f"{found}, not {asked} as the scenario says")
    return Finding("engine", None, f"{found}: a forecast as {asked} of a run of it needs --as {asked}")


def _flags(server: Server, scenario: Scenario) -> Iterator[Finding]:
    """Every flag with its value and its source."""
    found = flags_of(server, scenario)
    warned = {said.text.partition(" ")[0]: str(said) for said in untold(found, scenario.server.declared)}
    for name, flag in found.items():
        source = "default" if flag.source == DEFAULT else WORDS[flag.source]
        yield Finding("flag", None, warned.get(name, f"{name} {plain_flag(flag)}: {source}"))
