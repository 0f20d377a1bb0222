"""What commands print: results to stdout, errors and progress to stderr."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from kdpipe.errors import KdpipeError


def print_error(error: KdpipeError) -> None:
    """Says on stderr what went wrong, what to do about it and, where something is kept, what continues."""
    from kdpipe.cli.terminal import inert, painter

    paint = painter(sys.stderr)
    stopped = error.exit_code > 128
    label = paint("stopped:", "yellow") if stopped else paint("error:", "red")
    lines = [f"{label} {inert(error.message)}"]
    if error.hint:
        lines.append(f"  {inert(error.hint)}")
    if error.exit_code in (1, 5, 130, 143) and len(sys.argv) > 1:
        program = Path(sys.argv[0]).name
        command = shlex.join(["kdpipe" if program == "__main__.py" else program, *sys.argv[1:]])
        lines.append(f"  everything finished is kept; to continue: {inert(command)}")
    print("\n".join(lines), file=sys.stderr)


def print_json(value: Any) -> None:
    """Prints a command's one JSON document."""
    print(json.dumps(value, sort_keys=True, indent=1))


def say(text: str) -> None:
    """Tells on stderr how things go."""
    from kdpipe.cli.terminal import inert

    print(inert(text), file=sys.stderr)


def shown(path: Path) -> str:
    """The path as a person would type it from here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
