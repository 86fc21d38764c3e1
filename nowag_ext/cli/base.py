"""What all commands share: the application, its two consoles, and how errors are told."""

from __future__ import annotations

import functools
import logging
import shlex
import signal
import warnings
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, TypeVar

import transformers
import typer
import typer.core
from rich.console import Console

from nowag_ext.cli import options
from nowag_ext.cli.sentences import one_sentence
from nowag_ext.gemm import gemm_dtype
from nowag_ext.pipeline.ranks import launched, launcher, one_voice, spoken_for
from nowag_ext.render import dtype_name
from nowag_ext.startup import raise_again
from nowag_ext.version import __version__


class _Commands(typer.core.TyperGroup):
    """Remembers the command line, to say how to go on after an interruption; says things once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        name = launcher() if launched() > 1 else (ctx.info_name or "nowag-ext").split()
        shown["command"] = shlex.join([*name, *args])
        return super().parse_args(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with one_voice():
            return super().main(*args, **kwargs)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compresses the linear layers of causal language models by NoWag, and runs the result.",
)
# Names of files, layers and models are printed as they are, brackets and all.
out = Console(highlight=False, markup=False)
err = Console(stderr=True, highlight=False, markup=False)
shown: dict[str, Any] = {"traceback": False, "command": ""}

Command = TypeVar("Command", bound=Callable[..., Any])


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"nowag-ext {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    traceback: options.Traceback = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    shown["traceback"] = traceback


def reported(command: Command) -> Command:
    """Errors become one sentence and exit status 1; an interrupt 130, being terminated 143."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = signal.signal(signal.SIGTERM, _on_terminate)
        try:
            raise_again()
            _quiet_libraries()
            if launched() > 1 and command.__name__ != "compress":
                raise ValueError("torchrun is for compress alone: start this without it.")
            return command(*args, **kwargs)
        except (KeyboardInterrupt, Terminated) as stop:
            terminated = isinstance(stop, Terminated)
            why = "Terminated" if terminated else "Interrupted"
            if terminated and launched() > 1:
                why += " by torchrun: it was ended itself, or another process has ended"
            _say(f"{why}.{_how_to_go_on(stop)}")
            raise typer.Exit(143 if terminated else 130) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if shown["traceback"]:
                raise
            _say(f"Error: {one_sentence(error)}{_how_to_go_on(error)}")
            raise typer.Exit(1) from None
        finally:
            signal.signal(signal.SIGTERM, before)

    return run  # type: ignore[return-value]


class Terminated(BaseException):
    """SIGTERM: unwinds as an interrupt does, so that what is half-written goes."""


def _on_terminate(_number: int, _frame: Any) -> NoReturn:
    raise Terminated


def _say(sentence: str) -> None:
    if not spoken_for():
        err.print(sentence, soft_wrap=True)


def _how_to_go_on(stop: BaseException) -> str:
    directory = getattr(stop, "kept", None)
    if directory is None:
        return ""
    return f" What is finished is kept in {directory}; go on with: {shown['command']}"


def _quiet_libraries() -> None:
    """No progress bars and no advice from libraries between ours."""
    warnings.filterwarnings("ignore", module=r"(torch|transformers|huggingface_hub)(\..*)?")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # that layers are on disk: as intended


def advise_dtype(model: Any, command: str) -> None:
    """Says how to save time where many tokens are slow in the model's dtype."""
    if gemm_dtype(model.dtype, model.device) != model.dtype:
        err.print(
            f"This CPU multiplies slowly in {dtype_name(model.dtype)}: `{command}` takes a "
            "fraction of the time, and twice the memory.",
            soft_wrap=True,
        )
