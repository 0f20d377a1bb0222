"""The command line: the list of commands, and the one place that turns an error into an exit code.

Results go to stdout, progress and errors to stderr. Nothing heavy is imported before a command needs it.
"""

import atexit
import functools
import gc as collector
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, ParamSpec

import typer

from kdpipe import __version__
from kdpipe.cli.before import check, plan
from kdpipe.cli.doctor import check_loss, doctor
from kdpipe.cli.keep import export, gc, verify
from kdpipe.cli.look import report, samples, status, ui
from kdpipe.cli.run import STAGE_HELP, run, stage_command
from kdpipe.cli.start import docs, init, recipes, schema
from kdpipe.cli.stream import prepare_streams
from kdpipe.cli.study import arms, compare
from kdpipe.cli.terminal import print_error
from kdpipe.errors import Interrupted, KdpipeError, refusal

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: rich would double the time that --help takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

COMMANDS = (
    *(check, check_loss, plan),
    *(compare, arms),
    *(status, samples, report),
    *(export, verify, gc),
    *(recipes, docs, init, schema),
    *(doctor, ui),
)
"""In the order in which `kdpipe --help` lists them, after `run` and the stages."""
BEFORE_ANYTHING = "before anything began"

Parameters = ParamSpec("Parameters")


def main() -> None:
    """Runs the command line; every expected failure becomes one message and its exit code."""
    atexit.register(collector.freeze)  # no garbage is looked for on the way out, a twentieth of `kdpipe plan`
    _without_pydantic_plugins()
    prepare_streams()
    try:
        Path.home()
    except RuntimeError:  # a user id without an account, as in a container: MLflow needs a home
        import tempfile

        os.environ["HOME"] = os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir()
    try:
        reported(app)()
    except typer.Exit as end:  # of what is no command's, as --version
        sys.exit(end.exit_code)
    except SystemExit as end:
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            # Ctrl-C while typer read the arguments, of which it says nothing.
            print_error(Interrupted(signal.SIGINT, BEFORE_ANYTHING))
        if isinstance(end.__context__, BrokenPipeError):  # while typer printed help, which it ends with 1
            sys.exit(128 + signal.SIGPIPE)
        raise


def _without_pydantic_plugins() -> None:
    """Keeps pydantic from reading every distribution's metadata for plugins: a sixteenth of `kdpipe plan`."""
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "true")
    loader = ModuleType("pydantic.plugin._loader")  # importing the reader of metadata is most of it
    loader.__dict__["get_plugins"] = lambda: ()
    sys.modules.setdefault(loader.__name__, loader)


def reported(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Prints a KdpipeError as a message with what to do, and exits with its code."""

    @functools.wraps(command)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            try:
                command(*args, **kwargs)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:  # the reader of our output went away, as `| head` does
            raise typer.Exit(128 + signal.SIGPIPE) from None
        except (KdpipeError, KeyboardInterrupt, OSError) as error:
            told = refusal(error) if isinstance(error, OSError) else error
            if not isinstance(told, KdpipeError):  # Ctrl-C before the run took over the signals
                told = Interrupted(signal.SIGINT, BEFORE_ANYTHING)
            print_error(told)
            raise typer.Exit(told.exit_code) from None

    return wrapper


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """On-policy knowledge distillation of language models, one resumable step at a time.

    Example: kdpipe run quickstart
    """
    if show:
        print(f"kdpipe {__version__}")
        raise typer.Exit


app.command()(reported(run))
for stage, text in STAGE_HELP.items():
    app.command(stage, help=text)(reported(stage_command(stage)))
for command in COMMANDS:
    app.command()(reported(command))


if __name__ == "__main__":
    main()
