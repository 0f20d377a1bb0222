"""Any path in a recipe and on the command line: used, or refused with a sentence, and nothing of ours stays there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kdpipe.cli.app import app
from kdpipe.pipeline.project import open_project
from kdpipe.recipe.file import load_recipe
from tests.nasty_texts import texts
from tests.test_fuzz import fuzzed
from tests.worlds import tiny_recipe

ODD = {
    "a file": "file",
    "below a file": "file/x",
    "a link to a file": "to-file",
    "an empty folder": "empty",
    "a folder with something in it": "full",
    "a link to a folder": "to-folder",
    "a link to nothing": "dangling",
    "below a link to nothing": "dangling/x",
    "a link to itself": "loop",
    "below a link to itself": "loop/x",
    "a long name": "n" * 300,
    "below a long name": "n" * 300 + "/x",
    "a name at the limit": "n" * 255,
    "a long path": "/".join(["n" * 200] * 30),
    "a null byte": "a\0b",
    "not UTF-8": "a\udcffb",
    "another user's": "~nosuchuser/x",
    "one's own": "~/x",
    "here": ".",
    "above": "..",
    "nothing": "",
    "stdout": "-",
    "a device": "/dev/null",
    "below a device": "/dev/null/x",
    "a device without end": "/dev/zero",
    "where nothing is made": "/proc/x",
    "a pipe": "pipe",
    "new": "new",
    "new in new": "new/er/est",
    "an option": "-rf",
    "a newline": "a\nb",
    "a query": "a?b=c",
}
READ = ("plan", "check", "verify", "status", "samples", "report")
COMMANDS: dict[str, list[str]] = {
    **{f"{name} of a recipe": [name, "PATH"] for name in READ},
    **{f"{name} in a workspace": [name, "recipe.yaml", "--workspace", "PATH"] for name in ("plan", "status", "report")},
    "gc": ["gc", "--workspace", "PATH"],
    "gc --delete": ["gc", "--delete", "--workspace", "PATH"],
    "report -o": ["report", "recipe.yaml", "-o", "PATH"],
    "report --against": ["report", "recipe.yaml", "--against", "PATH"],
    "compare": ["compare", "recipe.yaml", "PATH"],
    "export": ["export", "recipe.yaml", "PATH", "--round", "0"],
    "init": ["init", "PATH"],
    "recipes": ["recipes", "PATH"],
    "init --recipe": ["init", "new", "--recipe", "PATH"],
    "model": ["plan", "recipe.yaml", "--set", "student.model=PATH"],
    "teacher": ["plan", "recipe.yaml", "--set", "teachers=[{model: PATH}]"],
    "task.data": ["plan", "recipe.yaml", "--set", "task={kind: gsm8k, data: PATH}"],
    "task.train": ["plan", "recipe.yaml", "--set", "task={kind: jsonl, train: PATH, test: PATH}"],
    "tokenizer": [
        "plan",
        "recipe.yaml",
        "--set",
        "teachers=[{server: {urls: ['https://a:8000/v1'], model: m, tokenizer: PATH}}]",
    ],
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, with everything odd in it, that the test stands in."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    made = tmp_path / "a" / "b"
    make(made)
    monkeypatch.chdir(made)
    return made


def make(place: Path) -> None:
    shutil.rmtree(place.parent, ignore_errors=True)
    place.mkdir(parents=True)
    for name in ("empty", "full", "model"):
        (place / name).mkdir()
    for name in ("file", "full/thing", "model/config.json", "model/tokenizer.json"):
        (place / name).write_text("{}")
    os.mkfifo(place / "pipe")
    for name, target in {
        "to-file": "file",
        "to-folder": "empty",
        "dangling": "not-there",
        "loop": "loop",
    }.items():
        (place / name).symlink_to(target)
    document = tiny_recipe(student={"model": "./model"}, teachers=[{"self": "initial"}])
    (place / "recipe.yaml").write_text(yaml.safe_dump(document))
    loaded = load_recipe(place / "recipe.yaml")
    open_project(loaded, place / "kdpipe-out").run.write_recipe(loaded)


def attempt(command: str, path: str, place: Path) -> None:
    words = [word.replace("PATH", path if "=" not in word else yaml_text(path)) for word in COMMANDS[command]]
    result = CliRunner().invoke(app, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
    assert result.exit_code in (0, 1, 2, 4), (words, result.output)
    assert result.exit_code == 0 or "error:" in result.stderr or "Usage:" in result.stderr
    left = [found for found in place.parent.rglob("*") if found.name.startswith(".tmp-")]
    assert left == [], words


def yaml_text(path: str) -> str:
    """The path in a YAML text, where escapes can say what no argument can."""
    return (
        '"'
        + "".join(c if c.isalnum() or c in "./~-_" else f"\\u{ord(c):04x}" for c in path if ord(c) < 2**16)
        + '"'
    )


def waits(command: str, path: str) -> bool:
    """Whether a command waits for a pipe's other end, as whoever reads or writes one does."""
    return path == "pipe" and (
        "of a recipe" in command or command in ("report -o", "report --against", "compare")
    )


