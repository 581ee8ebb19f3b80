"""Servers to measure: one that plays a script over a socket, byte by byte, and the stand-in as a process of its own."""

from __future__ import annotations

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
