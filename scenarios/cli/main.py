"""The entry point of `servecast`: exit statuses, and one line for every error that the user can fix.

0 good; 1 a check failed; 2 the user can fix it (one line says how); 70 a bug of ours, with its traceback; 130 or 143
interrupted or terminated. A closed pipe is silent. Everything but the signal handlers is imported after they stand.
"""

from __future__ import annotations

import sys

from scenarios.cli import signals

TYPE_CHECKING = False  # `typing` takes some 10 ms to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

FAILED, MISUSED, BUG = 1, 2, 70


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    signals.end_at_once()
    from scenarios.cli.commands import import_commands
    from scenarios.cli.streams import open_streams

    open_streams()
    import_commands()
    signals.end_cleanly()
    found = status(arguments)
    sys.exit(signals.exit_status() or found)


def status(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the status to exit with."""
    import logging
    import traceback

    import click

    from scenarios.cli.commands import import_commands, servecast
    from scenarios.cli.refusals import refused
    from scenarios.cli.streams import discard_stdout
    from sim.model.errors import UserError
    from sim.model.text import escaped, printable

    def complain(line: str) -> int:
        print(f"servecast: {printable(' '.join(line.split()))}", file=sys.stderr)  # noqa: T201
        return MISUSED

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home directory that cannot be written
    import_commands()
    try:
        try:
            found = servecast.main(args=arguments, prog_name="servecast", standalone_mode=False)
            sys.stdout.flush()
        except BrokenPipeError:
            discard_stdout()
            return 0
        except OSError as e:
            return complain(refused(e))
    except click.UsageError as e:
        name = e.ctx.command_path if e.ctx else "servecast"
        return complain(f"{e.format_message()} (`{name} --help` has an example)")
    except click.ClickException as e:
        return complain(e.format_message())
    except UserError as e:
        return complain(str(e))
    except MemoryError:
        return complain("out of memory; ask for less at a time (fewer loads, shorter windows, fewer --jobs)")
    except (KeyboardInterrupt, click.Abort):
        return signals.INTERRUPTED
    except Exception:
        if signals.exit_status():  # an import that was interrupted fails in its own ways
            return signals.exit_status()
        print(escaped(traceback.format_exc()), file=sys.stderr, end="")  # noqa: T201
        print("servecast: this is a bug of ours; please report it with the lines above", file=sys.stderr)  # noqa: T201
        return BUG
    return found if isinstance(found, int) else 0