NAMES = st.one_of(st.sampled_from(list(ODD.values())), texts().filter(lambda text: "\0" not in text))


@fuzzed
@given(command=st.sampled_from(list(COMMANDS)), parts=st.lists(NAMES, min_size=1, max_size=3))
@example(command="plan in a workspace", parts=["file"])
@example(command="status in a workspace", parts=["loop"])
@example(command="model", parts=["a\0b"])
@example(command="tokenizer", parts=["~nosuchuser"])
@example(command="export", parts=["."])
@example(command="export", parts=["dangling"])
@example(command="export", parts=["to-folder"])
@example(command="init", parts=["dangling"])
@example(command="report -o", parts=["-"])
def test_any_path_is_taken_or_refused(command: str, parts: list[str], place: Path) -> None:
    path = "/".join(part.strip("/") if number else part for number, part in enumerate(parts))
    if path.startswith("/") and not path.startswith(("/dev/", "/proc/")):
        path = path.lstrip("/")  # nothing is written beside the test's own folder
    if path.count("..") < 2 and not waits(command, path.rpartition("/")[2]):
        attempt(command, path, place)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_takes_or_refuses_every_odd_path(command: str, place: Path) -> None:
    for path in ODD.values():
        if not waits(command, path):
            attempt(command, path, place)
    assert Path("/dev/null").is_char_device()


def test_a_refused_path_is_named_with_what_to_do(place: Path) -> None:
    for words, code, told in (
        (["plan", "recipe.yaml", "--workspace", "file"], 2, "is no folder"),
        (["plan", "recipe.yaml", "--workspace", "file/x"], 2, "file/x: Not a directory"),
        (["plan", "recipe.yaml", "--workspace", "loop"], 2, "loop: Too many levels of symbolic links"),
        (["plan", "recipe.yaml", "--workspace", "n" * 300], 2, "n...: File name too long"),
        (["plan", "recipe.yaml", "--set", 'student.model="a\\0b"'], 2, "a\\x00b: a path with a null byte"),
        (
            ["plan", "recipe.yaml", "--set", "student.model=~nosuchuser/x"],
            2,
            "~nosuchuser/x: there is no such user",
        ),
        (["export", "recipe.yaml", "-", "--round", "0"], 2, "-: a folder cannot be written to stdout"),
        (["plan", "recipe.yaml", "--workspace", ""], 2, "names no place; expected a path"),
        (["gc", "--workspace", ""], 2, "names no place"),
        (["init", ""], 2, "names no place"),
        (["export", "recipe.yaml", ""], 2, "names no place"),
        (["report", "recipe.yaml", "-o", ""], 2, "names no place"),
        (["plan", ""], 2, "'': names no recipe"),
        (["init", "/proc/x"], 1, "/proc/x/recipe.yaml: cannot be written: No such file or directory"),
    ):
        result = CliRunner().invoke(app, words)
        assert (result.exit_code, told in result.stderr) == (code, True), (words, result.output)


def test_a_working_folder_that_was_removed_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = place / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for words in (["gc"], ["plan", "recipe.yaml"], ["init", "x"]):
        result = CliRunner().invoke(app, words)
        assert (result.exit_code, "the folder that you are in was removed" in result.stderr) == (2, True)
    assert CliRunner().invoke(app, ["gc", "--workspace", str(place / "kdpipe-out")]).exit_code == 0
