"""The program's door: `kdpipe` and `python -m kdpipe`. Ctrl-C ends it without a word until it can be heard."""

import signal


def main() -> None:
    """Imports and runs the command line."""
    is_heard = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # as in a shell's background
    if is_heard:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing has begun: there is nothing to say
    from kdpipe.cli.app import main as run

    if is_heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
