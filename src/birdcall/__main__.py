"""``birdcall`` and ``python -m birdcall``: one command for each step of the pipeline."""

from __future__ import annotations

import errno
import io
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from birdcall.cli import benchmarks, data, evaluation, kaggle, training

# A command imports what it needs when it runs, so that `--help` answers at once.

app = typer.Typer(
    help="Identify the birds in every 5 seconds of a soundscape. Commands in pipeline order.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data.commands)
app.add_typer(training.commands)
app.add_typer(evaluation.commands)
app.add_typer(kaggle.commands)
app.add_typer(benchmarks.benchmarks, name="benchmark")


@app.callback()
def _configure(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the Python traceback of an error.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show only warnings and results.")] = False,
) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path need not be text that can be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.addFilter(_is_for_users)
    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", handlers=[handler])


def _is_for_users(record: logging.LogRecord) -> bool:
    """Leave out what libraries tell: matplotlib of its axes, onnxscript of each optimised node."""
    return record.levelno >= logging.WARNING or record.name.startswith("birdcall")


# What to do about errors of the system: their own text tells only what is wrong.
_ADVICE = {
    errno.EEXIST: "a file is where a folder must be; give another",
    errno.ENOTDIR: "a file is where a folder must be; give another",
    errno.EISDIR: "give the name of a file",
    errno.ENOSPC: "free some space, then run the command again",
    errno.EDQUOT: "free some space, then run the command again",
    errno.EACCES: "give another, or ask for the right to use it",
    errno.EPERM: "give another, or ask for the right to use it",
    errno.EROFS: "give a folder that can be written to",
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command. An error that the user can correct is one line on stderr and exit code 2.

    So is a stop by a signal, with 128 and its number. Without ``arguments`` they are those of the
    process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    with _stop_at_signals() as stopped_by:
        try:
            app(arguments, prog_name="birdcall")
        except (ValueError, OSError, MemoryError) as error:
            if "--traceback" in arguments:
                raise
            typer.echo(f"birdcall: {' '.join(_describe(error).split())}", err=True)
            sys.exit(2)
        except (SystemExit, KeyboardInterrupt) as ended:  # typer turns the latter into the former
            is_done = isinstance(ended, SystemExit) and not ended.code
            if is_done or not stopped_by:  # a library may have swallowed the interruption
                raise
            typer.echo(
                f"birdcall: stopped by {stopped_by[0].name}; no file is half written, and the same "
                "command goes on from what is finished",
                err=True,
            )
            sys.exit(128 + stopped_by[0])


def _describe(error: Exception) -> str:
    """Return what is wrong, where, and what to do; the system's own errors do not tell the last."""
    if isinstance(error, MemoryError):
        return f"not enough memory: {error or 'close other programs, or use smaller values'}"
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return str(error)
    path = error.filename2 or error.filename  # the former where one was to be renamed to it
    advice = _ADVICE.get(error.errno, "")
    return f"{path}: {error.strerror}" + (advice and f"; {advice}")


@contextmanager
def _stop_at_signals() -> Iterator[list[signal.Signals]]:
    """Let Ctrl-C and SIGTERM end a command, its processes and temporary files; yield which did."""
    stopped_by: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped_by  # only the main thread receives signals
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        stopped_by.append(signal.Signals(number))
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stopped_by
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
