"""The command ``peft-jactus``: what the package does, without writing Python.

A subpackage, with one module for each command. A command checks its options, calls a function, and prints. Modules
here have no ``from __future__ import annotations``: typer reads the annotations of a command's parameters.
"""

import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from peft_jactus._version import __version__
from peft_jactus.cli.compress import compress
from peft_jactus.cli.export import export
from peft_jactus.cli.inspect import inspect
from peft_jactus.cli.bench import bench

__all__ = ["app"]

# Raised for wrong arguments, missing files, models that cannot be compressed; by this package, PEFT and transformers.
_EXPECTED = (ValueError, TypeError, RuntimeError, OSError, ImportError)


class _Group(TyperGroup):
    """Shows an expected error as its message."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5 by an old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            try:
                return super().invoke(ctx)
            except (typer.Exit, typer.Abort, BrokenPipeError):  # for typer itself
                raise
            except _EXPECTED as error:
                if ctx.params["traceback"]:
                    raise
                typer.secho(f"Error: {error}", fg="red", err=True)
                raise typer.Exit(1) from error


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peft-jactus {__version__}")
        raise typer.Exit


@app.callback()
def main(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Compress transformers, and look at the result."""
    del traceback, version  # read by the group and by the callback


for command in (inspect, export, compress, bench):
    app.command()(command)
