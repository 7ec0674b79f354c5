"""``birdcall`` and ``python -m birdcall``: one command for each step of the pipeline."""

from __future__ import annotations

import io
import logging
import sys
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


def main(arguments: list[str] | None = None) -> None:
    """Run a command. An error that the user can correct is one line on stderr and exit code 2.

    Without ``arguments`` they are those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(arguments, prog_name="birdcall")
    except (ValueError, OSError) as error:
        if "--traceback" in arguments:
            raise
        typer.echo(f"birdcall: {' '.join(str(error).split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
