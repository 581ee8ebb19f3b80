"""A server in docker, started for one measurement and removed after it, however that ends.

The container uses the host's network, so that there is no address translation between client and server. It listens on
the loopback only.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import docker
import docker.errors
import docker.types
import requests

from measure.deadline import wait_for
from measure.server.endpoint import Endpoint
from measure.server.launch import (
    LOG_BYTES,
    LOG_LINES,
    START_SECONDS,
    CannotStart,
    Running,
    check_environment,
    command_line,
    logged_flags,
    wait_until_healthy,
)
from sim.model.scenario import Launch, Scenario
from sim.terminal.console import Console

LABEL = "servecast"
PORT = 80  # of the server, where the scenario names none: the images' own
REMOVED = b"removed"  # sent to the guard when the container has been removed


def connect() -> docker.DockerClient:
    """Connect to the docker engine of the environment (`DOCKER_HOST`); raises `CannotStart` if none answers."""
    host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    try:
        if host.startswith("unix://"):  # docker's library leaks the socket of a connection that fails
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(host.removeprefix("unix://"))
        client = docker.from_env(timeout=60)
        client.ping()
    except (docker.errors.DockerException, requests.RequestException, OSError) as e:
        raise CannotStart(f"no docker engine answers at {host} ({e}); `servecast doctor` says what is missing") from e
    return client


@contextmanager
def launched(
    launch: Launch,
    scenario: Scenario,
    out: Path,
    console: Console,
    mounts: Mapping[Path, str] | None = None,
    seconds: float = START_SECONDS,
) -> Iterator[Running]:
    """Start the server, wait until it is healthy, and remove it at the end. Its log is kept as `out/server.log`.

    `mounts` maps files on this machine to the files of the container that they replace (`tokenizer_patch`).
    """
    check_environment(launch)
    client = connect()
    name = f"servecast-{uuid.uuid4().hex[:12]}"
    port = launch.port or PORT
    argv = command_line(launch, scenario, port)
    guard = subprocess.Popen(
        [sys.executable, "-m", "measure.server.docker", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        began = time.perf_counter()
        container = _run(client, launch, name, argv, mounts or {})
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(container, Endpoint(url), console, seconds)
            image, log = container.image, container.logs()[:LOG_BYTES].decode("utf-8", "replace")
            described = {
                "image": launch.image,
                "digest": None if image is None else (image.attrs.get("RepoDigests") or [image.id])[0],
                "argv": argv,
                "logged": logged_flags(type(scenario.server), log),
                "env": launch.env,
                "volumes": launch.volumes,
                "covered": sorted((mounts or {}).values()),
                "shm_size": launch.shm_size,
                "gpus": launch.gpus,
            }
            yield Running(url, began, described)
        finally:
            with suppress(docker.errors.APIError, requests.RequestException):
                (out / "server.log").write_bytes(container.logs(timestamps=True))
    finally:
        remove(client, name)
        client.close()
        guard.communicate(REMOVED)


def _run(client: docker.DockerClient, launch: Launch, name: str, argv: list[str], mounts: Mapping[Path, str]) -> Any:
    gpus = []
    if launch.gpus is not None:
        wanted = launch.gpus.removeprefix("device=")
        every, some = wanted == "all", wanted.isdigit() and not launch.gpus.startswith("device=")
        gpus = [
            docker.types.DeviceRequest(
                count=-1 if every else int(wanted) if some else 0,
                device_ids=[] if every or some else wanted.split(","),
                capabilities=[["gpu"]],
            )
        ]
    hosts = {str(Path(host).expanduser().resolve()): inside for host, inside in launch.volumes.items()}
    try:
        # not `run`, which would silently pull gigabytes first
        container = client.containers.create(
            launch.image,
            argv,
            name=name,
            labels={LABEL: str(os.getpid())},
            network_mode="host",
            shm_size=launch.shm_size,
            volumes={host: {"bind": inside, "mode": "rw"} for host, inside in hosts.items()}
            | {str(file): {"bind": inside, "mode": "ro"} for file, inside in mounts.items()},
            device_requests=gpus,
            environment={variable: os.environ[variable] for variable in launch.env},
        )
        container.start()
        return container
    except docker.errors.ImageNotFound as e:
        raise CannotStart(f"no image {launch.image}; pull it with: docker pull {launch.image}") from e
    except docker.errors.APIError as e:
        raise CannotStart(f"docker did not start {launch.image}: {e.explanation or e}") from e


def _wait(container: Any, endpoint: Endpoint, console: Console, seconds: float) -> None:
    def ended() -> bool:
        container.reload()
        return container.status in ("exited", "dead")

    what = f"the started server to be healthy at {endpoint.url}"
    deadline = wait_for(lambda line: console.print(line, highlight=False, markup=False), seconds, what)
    wait_until_healthy(endpoint, deadline, ended, lambda: _tail(container, console))


def _tail(container: Any, console: Console) -> str:
    """Print the last lines of the log; returns the last one."""
    text: str = container.logs(tail=LOG_LINES).decode("utf-8", "replace").rstrip()
    console.print(text, highlight=False, soft_wrap=True)
    return text.rpartition("\n")[2] or "no output"


def image_present(client: docker.DockerClient, image: str) -> bool:
    """Whether the engine has an image."""
    try:
        client.images.get(image)
    except docker.errors.APIError:
        return False
    return True


def runtimes(client: docker.DockerClient) -> list[str]:
    """The names of the runtimes the engine knows."""
    return list(client.info().get("Runtimes") or {})


def remove(client: docker.DockerClient, name: str) -> None:
    """Remove a container, running or not, if it exists."""
    with suppress(docker.errors.NotFound):
        client.containers.get(name).remove(force=True, v=True)


def leftovers() -> list[str]:
    """Names of containers left by crashed measurements: the process that started them is gone."""
    found = []
    with closing(connect()) as client:
        for container in client.containers.list(all=True, ignore_removed=True, filters={"label": LABEL}):
            pid = container.labels.get(LABEL, "")
            if not (pid.isdigit() and Path(f"/proc/{pid}").exists()):
                found.append(str(container.name))
    return found


def guard(name: str) -> None:
    """Wait until stdin is closed, by the end of the measurement, then remove the container if it still exists."""
    if sys.stdin.buffer.read() == REMOVED:
        return
    client = connect()
    for _ in range(20):  # a kill may come while docker is still creating it
        remove(client, name)
        time.sleep(0.1)


if __name__ == "__main__":
    guard(sys.argv[1])
