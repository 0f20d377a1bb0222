"""Report pages of ten situations in a real browser: each has its headline, and is whole on a desk and on a phone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kdpipe.pipeline.project import Project, open_project
from kdpipe.report.writing import write_report
from tests.report.test_report_browser import WHOLE, Page, driver  # noqa: F401 (a fixture)
from tests.results.told import Bounds, graded
from tests.stages import test_prompts_alone as prompts
from tests.worlds import Watcher, load_tiny, run_near

pytestmark = pytest.mark.browser
DESK, PHONE = (1280, 1000), (390, 844)
CLOSER = "Closer to the teacher"
HEADLINES = {
    "gain": ("good", "It worked: the student gained 46.0 points and came closer to the teacher."),
    "harm": (
        "bad",
        "It did harm: the student lost 25.0 points and went 3.640 nats a token away from the teacher.",
    ),
    "nothing": ("open", "No clear effect."),
    "closer": ("open", f"{CLOSER}, but no clear change in accuracy."),
    "one": ("open", "Too few problems to tell."),
    "twelve": ("open", f"{CLOSER}, but no clear change in accuracy."),
    "unfinished": ("open", f"{CLOSER} so far, but no clear change in accuracy; round 2 of 4."),
    "died": (
        "open",
        f"{CLOSER} so far, but no clear change in accuracy; round 2 of 4, then it broke off in train@3.",
    ),
    "no teacher": ("open", f"{CLOSER}, but no clear change in accuracy."),
    "prompts": ("good", "It worked: the student came … nats a token closer to the teacher."),
}
PATCHED: dict[str, tuple[Bounds, Bounds]] = {
    "gain": ((0.46, 0.38, 0.53), (-0.6, -0.7, -0.5)),
    "harm": ((-0.25, -0.32, -0.18), (3.64, 1.56, 5.96)),
    "nothing": ((0.01, -0.04, 0.06), (0.01, -0.02, 0.04)),
}
"""Changes that no run of seconds makes."""


def dies(step: str, _event: Mapping[str, Any]) -> None:
    if step == "train@3":
        raise RuntimeError("as if it was killed")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page of each situation; the runs share what they can."""
    folder, out = tmp_path_factory.mktemp("situations"), tmp_path_factory.mktemp("pages")

    def load(count: int = 40, **changes: Any) -> Any:
        evaluate = {"reverse_kl_problems": count, **changes.pop("evaluate", {})}
        given = {"rounds": 2, "train__objective": WHOLE, "task__test_problems": count, **changes}
        return load_tiny(folder, evaluate=evaluate, **given)

    def write(name: str, project: Project) -> None:
        write_report(project, out / f"{name}.html", commands=["kdpipe run recipe.yaml"])

    base = run_near(load(), folder / "out")
    write("closer", base)
    for name, (accuracy, kl) in PATCHED.items():
        with pytest.MonkeyPatch.context() as patch:
            after = graded(2, accuracy, kl)
            patch.setattr("kdpipe.results.measures.summaries_of", lambda *_, after=after: [graded(0), after])
            write(name, base)
    write("one", run_near(load(1), folder / "out"))
    write("twelve", run_near(load(12), folder / "out"))
    write("no teacher", run_near(load(evaluate={"teacher": False}), folder / "out"))
    longer = load(rounds=4)
    write("unfinished", run_near(longer, folder / "out", rounds=2))
    watcher = Watcher()
    watcher.on_event = dies
    with pytest.raises(RuntimeError, match="as if"):
        run_near(longer, folder / "out", watcher=watcher)
    write("died", open_project(longer, folder / "out"))
    apart = tmp_path_factory.mktemp("prompts")
    write("prompts", run_near(prompts.load(apart), apart / "out"))
    return out


@pytest.mark.parametrize("name", HEADLINES)
def test_each_situation_has_its_headline_and_fits_every_screen(
    driver: Any,  # noqa: F811
    pages: Path,
    name: str,
) -> None:
    for size in (DESK, PHONE):
        for scheme in ("light", "dark"):
            page = Page(driver, (pages / f"{name}.html").as_uri(), size, scheme)
            found = page.js(
                "[...document.querySelectorAll('.verdict')].map((one) => [one.className, one.textContent])"
            )
            tone, headline = HEADLINES[name]
            if name == "prompts":  # its last digit is the machine's
                found[0][1] = re.sub(r"\d\.\d{3}", "…", found[0][1])
            assert found == [[f"verdict {tone}", headline]]
            box = page.js("document.querySelector('.verdict').getBoundingClientRect().toJSON()")
            assert 0 <= box["left"] < box["right"] <= size[0]
            assert box["bottom"] <= size[1] / 2
            assert page.js("document.documentElement.scrollWidth") <= size[0]
            assert page.logged() == []
