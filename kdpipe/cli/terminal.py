"""What commands print: results to stdout, errors and progress to stderr.

Colours and control codes appear on terminals only. Model text is shown through `visible`, which strips
whatever a terminal would act on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from kdpipe.results.visible_text import visible

if TYPE_CHECKING:
    from kdpipe.errors import KdpipeError

PLAIN_SECONDS = 5.0
WATCH_SECONDS = 1.0
COLUMNS = 80
Style = Literal["bold", "dim", "red", "green", "yellow", "cyan"]
Paint = Callable[[str, Style], str]
_CODES: dict[Style, int] = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}


def painter(stream: TextIO) -> Paint:
    """A function that puts colour codes around a text where `stream` is coloured."""
    if is_coloured(stream):
        return lambda text, style: f"\x1b[{_CODES[style]}m{text}\x1b[0m"
    return lambda text, _style: text


def is_coloured(stream: TextIO) -> bool:
    """Whether colours are shown on `stream`: it is a terminal, and NO_COLOR is not set."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` understands control codes."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as lines: the first column begins at the left, all others end at the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    sides = ["<", *">" * (len(widths) - 1)]
    cells = [[f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths, strict=True)] for row in table]
    return ["  ".join(row).rstrip() for row in cells]


def counted(number: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def indented(text: str, first: str, others: str | None = None) -> list[str]:
    """The text in lines of 80 columns, the first of which begins with `first`, all others with `others`."""
    rest = first if others is None else others
    return textwrap.wrap(text, COLUMNS, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def print_error(error: KdpipeError) -> None:
    """Prints to stderr what went wrong, what to do and, where something is kept, how to continue."""
    paint = painter(sys.stderr)
    stopped = error.exit_code > 128
    label = paint("stopped:", "yellow") if stopped else paint("error:", "red")
    lines = [f"{label} {visible(error.message)}"]
    if error.hint:
        lines.append(f"  {visible(error.hint)}")
    if (stopped or error.exit_code in (1, 5)) and len(sys.argv) > 1:
        program = Path(sys.argv[0]).name
        command = shlex.join(["kdpipe" if program == "__main__.py" else program, *sys.argv[1:]])
        lines.append(f"  everything finished is kept; to continue: {visible(command)}")
    print("\n".join(lines), file=sys.stderr)


def print_json(value: object) -> None:
    """Prints a command's one JSON document."""
    print(json.dumps(value, sort_keys=True, indent=1))


def print_result(document: object, text: str, *, as_json: bool, end: str = "\n") -> None:
    """Prints the result of a command: its document with --json, else its text."""
    if as_json:
        print_json(document)
    else:
        print(text, end=end)


def print_event(event: str, **fields: object) -> None:
    """Prints what happened in a run as one line of JSON."""
    print(json.dumps({"event": event, **fields}, sort_keys=True), flush=True)


def say(text: str) -> None:
    """Prints a line of progress to stderr."""
    print(visible(text), file=sys.stderr)


def shown(path: Path) -> str:
    """The path as a person would type it from here."""
    with contextlib.suppress(OSError, ValueError):  # where "here" was removed, or is elsewhere
        path = path.relative_to(Path.cwd())
    return visible(str(path))


def watch_lines(look: Callable[[], tuple[list[str], bool]]) -> None:
    """Shows what `look` returns each second until it says that it was the last; Ctrl-C ends it quietly.

    Where stdout is no terminal: all of it at first, later what has changed.
    """
    with contextlib.suppress(KeyboardInterrupt):
        if is_terminal(sys.stdout):
            from rich.live import Live
            from rich.text import Text

            with Live(auto_refresh=False, vertical_overflow="crop") as live:
                for lines in _each_look(look, WATCH_SECONDS):
                    live.update(Text.from_ansi("\n".join(lines)), refresh=True)
            return
        before: list[str] = []
        for lines in _each_look(look, PLAIN_SECONDS):
            if new := [line for line in lines if line not in before]:
                print("\n".join(new), flush=True)
            before = lines


def _each_look(look: Callable[[], tuple[list[str], bool]], seconds: float) -> Iterator[list[str]]:
    goes_on = True
    while goes_on:
        lines, goes_on = look()
        yield lines
        if goes_on:
            time.sleep(seconds)
