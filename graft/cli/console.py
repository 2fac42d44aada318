"""How every verb speaks: results on stdout, all else on stderr, exit codes by kind of error."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import typer

from graft.core.errors import GateRefusedError, GraftError

if TYPE_CHECKING:
    from rich.console import Console

    from graft.core.model import StrictModel

P = ParamSpec("P")
R = TypeVar("R", bound="StrictModel")

INTERRUPTED = 130


def make_console(*, stderr: bool = False) -> Console:
    """Makes a console that takes text literally (no markup) and honours `NO_COLOR` and pipes."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else 120
    return Console(file=stream, markup=False, highlight=False, width=width)


def verb(
    show: Callable[[R, Console], None],
    *,
    refusal: Callable[[R], str | GraftError | None] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, None]]:
    """Makes a function that returns a record into a command.

    The record is shown by `show`, or printed as JSON where the command has `as_json: AsJson` and
    it is set; then nothing else reaches stdout, neither from Python nor from native code. A command
    that prints JSON by itself takes `prints_json: AsJson`. A GraftError becomes one readable
    message, or JSON where either is set, and its class's exit code.

    Args:
        show: Prints the record for people.
        refusal: Says why the record means "no", or None where it means "yes". Words are a gate's
            (exit code 3); an error brings its own exit code.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, None]:
        @functools.wraps(function)
        def command(*args: P.args, **kwargs: P.kwargs) -> None:
            as_json = bool(kwargs.get("as_json", False))
            tells_json = as_json or bool(kwargs.get("prints_json", False))
            try:
                with _stdout_kept_clean() if as_json else contextlib.nullcontext():
                    record = function(*args, **kwargs)
                if as_json:
                    typer.echo(record.model_dump_json())
                else:
                    show(record, make_console())
                if refusal is not None and (reason := refusal(record)):
                    error = GateRefusedError(reason) if isinstance(reason, str) else reason
                    _fail(error, as_json=False)
            except KeyboardInterrupt:
                _say("interrupted; the same command goes on where this one stopped", as_json=False)
                raise typer.Exit(INTERRUPTED) from None
            except (typer.Exit, typer.Abort, BrokenPipeError):
                raise
            except Exception as error:
                _fail(error, as_json=tells_json)

        _resolve_parameters(function, command)
        return command

    return decorate


def _resolve_parameters(function: Callable[..., Any], command: Callable[..., Any]) -> None:
    """Gives Typer the parameters only: a return type may be known to type checkers alone."""
    signature = inspect.signature(function)
    scope: dict[str, Any] = getattr(function, "__globals__", {})
    parameters = [
        parameter.replace(annotation=eval(parameter.annotation, scope))
        if isinstance(parameter.annotation, str)
        else parameter
        for parameter in signature.parameters.values()
    ]
    del command.__wrapped__  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]


def _fail(error: Exception, *, as_json: bool) -> None:
    """Reports an error and leaves with its exit code."""
    cause = getattr(error, "cause", None)
    known = (
        cause if isinstance(cause, GraftError) else error
    )  # a remote task's error carries its cause
    if isinstance(known, GraftError):
        message, code = str(known), known.exit_code
    else:
        message, code = f"{type(error).__name__}: {error}", 1
        sys.stderr.write("".join(traceback.format_exception(error)))
    if as_json:
        content = {"type": type(known).__name__, "message": message, "exit_code": code}
        typer.echo(json.dumps({"error": content}, ensure_ascii=False))
    titles = {GateRefusedError.exit_code: "refused", INTERRUPTED: ""}
    _say(message, as_json=as_json, title=titles.get(code, "error"))
    raise typer.Exit(code)


def _say(message: str, *, as_json: bool, title: str = "") -> None:
    """Writes a message to stderr, its title in red on a terminal."""
    if as_json:
        return
    from rich.text import Text

    text = Text.assemble((f"{title}: ", "bold red") if title else "", message)
    make_console(stderr=True).print(text, soft_wrap=True)


@contextlib.contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """Sends stdout to stderr, the file descriptor too: logs of workers come that way."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
