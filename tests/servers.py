"""Servers to measure: one that plays a script over a socket, byte by byte, and the stand-in as a process of its own."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from sim.model.calibration import Calibration, Parameter, Source

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
Script = Callable[[socket.socket], None]
Command = Callable[..., tuple[int, str, str]]  # runs a command: exit status, stdout (unwrapped), stderr
INFO = {"model_id": "m", "version": "0.9.4", "max_input_length": 512, "max_total_tokens": 1024}
KEY = "sk-s3cret"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def tgi_event(text: str = " w", last: int | None = None) -> bytes:
    """An event as 0.9.4 writes it; `last` is the number of tokens of a final one."""
    details = "null" if last is None else f'{{"finish_reason":"length","generated_tokens":{last},"seed":null}}'
    token = f'{{"id":1,"text":"{text}","logprob":-0.1,"special":false}}'
    return f'data:{{"token":{token},"generated_text":null,"details":{details}}}\n\n'.encode()


def reset(connection: socket.socket) -> None:
    """Cut a connection with an RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(connection.detach())  # whatever else still refers to it


class Scripted:
    """Answers each request with the next of `scripts`, the last one for ever."""

    def __init__(self, *scripts: Script):
        self.scripts, self.requests, self.connections = list(scripts), 0, 0
        self.bodies: list[bytes] = []
        self.heads: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection, connection.makefile("rb") as stream:
            while line := stream.readline():
                head = line
                while line not in (b"", b"\r\n"):
                    line = stream.readline()
                    head += line
                fields = dict(field.lower().split(b": ", 1) for field in head.split(b"\r\n")[1:-2])
                self.heads.append(head)
                self.bodies.append(stream.read(int(fields.get(b"content-length", b"0"))))
                script = self.scripts[min(self.requests, len(self.scripts) - 1)]
                self.requests += 1
                script(connection)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # closing alone does not wake the thread in accept()
        self._listener.close()


def say(*parts: bytes | float) -> Script:
    """A script: bytes are sent as they are, numbers are pauses in s."""

    def play(connection: socket.socket) -> None:
        for part in parts:
            if isinstance(part, bytes):
                connection.sendall(part)
            else:
                time.sleep(part)

    return play


def quick_calibration(folder: Path) -> Path:
    """Step times of a few milliseconds: a rung needs no more than a second, and the stand-in polls a third of it."""
    values = {"a0": 0.004, "a1": 1e-6, "b0": 0.006, "b1": 1e-5, "max_batch_total_tokens": 20000.0}
    parameters = {name: Parameter(value=v, stderr=0.0, low=v, high=v) for name, v in values.items()}
    calibration = Calibration(source=Source(kind="assumed"), model="affine", parameters=parameters)
    path = folder / "calibration.json"
    path.write_bytes(msgspec.json.encode(calibration))
    return path


class Standin(subprocess.Popen[str]):
    """A running stand-in; `url` is where."""

    url: str


@contextmanager
def standin(*arguments: str, log: Path | None = None) -> Iterator[Standin]:
    """The stand-in on a free port, killed in the end."""
    more = [] if log is None else ["--log", str(log)]
    process = Standin(
        [sys.executable, "-m", "measure.standin.server", "--port", "0", *arguments, *more],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    try:
        process.url = process.stdout.readline().strip()
        assert process.url.startswith("http"), "the stand-in did not start"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def answer(body: object = b"", code: int = 200, **headers: str) -> Script:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"content-length": str(len(data))} | {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return say(f"HTTP/1.1 {code} X\r\n{head}\r\n".encode() + data)


class Routed(Scripted):
    """Answers each path with a script of its own, any other with 404."""

    def __init__(self, paths: dict[bytes, Script]):
        self.paths = paths
        super().__init__(self._play)

    def _play(self, connection: socket.socket) -> None:
        path = self.heads[-1].split(b" ")[1]
        self.paths.get(path, answer(b"", 404))(connection)


@contextmanager
def serving(scripts: dict[bytes, Script] | Script) -> Iterator[Scripted]:
    server = Routed(scripts) if isinstance(scripts, dict) else Scripted(scripts)
    try:
        yield server
    finally:
        server.close()


def drip(lead: bytes, byte: bytes, every: float = 0.1) -> Script:
    """A byte now and then, for 5 s at most."""

    def play(connection: socket.socket) -> None:
        connection.sendall(lead)
        for _ in range(int(5 / every)):
            time.sleep(every)
            connection.sendall(byte)

    return play


def flood(lead: bytes, block: bytes, most: int = 100 << 20) -> Script:
    """The same bytes again and again, as fast as they are taken."""

    def play(connection: socket.socket) -> None:
        connection.sendall(lead)
        for _ in range(most // len(block)):
            connection.sendall(block)

    return play


STREAM = HEAD + chunk(b'data: {"choices":[{"text":"x","finish_reason":"length"}]}\n\ndata: [DONE]\n\n') + END


def openai(prompt: int = 60, stream: Script | None = None, **model: object) -> dict[bytes, Script]:
    """An OpenAI-style server's paths; what it says about its model, and what it streams."""
    good = {"choices": [{"text": "x"}], "usage": {"prompt_tokens": prompt}}
    asked = [0]

    def completions(connection: socket.socket) -> None:
        asked[0] += 1  # before the warm-up: what it is, the tokens of a prompt, whether it streams
        first = [answer(good), answer(good), say(STREAM)]
        (answer(good) if stream is None else [*first, stream][min(asked[0], 4) - 1])(connection)

    return {b"/v1/models": answer({"data": [{"id": "m"} | model]}), b"/v1/completions": completions}
