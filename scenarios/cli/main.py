"""The command line: one command per question. Results on stdout, commentary on stderr, an exit status for each outcome.

0 good; 1 a check failed; 2 the user can mend it (one line says how); 70 a bug of ours, with its traceback; 130 or 143
interrupted or terminated. A closed pipe is silent. What a command needs is imported when it runs: `--help` is instant.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from io import BufferedWriter, FileIO, TextIOWrapper
from pathlib import Path
from socket import gaierror
from threading import Timer
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import click

from sim.model.errors import UserError
from sim.model.text import ENCODING_ERRORS, escaped, printable

if TYPE_CHECKING:
    from typing_extensions import Buffer

FAILED, MISUSED, BUG, INTERRUPTED, TERMINATED = 1, 2, 70, 130, 143
GRACE = 60.0  # s: the longest that tidying up after a signal may take; stopping a container takes ten
_stopped = 0  # what a signal said to exit with
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # about a file of ours it names that file
# what the system refuses that is neither a file's fault nor ours, and what to do about it
OUTSIDE = {
    **dict.fromkeys((errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES, errno.EPERM), ""),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "; allow more of them with `ulimit -n`"),
    **dict.fromkeys((errno.EAGAIN, errno.ENOMEM), "; ask for fewer processes (--jobs, --processes)"),
}

GUIDE = """\
Forecasts what an LLM server will do under load - latency, requests per second,
cost - from measurements of it.

\b
Most people need three commands:
  servecast simulate llama2-70b-1500-100       forecast a server, with bands
  servecast measure my.yaml --url URL -o run   climb a live server's ladder
  servecast calibrate run -o calibration.json  fit the model to that run

A SCENARIO is a file or the name of a shipped one (`servecast scenarios`). `servecast COMMAND --help` has an example.
"""


class Commands(click.Group):
    """The commands, in the order in which people need them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they were added."""
        return list(self.commands)


@click.group(
    cls=Commands,
    help=GUIDE,
    invoke_without_command=True,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="servecast")
@click.pass_context
def servecast(ctx: click.Context) -> None:
    """See `GUIDE`."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def command(example: str, name: str | None = None) -> Callable[[Callable[..., Any]], click.Command]:
    """A command whose help ends with an example; `name` where Python would not have it as a function's."""

    def add(function: Callable[..., Any]) -> click.Command:
        made = servecast.command(name, epilog=f"\b\nExample:\n  {example}")(function)
        assert isinstance(made, click.Command)
        return made

    return add


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    _open_streams()
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a script put us in its background
        signal.signal(signal.SIGINT, _interrupt)
    found = status(arguments)
    sys.exit(_stopped or found)  # a signal may have struck where its exception was lost, in a destructor or a callback


def status(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; what to exit with."""
    # a home that cannot be written is no trouble of those who read a report
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        for module in ("ask", "live", "learn", "judge"):  # each adds its commands to the group
            import_module(f"scenarios.cli.{module}")
        try:
            found = servecast.main(args=arguments, prog_name="servecast", standalone_mode=False)
            sys.stdout.flush()
        except BrokenPipeError:
            _discard_stdout()
            return 0
        except OSError as e:
            return _complain(_refused(e))
    except click.UsageError as e:
        name = e.ctx.command_path if e.ctx else "servecast"
        return _complain(f"{e.format_message()} (`{name} --help` has an example)")
    except click.ClickException as e:
        return _complain(e.format_message())
    except UserError as e:
        return _complain(str(e))
    except MemoryError:
        return _complain("out of memory; ask for less at a time (fewer loads, shorter windows, fewer --jobs)")
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except Exception:
        print(escaped(traceback.format_exc()), file=sys.stderr, end="")  # noqa: T201
        print("servecast: this is a bug of ours; please report it with the lines above", file=sys.stderr)  # noqa: T201
        return BUG
    return found if isinstance(found, int) else 0


class _Unread(FileIO):
    """A pipe that may lose its reader, such as `head`: nobody is told any more, but the files asked for are written."""

    def write(self, data: Buffer) -> int:
        """See `io.FileIO`."""
        try:
            return super().write(data)
        except BrokenPipeError:
            nobody = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nobody, self.fileno())
            os.close(nobody)
            return super().write(data)


def _open_streams() -> None:
    """Standard streams that take any text, and are there: else the next file opened would be in their place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by whoever started us: there is nobody to tell
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 - for as long as we live
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=ENCODING_ERRORS)
    sys.stdout, sys.stderr = _may_go(sys.stdout), _may_go(sys.stderr)


def _may_go(stream: TextIO) -> TextIO:
    """A stream whose reader may go away in the middle."""
    if not isinstance(stream, TextIOWrapper) or not (
        stat.S_ISFIFO(mode := os.fstat(stream.fileno()).st_mode) or stat.S_ISSOCK(mode)
    ):
        return stream
    stream.flush()
    return TextIOWrapper(
        BufferedWriter(_Unread(stream.fileno(), "wb", closefd=False)),
        encoding=stream.encoding,
        errors=ENCODING_ERRORS,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _refused(e: OSError) -> str:
    """What the system refused, in words; raises the error again if that is our own fault."""
    if e.filename is not None:
        return f"{os.fsdecode(e.filename) if isinstance(e.filename, bytes) else e.filename}: {e.strerror}"
    try:
        Path.cwd()
    except FileNotFoundError:
        return "the working directory is gone; change to one that exists"
    if "temporary directory" in str(e):  # Python's own words, and those of matplotlib, which keeps its fonts there
        return "no folder for temporary files can be written; set TMPDIR to one that can"
    if e.errno in FULL:
        _discard_stdout()
        return f"standard output: {e.strerror}"
    if not isinstance(e, gaierror) and e.errno not in OUTSIDE:
        raise e
    return f"{e.strerror}{OUTSIDE.get(e.errno or 0, '')}"


def _discard_stdout() -> None:
    """Nothing more can be written to stdout: Python must not try, and complain, at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(line: str) -> int:
    print(f"servecast: {printable(' '.join(line.split()))}", file=sys.stderr)  # noqa: T201
    return MISUSED


def _interrupt(number: int, frame: FrameType | None) -> None:
    _stop(INTERRUPTED)
    raise KeyboardInterrupt


def _terminate(number: int, frame: FrameType | None) -> None:
    _stop(TERMINATED)
    raise SystemExit(TERMINATED)


def _deaf(number: int, frame: FrameType | None) -> None:
    pass


def _stop(exit_status: int) -> None:
    """Remember what to exit with, and do so in the end even if the tidying up never ends."""
    global _stopped
    for each in (signal.SIGINT, signal.SIGTERM):
        # once is enough: a second one would stop the tidying up half-way. (Not SIG_IGN: Python then complains about a
        # signal that has struck and was not yet heard of.)
        signal.signal(each, _deaf)
    _stopped = exit_status
    last = Timer(GRACE, os._exit, [exit_status])
    last.daemon = True
    last.start()
