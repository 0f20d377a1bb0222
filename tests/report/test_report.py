"""The report: its numbers are those of the artifacts, its text is inert, its size bounded; it says what lacks."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import astuple, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kdpipe.cli.app import app
from kdpipe.data.tables import SCORES, read_lists, read_scores, write_rows
from kdpipe.method.statistics import wilson
from kdpipe.pipeline.project import Project
from kdpipe.recipe.stages import RolloutSection
from kdpipe.report.charts import charts, zero_charts
from kdpipe.report.figure import element
from kdpipe.report.page import MAX_BYTES, render
from kdpipe.report.template import embedded
from kdpipe.report.tokens_data import UNITS, Titled, titled_completions, token_data
from kdpipe.report.writing import is_current, renew_report, report_path, stamp, write_report
from kdpipe.results.comparison import ComparisonRow, compare
from kdpipe.results.contender import Contender, read_contender
from kdpipe.results.evaluations import Evaluation
from kdpipe.results.measures import Measures
from kdpipe.results.reader import Reader
from kdpipe.results.table import tables_of
from kdpipe.results.top_logprobs import KeptStates
from kdpipe.results.verdict import warnings
from kdpipe.results.visible_text import visible
from kdpipe.stages.sampling import _over_prompts
from tests.reports import NASTY, Outline, page_of, story
from tests.results.told import evaluated_run
from tests.worlds import load_tiny, run_near

WHOLE = {"kind": "kd", "kd": {"term": "jsd", "beta": 1.0, "support": "vocabulary"}}
TOP = {"kind": "kd", "kd": {"term": "jsd", "beta": 1.0, "support": {"teacher_top_k": 6}}}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished run of two rounds that keeps the teacher's hidden states."""
    folder = tmp_path_factory.mktemp("report")
    return run_near(load_tiny(folder, rounds=2, train__objective=WHOLE), folder / "out")


