"""Paths that the system refuses, or that are not what they seem, wherever a command takes one."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.trials.trial import DAMAGED, DONE, LEFT, REFUSED, Trial

PATHS: dict[str, str] = {
    "a file": "recipe.yaml",
    "below a file": "recipe.yaml/x",
    "a device": "/dev/null",
    "below a device": "/dev/null/x",
    "a pipe": "pipe",
    "a name of 300 characters": "a" * 300,
    "a path of 5,000 characters": "/".join(["abcd"] * 1000),
    "a link to itself": "loop",
    "below a link to itself": "loop/x",
    "a dangling link": "dangling",
    "a link to an empty folder": "link",
    "a user that is not there": "~nosuchuser/x",
    "nothing": "",
    "a blank": " ",
    "the root": "/",
    "in /proc": "/proc/x",
    "in /sys": "/sys/x",
    "a query and a fragment": "a?b=c#d",
    "per cent and colon": "a%20b:c",
    "a line break": "a\nb",
    "control codes": "a\x1b[2Jb",
    "no UTF-8": "a\udcffb",
    "a dash": "-",
    "an option": "--json",
    "letters of many scripts": "日本語 ñ Ω 🙂",
    "up and down": "gone/../inside",
}
"""Name -> path, relative to the folder that `oddities` fills."""
COMMANDS: dict[str, str] = {
    "workspace of plan": "kdpipe plan recipe.yaml --workspace=PATH",
    "workspace of status": "kdpipe status recipe.yaml --workspace=PATH",
    "workspace of verify": "kdpipe verify recipe.yaml --workspace=PATH",
    "workspace of gc": "kdpipe gc --delete --workspace=PATH",
    "workspace of samples": "kdpipe samples recipe.yaml --workspace=PATH",
    "workspace of run": "kdpipe run recipe.yaml --rounds 0 --workspace=PATH",
    "recipe of check": "kdpipe check -- PATH",
    "recipe of plan": "kdpipe plan -- PATH",
    "page of report": "kdpipe report recipe.yaml --output=PATH",
    "target of export": "kdpipe export recipe.yaml -- PATH",
    "target of init": "kdpipe init -- PATH",
    "model of plan": "kdpipe plan recipe.yaml --set student=MODEL --set student.sft=null",
    "data of plan": "kdpipe plan recipe.yaml --set task=DATA",
    "tokenizer of plan": "kdpipe plan recipe.yaml --set teachers=SERVER",
}
"""Name -> command; PATH and the documents below are replaced."""
DOCUMENTS = {
    "MODEL": "{model: %s}",
    "DATA": "{kind: jsonl, train: %s, test: test.jsonl}",
    "SERVER": '[{server: {urls: ["http://127.0.0.1:9/v1"], model: m, tokenizer: %s}}]',
}


def oddities(folder: Path) -> None:
    """A pipe, links that lead nowhere, to themselves, and to an empty folder."""
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("gone")
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("empty")


def trials() -> Iterator[Trial]:
    for where, command in COMMANDS.items():
        for name, path in PATHS.items():
            yield Trial(
                "paths",
                f"{where}: {name}",
                placed(command, path),
                frozenset({DONE, LEFT, DAMAGED}) | REFUSED,
                oddities,
                may_write=written(where, path),
                seconds=60.0 if where == "workspace of run" else 10.0,
            )
    yield from without_a_folder()


def placed(command: str, path: str) -> str:
    """The command with the path in its place. A pipe ends for who reads it, and is read from who writes into it."""
    for word, document in DOCUMENTS.items():
        command = command.replace(word, shlex.quote(document % yaml_text(path)))
    command = command.replace("PATH", shlex.quote(path))
    if path != "pipe":
        return command
    return f"cat pipe > /dev/null & {command}" if "report" in command else f": > pipe & {command}"


def yaml_text(path: str) -> str:
    """A double-quoted YAML text; half a surrogate as the escape that YAML has for a character."""
    return json.dumps(path)


def written(where: str, path: str) -> tuple[str, ...]:
    """What a command may make: where it was pointed."""
    if not path:
        return ("",)  # the working folder, as Python has it
    if path.startswith("/"):
        return ()
    first = path.split("/", maxsplit=1)[0]
    return {
        "loop": (),
        "link": ("link", "empty"),
        "dangling": ("dangling", "gone"),
        "x": ("x",),
        "gone": ("inside",),
    }.get(first, (first,))


def without_a_folder() -> Iterator[Trial]:
    """Commands in a working folder that was removed."""
    for command in (
        "check quickstart",
        "plan quickstart",
        "status",
        "gc",
        "doctor",
        "run quickstart",
        "report quickstart",
        "init x",
        "schema",
        "recipes",
        "export quickstart x",
        "verify quickstart",
        "compare a b",
    ):
        yield Trial(
            "paths",
            f"a removed working folder: {command}",
            f"mkdir gone; cd gone; rmdir ../gone; kdpipe {command}",
            frozenset({DONE}) | REFUSED,
            seconds=10.0,
        )
