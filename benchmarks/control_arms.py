"""The tables of docs/arms.md, from the comparison that `kdpipe arms` keeps in its workspace.

    python benchmarks/control_arms.py kdpipe-out/studies/quickstart-arms-*/comparison.json

prints them; the committed study is `benchmarks/results/arms.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
ACCURACY, REVERSE_KL = "accuracy", "reverse_kl_nats"


def tables(rows: Sequence[Row]) -> str:
    """What each arm reached and gained; and one arm against another."""
    arms = [["arm", "accuracy, %", "by seed", "gain, points", "reverse KL, nats", "change, nats", "tokens"]]
    pairs = [["arm against arm", "accuracy, points", "reverse KL, nats"]]
    for row in rows:
        seeds = ", ".join(f"{100 * run[ACCURACY]:.1f}" for run in row["runs"])
        level, gain = f"{100 * row[ACCURACY]['estimate']:.1f}", _points(row[ACCURACY]["change"])
        beside = row.get(REVERSE_KL)
        nats = ["", ""] if beside is None else [f"{beside['estimate']:.2f}", _nats(beside["change"])]
        arms.append([row["label"], level, seeds, gain, *nats, f"{row['tokens'] / 1e6:.2f}"])
        for other, change in row[ACCURACY]["pairs"].items():
            apart = None if beside is None else beside["pairs"].get(other)
            pairs.append([f"{row['label']} less {other}", _points(change), _nats(apart)])
    return f"{_markdown(arms)}\n\n{_markdown(pairs)}"


def _points(change: Row | None) -> str:
    return (
        ""
        if change is None
        else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in _bounds(change)))
    )


def _nats(change: Row | None) -> str:
    return "" if change is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(*_bounds(change))


def _bounds(change: Row) -> list[float]:
    return [change[name] for name in ("estimate", "low", "high")]


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "comparison", type=Path, help="a study's comparison.json, or benchmarks/results/arms.json"
    )
    print(tables(json.loads(parser.parse_args().comparison.read_text())["rows"]))