@pytest.fixture(scope="module")
def page(project: Project, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    size = write_report(project, path, commands=["kdpipe run recipe.yaml"])
    text = path.read_text(encoding="utf-8")
    assert size == len(text.encode()) < MAX_BYTES
    return text


def test_a_report_in_the_runs_own_place_has_its_charts_beside_it(
    project: Project, page: str, tmp_path: Path
) -> None:
    folder = project.run.path / "figures"
    write_report(project, tmp_path / "elsewhere.html", commands=[])
    assert not folder.exists()
    write_report(project, report_path(project), commands=[])
    shown = re.findall(r'data-chart="([a-z0-9-]+)"', page)
    assert {"accuracy", "reverse-kl"} < set(shown)
    assert sorted(path.stem for path in folder.iterdir()) == sorted(shown)


def data_of(page: str, name: str) -> Any:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def table(project: Project, step_id: str, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(
        project.store.entry(project.plan.step(step_id)).folder / name
    ).to_pylist()
    return rows


# ------------------------------------------------------------------------------------------- its numbers


def test_the_headline_table_shows_the_summaries(project: Project, page: str) -> None:
    for step_id in ("evaluate:student@0", "evaluate:student@2", "evaluate:teacher@0"):
        folder = project.store.entry(project.plan.step(step_id)).folder
        summary = json.loads((folder / "summary.json").read_text())
        low, high = 100 * summary["accuracy_low"], 100 * summary["accuracy_high"]
        assert f"{low:.1f}% to {high:.1f}%" in page
        if "reverse_kl_exact_nats" in summary:
            assert f">{summary['reverse_kl_exact_nats']:.3f} (" in page


def test_the_token_view_holds_the_numbers_of_the_tables(project: Project, page: str) -> None:
    data = data_of(page, "token-data")
    by_key = {one["key"]: one for one in data["sets"]}
    assert set(by_key) == {"held-out-2", "rollout-2", "held-out-0", "answers-2"}
    rollouts = table(project, "rollout@2", "rollouts.parquet")
    scores = table(project, "teacher-score@2", "scores.parquet")
    assert len(by_key["rollout-2"]["items"]) == len(rollouts) == 16
    for item in by_key["rollout-2"]["items"]:
        row, score = rollouts[item["i"]], scores[item["i"]]
        assert item["id"] == row["prompt_id"]
        assert item["ok"] == row["correct"]
        np.testing.assert_allclose(np.divide(item["s"], UNITS), row["sampler_logprobs"], atol=0.5001 / UNITS)
        np.testing.assert_allclose(
            np.divide(item["t"], UNITS), score["teacher_logprobs"], atol=0.5001 / UNITS
        )
    rows = table(project, "evaluate:student@2", "reverse_kl.parquet")
    for item in by_key["held-out-2"]["items"]:
        expected = rows[item["i"]]["reverse_kl_nats"]
        np.testing.assert_allclose(np.divide(item["d"], UNITS), expected, atol=0.5001 / UNITS)


def test_every_curve_has_the_values_of_its_metrics(project: Project, page: str) -> None:
    readouts = data_of(page, "chart-data")
    assert {
        "reverse-kl",
        "accuracy",
        "reward",
        "length",
        "truncated",
        "gradient",
        "mismatch",
        "stage-seconds",
        "speed",
    } == set(readouts)
    [[label, rounds, shown]] = readouts["length"]
    assert (label, rounds) == ("", [1, 2])
    for number, text in zip(rounds, shown, strict=True):
        lengths = [
            len(row["completion_token_ids"])
            for row in table(project, f"rollout@{number}", "rollouts.parquet")
        ]
        assert float(text) == pytest.approx(np.mean(lengths), rel=5e-3)


def test_a_chart_that_is_zero_all_along_is_left_out_and_named(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    measures, by_round = Measures(project), Measures.by_round
    assert zero_charts(measures) == []
    monkeypatch.setattr(
        Measures,
        "by_round",
        lambda self, name: {1: 0.0, 2: 0.0} if name == "rollout/truncated_fraction" else by_round(self, name),
    )
    assert "truncated" not in [chart.key for chart in charts(measures)]
    assert zero_charts(measures) == ["Truncated samples (share)"]
    assert "not drawn: Truncated samples (share)" in render(measures, [], stamp="0", commands=[])


def test_the_reward_of_a_round_has_an_interval_over_its_prompts(project: Project) -> None:
    [chart] = [chart for chart in charts(Measures(project)) if chart.key == "reward"]
    for point in chart.series[0].points:
        rows = table(project, f"rollout@{point.round}", "rollouts.parquet")
        by_prompt: dict[str, list[float]] = {}
        for row in rows:
            by_prompt.setdefault(row["prompt_id"], []).append(row["reward"])
        expected = wilson([float(np.mean(rewards)) for rewards in by_prompt.values()])
        assert (point.value, point.low, point.high) == pytest.approx(astuple(expected))


@pytest.mark.parametrize(
    ("rewards", "bounds"), [([0.5, 2.5], (-11.206, 14.206)), ([2.0, 2.0], None), ([3.0], None)]
)
def test_rewards_beyond_0_to_1_have_a_mean_with_students_t(
    rewards: list[float], bounds: tuple[float, float] | None
) -> None:
    found = _over_prompts(rewards)
    assert (found and (found.low, found.high)) == (bounds and pytest.approx(bounds, abs=1e-3))


def test_gradient_norms_are_those_of_the_optimizer_steps_of_a_round(project: Project) -> None:
    [chart] = [chart for chart in charts(Measures(project)) if chart.key == "gradient"]
    first = chart.series[0].points[0]
    path = project.store.entry(project.plan.step("train@1")).folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    values = [row["value"] for row in rows if row["name"] == "train/grad_norm"]
    assert len(values) == 4
    assert (first.round, first.low, first.high) == (1, min(values), max(values))
    assert first.value == pytest.approx(np.mean(values))


def test_tokens_of_a_stage_are_those_of_its_rows(project: Project) -> None:
    costs = {cost.name: cost for cost in Measures(project).costs()}
    sampled = sum(
        len(row["completion_token_ids"])
        for number in (1, 2)
        for row in table(project, f"rollout@{number}", "rollouts.parquet")
    )
    assert costs["rollout"].tokens == pytest.approx(sampled)
    assert costs["teacher-score"].tokens == pytest.approx(sampled)
    assert costs["rollout"].steps == 2


def test_a_paired_difference_counts_the_problems_that_one_of_the_two_got_right(project: Project) -> None:
    measures = Measures(project)
    assert measures.before is not None
    found = measures.difference(measures.teachers[0], measures.before)
    only_first, only_second = measures.flips(measures.teachers[0], measures.before) or (0, 0)
    teacher = table(project, "evaluate:teacher@0", "grades.parquet")
    student = {
        row["prompt_id"]: row["correct"] for row in table(project, "evaluate:student@0", "grades.parquet")
    }
    assert found is not None
    assert len(teacher) == 8
    assert only_first == sum(row["correct"] and not student[row["prompt_id"]] for row in teacher)
    assert found.estimate == pytest.approx((only_first - only_second) / 8)


def test_several_samples_show_pass_and_majority_with_intervals(project: Project) -> None:
    measures = Measures(project)
    more = {}
    for name, value in (("maj_at_2", 0.375), ("pass_at_16", 0.75), ("pass_at_2", 0.5)):
        more |= {name: value, f"{name}_low": 0.125, f"{name}_high": 0.875}
    measures.evaluations = [replace(one, summary={**one.summary, **more}) for one in measures.evaluations]
    shown = render(measures, [], stamp="0", commands=[])
    assert re.search(r"pass@2</th><th[^>]*>pass@16</th><th[^>]*>maj@2</th>", shown)
    assert shown.count("50.0% (12.5% to 87.5%)") == 3
    assert "pass@" not in render(Measures(project), [], stamp="0", commands=[])


def test_a_paired_difference_is_the_first_less_the_second(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    fractions = {
        "teacher": {"a": 1.0, "b": 1.0, "c": 0.0, "d": 1.0},
        "student": {"b": 1.0, "c": 1.0, "a": 0.0, "d": 0.0},
    }
    monkeypatch.setattr(Measures, "_fractions", lambda _self, one: fractions[one.model])
    measures = Measures(project)
    assert measures.before is not None
    found = measures.difference(measures.teachers[0], measures.before)
    assert found is not None
    assert found.estimate == 0.25
    assert measures.flips(measures.teachers[0], measures.before) == (2, 1)
    fractions["teacher"]["a"] = 0.5
    assert measures.flips(measures.teachers[0], measures.before) is None  # of single answers only


@settings(deadline=None)
@given(
    rows=st.lists(
        st.none()
        | st.lists(st.tuples(st.floats(width=32, allow_nan=False), st.integers(-9, 9), st.booleans())),
        max_size=6,
    )
)
def test_lists_are_read_as_they_were_written(rows: list[Any]) -> None:
    kinds = (pa.float32(), pa.int32(), pa.bool_())
    columns = [[None if row is None else [cell[at] for cell in row] for row in rows] for at in range(3)]
    schema = pa.schema([(str(at), pa.list_(kind)) for at, kind in enumerate(kinds)])
    arrays = [pa.array(column, pa.list_(kind)) for column, kind in zip(columns, kinds, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lists.parquet"
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path)
        for at, column in enumerate(columns):
            found = read_lists(path, schema, str(at))
            assert [None if values is None else values.tolist() for values in found] == column


@settings(deadline=None)
@given(masks=st.lists(st.lists(st.booleans(), min_size=1, max_size=11), min_size=1, max_size=6))
def test_each_score_has_its_own_rows_mask_and_numbers(masks: list[list[bool]]) -> None:
    rows = [
        {
            "prompt_id": str(index),
            "sample": index,
            "teacher": "t",
            "teacher_prompt_token_ids": [1],
            "teacher_logprobs": [-float(place + 100 * index) for place in range(len(mask))],
            "scorable": mask,
        }
        for index, mask in enumerate(masks)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.parquet"
        write_rows(path, rows, SCORES)
        for row, score in zip(rows, read_scores(path), strict=True):
            assert score.scorable.tolist() == row["scorable"]
            assert score.teacher_logprobs.tolist() == row["teacher_logprobs"]


# ---------------------------------------------------------------------------------------- alternatives


def test_alternatives_from_hidden_states_are_those_that_the_engine_would_keep(
    project: Project, tmp_path: Path
) -> None:
    reader = Reader(project, project.plan.steps)
    batch = reader.rollout(1)
    assert batch.states is not None
    kept = run_near(load_tiny(tmp_path, rounds=1, train__objective=TOP), tmp_path / "out")
    other = Reader(kept, kept.plan.steps).rollout(1)
    compared = 0
    for index in range(len(batch)):
        ours = batch.completion(index).tokens
        theirs = other.completion(index).tokens
        assert [token.piece for token in ours] == [token.piece for token in theirs]
        for one, two in zip(ours, theirs, strict=True):
            assert len(one.alternatives) == 5
            np.testing.assert_allclose(
                [logprob for _, logprob in one.alternatives],
                [logprob for _, logprob in two.alternatives],
                atol=1e-4,
            )
            compared += one.alternatives[0][0] == two.alternatives[0][0]
    assert compared == sum(len(values) for values in batch.columns.ids)


def test_states_that_contradict_the_stored_scores_show_nothing(project: Project) -> None:
    batch = Reader(project, project.plan.steps).rollout(1)
    assert batch.states is not None
    ids, stored = batch.columns.ids[0], batch.scores[0].teacher_logprobs
    assert batch.states.of(0, ids, stored) is not None
    stale = KeptStates(batch.states.states, batch.states.offsets, batch.states.head_VH[::-1], 1.0)
    assert stale.of(0, ids, stored) is None
    hotter = KeptStates(batch.states.states, batch.states.offsets, batch.states.head_VH, 2.0)
    assert hotter.of(0, ids, stored) is None


# ----------------------------------------------------------------------------------------- inert, and safe


def test_nothing_but_its_own_scripts_and_style_may_run_and_nothing_is_loaded(page: str) -> None:
    outline = Outline(page)
    [policy] = [
        attributes["content"]
        for tag, attributes in outline.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    rules = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in policy
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    style = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert len(script) == len(style) == 1
    for text, rule in ((script[0], rules["script-src"]), (style[0], rules["style-src"])):
        assert rule == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert not any(
        name in attributes
        for _, attributes in outline.elements
        for name in ("src", "style", "onclick", "srcset")
    )
    links = [attributes.get("href") for tag, attributes in outline.elements if tag in ("a", "link")]
    assert links == ["#main"]
    assert not re.search(
        r"@import|url\(|innerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", page
    )


@pytest.mark.parametrize("text", NASTY)
def test_text_in_markup_and_in_embedded_json_is_inert(text: str) -> None:
    shown = element("p", {"title": text}, text)
    assert [tag for tag, _ in Outline(shown).elements] == ["p"]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", shown)
    inside = embedded({"text": visible(text)})
    assert not re.search("[<>&\u2028\u2029]", inside)
    assert json.loads(inside) == {"text": visible(text)}
    visible(text).encode("utf-8")


def test_nasty_texts_make_no_element_of_the_page(project: Project, page: str) -> None:
    nasty = page_of(project, story())
    kinds = {tag for tag, _ in Outline(page).elements}
    assert {tag for tag, _ in Outline(nasty).elements} == kinds
    assert Outline(nasty).of("script")[-1] == Outline(page).of("script")[-1]
    items = [item for one in data_of(nasty, "token-data")["sets"] for item in one["items"]]
    assert {item["q"] for item in items} == {visible(text) for text in NASTY}


def test_nasty_texts_in_the_template_are_text_and_what_does_not_print_is_written_out(
    project: Project,
) -> None:
    measures, own = Measures(project), read_contender(project.run)

    def page_with(texts: Sequence[str]) -> str:
        others = [replace(own, run=text, settings={**own.settings, "student.x": text}) for text in texts]
        return render(measures, [], stamp="0", commands=texts, against=compare([own, *others]))

    page = page_with(NASTY)
    outline = Outline(page)
    plain = Outline(page_with([f"x{number}" for number in range(len(NASTY))]))
    assert [tag for tag, _ in outline.elements] == [tag for tag, _ in plain.elements]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page)
    for text in NASTY:
        for place in ("pre", "span"):  # commands, names of runs, what tells recipes apart
            assert visible(text) in "".join(outline.of(place))
    page.encode("utf-8")


def test_the_template_escapes_everything() -> None:
    templates = [one for one in files("kdpipe.report").iterdir() if one.name.endswith(".j2")]
    assert len(templates) > 2
    for one in templates:
        assert not re.search(r"\|\s*safe\b|autoescape", one.read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------- its bound


def test_the_token_view_keeps_to_its_bytes_and_takes_the_worst_of_each_kind_first(project: Project) -> None:
    batches = titled_completions(Reader(project, project.plan.steps))
    whole = token_data(batches, max_bytes=10**7)
    assert [len(one["items"]) for one in whole["sets"]] == [len(titled.completions) for titled in batches]
    for max_bytes in (6_000, 20_000):
        data = token_data(batches, max_bytes=max_bytes)
        assert len(embedded(data).encode()) <= max_bytes
        assert 0 < sum(len(one["items"]) for one in data["sets"]) < 40
        used = {place for one in data["sets"] for item in one["items"] for place in item["p"]}
        assert max(used) < len(data["pieces"])
    rollouts = next(one for one in data["sets"] if one["key"] == "rollout-2")
    batch = next(titled.completions for titled in batches if titled.key == "rollout-2")
    groups = {True: [], False: []}  # type: ignore[var-annotated]
    for index in sorted(range(len(batch)), key=batch.worst, reverse=True):
        groups[batch.rows[index].is_truncated].append(index)
    first = {item["i"] for item in rollouts["items"][:2]}
    assert first == {groups[True][0], groups[False][0]}


def test_a_page_of_very_many_completions_stays_below_its_bound(project: Project) -> None:
    many = [
        Titled(one.key + str(n), one.title, one.note, one.completions) for n in range(120) for one in story()
    ]
    text = page_of(project, many)
    assert 2_000_000 < len(text.encode()) < MAX_BYTES
    sets = data_of(text, "token-data")["sets"]
    assert any(len(one["items"]) < one["total"] for one in sets)


# --------------------------------------------------------------------------------------- what is not there


@pytest.fixture
def copied(project: Project, tmp_path: Path) -> Project:
    """A copy of the finished run."""
    shutil.copytree(project.workspace, tmp_path / "copy", symlinks=True)
    return Project(project.loaded, tmp_path / "copy", project.identities, project.plan)


def undo(project: Project, *stages: str, since: int) -> None:
    for step in project.plan.steps:
        if step.stage in stages and step.round >= since:
            (project.store.entry(step).folder / "manifest.json").unlink()


def text_of(project: Project, path: Path) -> str:
    write_report(project, path, commands=[])
    return path.read_text(encoding="utf-8")


def test_an_unfinished_run_gives_what_there_is_and_says_what_lacks(copied: Project, tmp_path: Path) -> None:
    undo(copied, "teacher-score", "train", "evaluate", since=2)
    page = text_of(copied, tmp_path / "r.html")
    assert "The run is not finished: 3 of 12 steps are not done, 1 of 2 rounds are trained; next is" in page
    keys = [one["key"] for one in data_of(page, "token-data")["sets"]]
    assert keys == ["held-out-1", "rollout-1", "held-out-0", "answers-1"]  # the newest that is scored
    assert "by round 1" in page


def test_a_run_without_evaluations_says_so(copied: Project, tmp_path: Path) -> None:
    undo(copied, "evaluate", since=0)
    page = text_of(copied, tmp_path / "r.html")
    assert "No verdict yet; 2 of 2 rounds are trained." in page
    assert "Nothing was evaluated: there is no accuracy and no held-out reverse KL." in page
    assert "On its own training samples the reverse KL went from" in page
    assert [one["key"] for one in data_of(page, "token-data")["sets"]] == ["rollout-2"]


def test_a_run_that_has_hardly_begun_has_a_report(copied: Project, tmp_path: Path) -> None:
    undo(copied, "rollout", "teacher-score", "train", "evaluate", since=0)
    page = text_of(copied, tmp_path / "r.html")
    assert "Nothing was sampled yet." in page
    assert "No teacher is evaluated yet." in page
    undo(copied, "sft", since=0)
    assert "No step is done yet." in text_of(copied, tmp_path / "r.html")


def test_headroom_says_how_the_gate_went(page: str) -> None:
    # The tiny teacher is no better than the tiny student, and the recipe lets it.
    assert "headroom +" in page
    assert re.search(
        r"on 8 problems\. It (passed the gate before round 1, which|did not pass the gate before round 1; runtime)",
        page,
    )


def test_warnings_tell_a_wide_interval_and_truncation(project: Project) -> None:
    told = " ".join(warnings(Measures(project)))
    assert "Only 8 problems were evaluated" in told
    assert re.search(r"\d% of the held-out answers were cut at the length limit", told)
    assert "not finished" not in told
    is_all = "100% of the held-out" in told or "100.0% of the held-out" in told
    assert ("raise max_new_tokens" in told) != is_all
    assert ("none holds an end token" in told) == is_all


def test_a_reverse_kl_of_tokens_that_a_cut_let_pass_is_said_to_be_so(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    measures = Measures(project)
    rounds = measures.own_reverse_kl()
    assert rounds == measures.by_round("score/reverse_kl_nats")
    monkeypatch.setattr(RolloutSection, "is_cut", True)
    assert measures.own_reverse_kl() == {}  # what a cut adds is known of none of these rounds
    assert not any("cut distribution" in text for text in warnings(measures))
    sampled = [
        {key: value for key, value in one.summary.items() if "exact" not in key}
        for one in measures.evaluations
    ]
    monkeypatch.setattr(measures, "evaluations", [Evaluation(one) for one in sampled])
    assert any("Held-out reverse KL is that of the cut distribution" in text for text in warnings(measures))


def contender(project: Project, run: str, **settings: str) -> Contender:
    found = read_contender(project.run)
    flipped = {key: 1 - value for key, value in found.values.items()}
    return replace(found, run=run, values=flipped, settings={**found.settings, **settings})


def _against(project: Project, run: str, setting: str) -> list[ComparisonRow]:
    return compare([read_contender(project.run), contender(project, run, **{"student.x": setting})])


def test_the_run_is_held_against_others_with_the_numbers_of_compare(project: Project) -> None:
    rows = _against(project, "other-00000000", "<b>")
    page = render(Measures(project), [], stamp="0", commands=[], against=rows)
    [found] = re.findall(r'<section id="against".*?</section>', page, re.DOTALL)
    assert f">{project.run.name}<" in found
    assert ">other-00000000<" in found
    assert "student.x=&lt;b&gt;" in found
    for table in tables_of(rows):
        cells = [cell.replace("-", "−") for row in table.rows for cell in row[1:]]
        assert all(f">{cell}<" in found for cell in cells)
    assert ">student before<" in found
    assert rows[-1].difference is not None
    assert 'id="against"' not in render(Measures(project), [], stamp="0", commands=[])


# ---------------------------------------------------------------------------------------------- commands


def invoke(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == code, result.output
    return result


def test_the_command_writes_where_it_is_told_or_into_the_run(project: Project, tmp_path: Path) -> None:
    place = [str(project.loaded.path), "--workspace", str(project.workspace)]
    told = json.loads(invoke("report", *place, "--json").stdout)
    assert Path(told["report"]) == report_path(project)
    assert report_path(project).stat().st_size == told["bytes"]
    target = tmp_path / "mine.html"
    assert invoke("report", *place, "-o", str(target)).stdout.startswith(str(target))
    assert target.read_bytes() == report_path(project).read_bytes()
    assert invoke("report", *place, "-o", str(tmp_path), code=2).stderr.count("is a folder") == 1
    never = [str(project.loaded.path), "--workspace", str(tmp_path / "never")]
    assert "no step is done yet" in invoke("report", *never, code=2).stderr
    assert not (tmp_path / "never").exists()


def test_the_command_writes_through_a_link_and_into_a_pipe(project: Project, tmp_path: Path) -> None:
    place = [str(project.loaded.path), "--workspace", str(project.workspace)]
    target, link, pipe = tmp_path / "page.html", tmp_path / "link.html", tmp_path / "pipe"
    link.symlink_to(target)
    invoke("report", *place, "-o", str(link))
    assert link.is_symlink()
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()), daemon=True)
    reader.start()
    invoke("report", *place, "-o", str(pipe))
    assert pipe.is_fifo()
    reader.join(timeout=20)
    assert received == [target.read_bytes()]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices, and only root could replace one")
def test_the_command_replaces_no_device(project: Project, tmp_path: Path) -> None:
    place = [str(project.loaded.path), "--workspace", str(project.workspace)]
    device = tmp_path / "null"
    os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # what /dev/null is
    invoke("report", *place, "-o", str(device))
    assert device.is_char_device()
    assert [path.name for path in tmp_path.iterdir()] == ["null"]


def test_a_damaged_table_stops_the_command_with_5_and_is_named(copied: Project) -> None:
    path = copied.store.entry(copied.plan.step("rollout@2")).folder / "rollouts.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    result = invoke("report", str(copied.loaded.path), "--workspace", str(copied.workspace), code=5)
    assert "rollouts.parquet" in result.stderr
    assert "--force rollout@2" in result.stderr
    assert not report_path(copied).with_name(".tmp-report.html").exists()


@pytest.fixture
def unwritten(copied: Project) -> Project:
    report_path(copied).unlink(missing_ok=True)
    return copied


def test_a_report_is_written_again_only_when_something_changed(unwritten: Project) -> None:
    digests = {state.step.id: state.digest for state in unwritten.survey()}
    said: list[str] = []
    renew_report(unwritten, digests, commands=[], warn=said.append)
    path = report_path(unwritten)
    assert is_current(unwritten, path, digests)
    written = path.stat().st_mtime_ns
    renew_report(unwritten, digests, commands=[], warn=said.append)
    assert path.stat().st_mtime_ns == written
    assert not is_current(unwritten, path, {**digests, "train@2": "other"})
    assert stamp(unwritten, digests) != stamp(unwritten, {**digests, "train@2": None})
    another = unwritten.recipe.model_copy(update={"seed": 2})
    evaluated_run(unwritten.workspace, "tiny-of-seed-2", another, evaluated=2)
    assert not is_current(unwritten, path, digests)
    assert said == []


def test_a_report_that_cannot_be_written_is_told_and_stops_nothing(unwritten: Project) -> None:
    said: list[str] = []
    report_path(unwritten).mkdir()
    (report_path(unwritten) / "in the way").touch()
    path = unwritten.store.entry(unwritten.plan.step("rollout@2")).folder / "rollouts.parquet"
    path.write_bytes(b"x" * path.stat().st_size)
    renew_report(unwritten, {}, commands=[], warn=said.append)
    [message] = said
    assert "the report could not be written: ArtifactError" in message
    assert "kdpipe report tries again" in message


def test_report_and_samples_import_no_model_library(project: Project, tmp_path: Path) -> None:
    script = (
        "import atexit, json, sys\n"
        "heavy = ('torch', 'transformers', 'mlflow', 'vllm', 'pandas')\n"
        "atexit.register(lambda: print(json.dumps([m for m in heavy if m in sys.modules]), file=sys.stderr))\n"
        "from kdpipe.cli.app import main\n"
        "main()\n"
    )
    place = [str(project.loaded.path), "--workspace", str(project.workspace)]
    for command in (["report", *place, "-o", str(tmp_path / "r.html")], ["samples", *place]):
        result = subprocess.run(
            [sys.executable, "-c", script, *command], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stderr.splitlines()[-1]) == []


def test_the_page_of_a_measured_project_can_be_rendered_without_batches(project: Project) -> None:
    text = render(Measures(project), [], stamp="0", commands=[])
    assert 'id="token-data"' not in text
