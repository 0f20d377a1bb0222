"""Puts a fault into one line of a copy of the code, one after the other, and runs what is named to catch it.

    python benchmarks/faults.py > benchmarks/results/faults.jsonl
    python benchmarks/faults.py --markdown benchmarks/results/faults.jsonl
    python benchmarks/faults.py --only stages/

`faults.yaml` has each fault with the test, or the `kdpipe check-loss` or `kdpipe doctor`, that must fail with it. All
of these must pass without a fault first. One JSON line for each fault, with CPU seconds; exit status 1 where one
survives, or where a line is not in the code exactly once. The checkout itself is never touched.
"""

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from study import ROOT, Rows, commit, parsed, parser_of

FAULTS = Path(__file__).with_suffix(".yaml")
HEAVY = (
    "torch",
    "peft",
    "transformers.models.llama",
    "pyarrow.parquet",
    "hypothesis",
    "pytest",
    "scipy.special",
)
"""Imported once, before processes are forked that each import a package of their own."""
NAMED = ("file", "kind", "fault", "caught_by")
FOUND_FAULT = {"tests": 1, "check-loss": 4, "doctor": 4}
"""The exit status of each catcher that found something; any other is not about the fault."""


@dataclass(frozen=True)
class Fault:
    """A line of a file below kdpipe/, what stands in its place, and what must notice: a test or a command."""

    file: str
    fault: str
    kind: str
    line: str
    instead: str
    caught_by: str

    @property
    def named(self) -> dict[str, str]:
        """What a line of the results says of it."""
        return {name: getattr(self, name) for name in NAMED}

    @property
    def found(self) -> int:
        """The exit status with which its catcher notices."""
        return FOUND_FAULT[self.caught_by.split(maxsplit=1)[0].partition("/")[0]]

    def put_into(self, text: str) -> str:
        """The file's text with the fault; raises ValueError unless its line stands there exactly once."""
        lines = text.splitlines(keepends=True)
        places = [place for place, line in enumerate(lines) if line.strip() == self.line]
        if len(places) != 1:
            raise ValueError(f"{self.file}: {len(places)} lines are {self.line!r}, expected one")
        lines[places[0]] = lines[places[0]].replace(self.line, self.instead)
        return "".join(lines)


def faults() -> list[Fault]:
    """Those of faults.yaml."""
    found = yaml.safe_load(FAULTS.read_text(encoding="utf-8"))
    return [Fault(file, **fields) for file, entries in found.items() for fields in entries]


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--only", default="", help="faults whose kind, name or file holds this text")
    parser.add_argument(
        "--without", type=Path, help="results whose faults, where caught by the same, are left out"
    )
    arguments = parsed(parser, markdown)
    known = (
        [json.loads(line) for line in arguments.without.read_text().splitlines()] if arguments.without else []
    )
    done = [{name: line[name] for name in NAMED} for line in known if line.get("outcome") == "caught"]
    chosen = [
        one
        for one in faults()
        if arguments.only in f"{one.file} {one.kind}: {one.fault}" and one.named not in done
    ]
    for one in chosen:
        one.put_into((ROOT / "kdpipe" / one.file).read_text(encoding="utf-8"))
    for name in HEAVY:
        importlib.import_module(name)
    survived = 0
    with tempfile.TemporaryDirectory(prefix="kdpipe-faults-") as folder:
        tree = Tree(Path(folder))
        line = tree.without_fault(chosen)
        told(line)
        if line["failed"]:
            return 1
        for one in chosen:
            line = tree.tried(one)
            told(line)
            survived += line["outcome"] != "caught"
    return 1 if survived else 0


def told(line: dict[str, Any]) -> None:
    print(json.dumps({"benchmark": "faults", "commit": commit(), **line}), flush=True)


class Tree:
    """A copy of the checkout's files, whose `kdpipe` the catchers import."""

    def __init__(self, folder: Path) -> None:
        self.root, self.log, self.empty = folder / "tree", folder / "log", folder / "empty"
        self.empty.mkdir()
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", ":!docs/images"]
        for name in subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines():
            if (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.root / name)
        # A date would not tell a line from another of its length, written in the same second.
        compiled = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash"]
        subprocess.run([*compiled, self.root / "kdpipe", self.root / "tests"], check=True)

    def without_fault(self, chosen: Sequence[Fault]) -> dict[str, Any]:
        """Which catchers fail without a fault, all tests together."""
        catchers = sorted({one.caught_by for one in chosen})
        tests = [one for one in catchers if one.startswith("tests/")]
        commands = [one for one in catchers if one not in tests]
        failed, seconds = [], 0.0
        for catcher in ([shlex.join(tests)] if tests else []) + commands:
            status, took = self.run(catcher)
            seconds += took
            if status != 0:
                failed.append(catcher)
                print(self.log.read_text(encoding="utf-8")[-3000:], file=sys.stderr)
        return {
            "part": "without a fault",
            "catchers": len(catchers),
            "failed": failed,
            "seconds": round(seconds, 1),
        }

    def tried(self, fault: Fault) -> dict[str, Any]:
        """Whether a fault is caught, and after how many seconds."""
        path = self.root / "kdpipe" / fault.file
        sound = path.read_text(encoding="utf-8")
        path.write_text(fault.put_into(sound), encoding="utf-8")
        status, seconds = self.run(
            shlex.quote(fault.caught_by) if "::" in fault.caught_by else fault.caught_by
        )
        path.write_text(sound, encoding="utf-8")
        outcome: Literal["caught", "survived", "no verdict"]
        outcome = "caught" if status == fault.found else "survived" if status == 0 else "no verdict"
        if outcome != "caught":
            print(f"{fault}: {status}\n{self.log.read_text(encoding='utf-8')[-1500:]}", file=sys.stderr)
        return {**fault.named, "outcome": outcome, "seconds": round(seconds, 1)}

    def run(self, catcher: str) -> tuple[int, float]:
        """The exit status of a test or a command on this copy, and its CPU seconds."""
        child = os.fork()
        if child == 0:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= {
                "PYTHONPATH": str(self.root),
                "PYTHONDONTWRITEBYTECODE": "1",
                "OMP_NUM_THREADS": "1",
            }
            sys.dont_write_bytecode = True
            arguments = shlex.split(catcher)
            if not arguments[0].startswith("tests/"):
                os.chdir(self.empty)
                os.execv(sys.executable, [sys.executable, "-m", "kdpipe", *arguments])  # noqa: S606 (our own)
            os._exit(self._tested(arguments))
        _, status, usage = os.wait4(child, 0)
        return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime

    def _tested(self, tests: Sequence[str]) -> int:
        import pytest

        os.chdir(self.root)
        sys.path.insert(0, str(self.root))
        return int(pytest.main([*tests, "-n", "0", "-q", "-x", "-p", "no:cacheprovider"]))


def markdown(rows: Rows) -> str:
    """A table of the faults, by the package of their file and by their kind."""
    lines = ["| kind | fault | in | caught by |", "|---|---|---|---|"]
    lines += [
        f"| {row['kind']} | {row['fault']} | `{row['file']}` | {shown(row['caught_by'])} |"
        for row in rows
        if "fault" in row
    ]
    return "\n".join(lines)


def shown(catcher: str) -> str:
    """A catcher as a cell: a test by its name below its file, a command as it is typed."""
    file, _, name = catcher.partition("::")
    if not name:
        return f"`kdpipe {catcher}`"
    return (
        f"`{file.removeprefix('tests/')}`: {name.partition('[')[0].removeprefix('test_').replace('_', ' ')}"
    )


if __name__ == "__main__":
    sys.exit(main())
