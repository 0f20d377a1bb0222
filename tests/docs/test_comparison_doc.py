"""The tables of docs/comparison.md are those that `benchmarks/peers.py` makes of what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
FOUND = ROOT / "benchmarks" / "results" / "peers.json"
DOCUMENT: dict[str, Any] = json.loads(FOUND.read_text())
CLAIMS: dict[str, Any] = yaml.safe_load((ROOT / "benchmarks" / "peers.yaml").read_text(encoding="utf-8"))


def test_both_tables_are_made_from_what_was_found() -> None:
    command = [sys.executable, "-S", "benchmarks/peers.py", "--markdown", str(FOUND)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    table, _, places = printed.strip().partition("\n\n<!-- where -->\n\n")
    assert table in PAGE
    assert places in PAGE


def test_every_claim_was_looked_up_as_it_is_said() -> None:
    assert [row["row"] for row in DOCUMENT["rows"]] == [claim["row"] for claim in CLAIMS["rows"]]
    for claim, row in zip(CLAIMS["rows"], DOCUMENT["rows"], strict=True):
        for peer in CLAIMS["peers"]:
            said, found = claim[peer], row["peers"][peer]
            assert said.get("says") == found.get("says")
            assert set(said.get("found", ())) == set(found.get("found", ()))
            assert all(found.get("found", {}).values())


def test_the_page_says_when_and_of_which_versions() -> None:
    assert DOCUMENT["date"] in PAGE
    for peer in DOCUMENT["peers"].values():
        assert "version" not in peer or f"{peer['package']}=={peer['version']}" in PAGE
