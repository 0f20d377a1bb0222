"""Figures in the README and in the pages that it links are those of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART, ENGINES = (
    (ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("quickstart", "engines")
)
MAX_LINES = 170


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= MAX_LINES


def test_every_page_stands_in_the_index_and_every_link_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    for page in pages:
        assert page.parent == ROOT or page.name == "index.md" or f"({page.name})" in index, page
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_quickstart_on_three_seeds() -> None:
    path = ROOT / "benchmarks" / "results" / "quickstart.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    [commit] = {run["commit"] for run in runs}
    assert not commit.endswith("-dirty")
    assert f"run at `{commit[:7]}`" in QUICKSTART
    for run, seed in zip(runs, (1, 2, 3), strict=True):
        assert run["overrides"] == [f"seed={seed}"]
        assert all(run["promises"].values())
        found = run["evaluations"]
        [after] = (found[label] for label in found if label.startswith("student after"))
        before, teacher = found["student before"], found["teacher"]
        cells = [
            f"{seed}",
            f"{teacher['accuracy']:.1%}".replace("%", " %"),
            *(
                f"{100 * one['accuracy']:.1f} % ({100 * one['accuracy_low']:.1f} to {100 * one['accuracy_high']:.1f})"
                for one in (before, after)
            ),
            " to ".join(f"{one['reverse_kl_exact_nats']:.3f}" for one in (before, after)),
            f"{run['cpu_seconds']:.0f}",
        ]
        assert f"\n| {' | '.join(cells)} |\n" in QUICKSTART
        if seed == 1:  # the run whose output is shown
            for name, one in (
                ("student before", before),
                ("student after round 48", after),
                ("teacher", teacher),
            ):
                assert re.search(rf"^{name} +{one['accuracy']:.1%} ", README, re.MULTILINE)


def test_how_far_apart_three_engines_are() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "three_engines.jsonl").read_text())
    assert not found["commit"].endswith("-dirty")
    assert f"run at\n`{found['commit'][:7]}`" in ENGINES
    assert f"the {found['completion_tokens']} completion tokens of round 1" in ENGINES
    names = {
        "vllm, hf": "`vllm` and `hf`",
        "server, hf": "server and `hf`",
        "vllm, server": "`vllm` and server",
    }
    for pair, apart in found["nats_apart"].items():
        mean, largest = (shown(apart[name]) for name in ("mean", "max"))
        assert f"| {names[pair]} | {mean} | {largest} |" in ENGINES
        assert apart["mean"] < 1e-4
    worst = max(row["mismatch_nats_max"] for run in found["mismatch"].values() for row in run)
    assert f"at most {shown(worst)} nats apart" in ENGINES


def shown(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-") if value else "0"
