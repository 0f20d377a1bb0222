"""The entry point: `kdpipe` and `python -m kdpipe`. Until it can be handled, Ctrl-C ends it silently."""

import contextlib
import gc
import os
import signal
import sys


def main() -> None:
    """Imports and runs the command line."""
    _leave_working_folder()
    is_heard = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # as in a shell's background
    if is_heard:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing has begun: there is nothing to say
    # Starting makes many objects and hardly any garbage: looking for it takes a twentieth of `kdpipe plan`.
    gc.set_threshold(100_000, 50, 50)
    from kdpipe.cli.app import main as run

    if is_heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _leave_working_folder() -> None:
    """Takes the working folder off the path of modules, unless PYTHONPATH names it in full: it holds data."""
    with contextlib.suppress(FileNotFoundError):  # a folder that is gone holds no modules
        here = os.getcwd()  # noqa: PTH109 (pathlib is imported when the path is safe)
        if here not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
            sys.path[:] = [place for place in sys.path if place not in ("", here)]


if __name__ == "__main__":
    main()
