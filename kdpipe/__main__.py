"""The entry point: `kdpipe` and `python -m kdpipe`. Until it can be handled, Ctrl-C ends it silently."""

import gc
import signal


def main() -> None:
    """Imports and runs the command line."""
    is_heard = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # as in a shell's background
    if is_heard:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing has begun: there is nothing to say
    # Starting makes many objects and hardly any garbage: looking for it takes a twentieth of `kdpipe plan`.
    gc.set_threshold(100_000, 50, 50)
    from kdpipe.cli.app import main as run

    if is_heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
