"""Faults of benchmarks/faults.yaml still fit the code, and docs/faults.md holds what became of each."""

from __future__ import annotations

import json
from pathlib import Path

from tests.docs.test_objectives_doc import study

ROOT = Path(__file__).resolve().parents[2]
DOC = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results" / "faults.jsonl"
LINES = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
ROWS = [line for line in LINES if "fault" in line]
SCRIPT = study("faults")
FAULTS = SCRIPT.faults()


def test_the_line_of_each_fault_is_in_the_code_once() -> None:
    texts = {
        path: (ROOT / "kdpipe" / path).read_text(encoding="utf-8") for path in {one.file for one in FAULTS}
    }
    for one in FAULTS:
        assert one.put_into(texts[one.file]) != texts[one.file], one


def test_what_is_named_to_catch_each_is_there() -> None:
    for catcher in {one.caught_by for one in FAULTS}:
        file, _, name = catcher.partition("::")
        if name:
            assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8"), catcher
        else:
            assert file.split()[0] in ("check-loss", "doctor")


def test_every_fault_was_tried_and_caught_by_what_passes_without_it() -> None:
    tried = [(row["file"], row["kind"], row["fault"], row["caught_by"]) for row in ROWS]
    assert tried == [(one.file, one.kind, one.fault, one.caught_by) for one in FAULTS]
    assert len(set(tried)) >= 53
    assert {row["outcome"] for row in ROWS} == {"caught"}
    assert [line["failed"] for line in LINES if "failed" in line] == [[]] * (len(LINES) - len(ROWS))
    for commit in {line["commit"] for line in LINES}:
        assert f"`{commit[:7]}`" in DOC


def test_the_page_has_the_table_and_the_figures_of_the_study() -> None:
    marker = f"<!-- study: {RESULTS.relative_to(ROOT)} -->\n\n"
    assert DOC.count(marker) == 1
    assert DOC.partition(marker)[2].startswith(SCRIPT.markdown(LINES) + "\n")
    seconds = sum(row["seconds"] for row in LINES)
    assert f"{len(ROWS)} faults" in DOC
    assert f"{seconds / 60:.0f} minutes of CPU time" in DOC
