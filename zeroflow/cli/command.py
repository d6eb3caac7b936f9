"""The base of all commands: help with examples and exit statuses, errors as one message, closed pipes."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click
from click.shell_completion import CompletionItem

from zeroflow.cli.completion import folders, values_of_keys
from zeroflow.errors import ConfigError, is_text, unknown

BAD_INPUT = 2
INTERRUPTED = 130
"""Ctrl-C; as shells count a process that SIGINT ended."""

PIPE_CLOSED = 141
"""The reader of the output went away (``| head``); as shells count a process that SIGPIPE ended."""

STATUSES = {0: "done", BAD_INPUT: "bad input: the message says what was expected, and nothing was run"}

_PACKAGE = Path(__file__).parent.parent

F = TypeVar("F", bound=Callable[..., Any])


class Command(click.Command):
    """A command whose help ends with examples and exit statuses, and that reports user errors without a traceback.

    Args:
        examples: command lines, each with a short explanation.
        statuses: exit statuses beyond ``STATUSES``.
    """

    def __init__(
        self,
        *args: Any,
        examples: Sequence[tuple[str, str]] = (),
        statuses: Mapping[int, str] | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("context_settings", {"help_option_names": ["-h", "--help"], "show_default": True})
        super().__init__(*args, **kwargs)
        self.examples, self.statuses = examples, dict(sorted({**STATUSES, **(statuses or {})}.items()))

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        for word in args:
            if not is_text(word):
                raise click.UsageError(f"{os.fsencode(word)!r}: not UTF-8; expected names and paths that are")
        # None leaves it to click, which colours on a terminal alone.
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        return super().make_context(info_name, args, parent, **{"color": False if plain else None, **extra})

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _warnings_in_a_line():
                return super().invoke(ctx)
        except ConfigError as error:
            raise click.UsageError(str(error)) from None
        except KeyboardInterrupt:
            with suppress(OSError):
                click.echo("\ninterrupted", err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            # Nor may the interpreter complain when it flushes what nobody reads.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(PIPE_CLOSED)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section(click.style("Examples", bold=True)):
            for line, words in self.examples:
                formatter.write_text(f"# {words}")
                # As it is: a wrapped line could not be copied.
                formatter.write(f"{'':>{formatter.current_indent}}{click.style(line, fg='cyan')}\n")
        with formatter.section(click.style("Exit status", bold=True)):
            formatter.write_dl([(str(status), meaning) for status, meaning in self.statuses.items()])


class Commands(Command, click.Group):
    """The same for a group of commands, listed in the order of their use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class Choice(click.Choice[str]):
    """A parameter with a few choices; the error for a wrong one names the nearest."""

    def __init__(self, kind: str, words: Sequence[str]) -> None:
        super().__init__(words)
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{unknown(self.kind, value, self.choices)} (one of {', '.join(self.choices)})", param, ctx)


class Folder(click.ParamType[str]):
    """A store: a folder or a URI."""

    name = "dir_or_uri"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
        return folders(incomplete)


def set_option(help: str) -> Callable[[F], F]:
    """``--set KEY=VALUE``, as often as wanted."""
    return click.option(
        "--set", "settings", multiple=True, metavar="KEY=VALUE", help=help, shell_complete=values_of_keys
    )


def _import(context: click.Context, parameter: click.Parameter, files: tuple[str, ...]) -> None:
    from zeroflow.imports import import_file

    for file in files:
        try:
            import_file(file)
        except ConfigError as error:
            raise click.UsageError(str(error), context) from None


import_option = click.option(
    "--import", "imports", multiple=True, metavar="FILE", is_eager=True, expose_value=False, callback=_import,
    type=click.Path(dir_okay=False),
    help="A Python file that registers methods, optimizers and the like, run here and in every process. May be repeated.",
)  # fmt: skip
data_dir_option = click.option(
    "--data-dir", envvar="ZEROFLOW_DATA", default=None, type=click.Path(file_okay=False),
    help="Folder of the data sets that are not embedded. [env: ZEROFLOW_DATA]",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="JSON on standard output, and nothing else there.")
device_option = click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
threads_option = click.option("--threads", default=1, type=click.IntRange(min=1), help="CPU threads.")
price_option = click.option(
    "--price-per-hour", type=click.FloatRange(min=0), metavar="PRICE",
    help="Of one GPU, or of one CPU where cells use no GPU: adds what the missing cells cost.",
)  # fmt: skip


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """zeroflow's own warnings without their place in the code; those of others as they come."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if category is UserWarning and Path(filename).is_relative_to(_PACKAGE):
                click.echo(f"{click.style('warning:', fg='yellow')} {message}", err=True)
            else:
                shown(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def failed(text: str) -> str:
    """Print a line on what failed, in red."""
    return click.style(text, fg="red")


def check_writable(file: Path, where: str) -> None:
    """Refuse, before the work, a file that is not writable.

    Args:
        file: its path; its folder is created.
        where: the option that names it.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise ConfigError(f"{where} {file}: cannot be written: {error.strerror}") from None
