"""Several teachers, routed and mixed, computed again from the files of a run alone, in float64."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import kdpipe.pipeline.request
import kdpipe.stages.sft
from kdpipe.cli.app import app
from kdpipe.data.rows import Problem, Rollout
from kdpipe.data.tables import Scores
from kdpipe.errors import ArtifactError, Interrupted, PreflightError
from kdpipe.method.mixture import TeacherScores, join_scores
from kdpipe.models.cache import ModelCache
from kdpipe.models.prompting import Text
from kdpipe.models.source import ModelSource
from kdpipe.pipeline import requirements
from kdpipe.recipe.file import LoadedRecipe, load_recipe
from kdpipe.stages.job import Job
from kdpipe.stages.settings.stage import TrainSettings
from kdpipe.stages.train import train
from tests.stages.test_from_files import NUM_IDS, write_model
from tests.worlds import NearWorker, Watcher, load_tiny, payload_digests, run_near

T_STUDENT = 1.3
T_FIRST = 0.8
PROMPT = "{question} {hint} {question}"
ROUTED: list[dict[str, Any]] = [
    {"name": "first", "model": "./first", "prompt": PROMPT, "temperature": T_FIRST, "only": {"kind": 0}},
    {"name": "second", "model": "./second", "only": {"kind": [1, "2"]}},
]
MIXED: list[dict[str, Any]] = [
    {"name": "second", "model": "./second"},
    {"name": "first", "model": "./first", "prompt": PROMPT, "temperature": T_FIRST, "weight": 3.0},
]
OBJECTIVES: dict[str, Any] = {
    "token": {"kd": "k2", "distill_weight": 0.7},
    "top5": {"kd": {"term": "skew_kl", "alpha": 0.3, "support": {"teacher_top_k": 5}}},
    "vocabulary": {"kd": {"term": "jsd", "beta": 1.0, "support": "vocabulary"}},
}
ALWAYS = {"routed-token", "mixed-vocabulary"}
"""Each way once; the other pairs are slow."""
CASES = [
    name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow)
    for name in (f"{way}-{objective}" for way in ("routed", "mixed") for objective in OBJECTIVES)
]
LogProbs = Callable[[Any, Any], np.ndarray]


def recipe(folder: Path, way: str, objective: Mapping[str, Any], **changes: Any) -> LoadedRecipe:
    """Two teachers of different widths; a problem's `kind` is 0, 1 or 2, its hint is its number in words."""
    if not (folder / "student").exists():
        for name, hidden, seed in (("student", 16, 1), ("first", 24, 2), ("second", 20, 3)):
            write_model(folder / name, hidden=hidden, layers=1, seed=seed)
        for split, count in (("train", 24), ("test", 6)):
            rows = [
                {
                    "question": "Tom has" + " 7 + Tom" * ((number * 5) % 7) + f" {number}",
                    "answer": f"#### {number % 4}",
                    "kind": number % 3,
                    "hint": " ".join(f"{number:03d}"),
                }
                for number in range(count)
            ]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train": "train.jsonl", "test": "test.jsonl", "prompt": "plain", "instruction": ""}
    settings: dict[str, Any] = {
        "rounds": 1,
        "task": {"kind": "jsonl", **files},
        "student": {"model": "./student", "dtype": "float32"},
        "teachers": [{**teacher, "dtype": "float32"} for teacher in (ROUTED if way == "routed" else MIXED)],
        "rollout": {"prompts": 12, "samples": 2, "max_new_tokens": 8, "temperature": T_STUDENT},
        "train": {"objective": dict(objective), "optimizer": {"learning_rate": 2e-3}, "minibatches": 2},
        "evaluate": {"reverse_kl_problems": 6},
        "runtime__train_tokens": 300,  # an optimizer step is several micro-batches
        "runtime__part_rows": 8,
    }
    return load_tiny(folder, **{**settings, **changes})


@dataclass(frozen=True)
class Run:
    """A finished run, as an outsider sees it."""

    folder: Path
    way: str
    objective: str

    @property
    def path(self) -> Path:
        [path] = (self.folder / "out" / "runs").iterdir()
        return path

    def frame(self, name: str) -> pd.DataFrame:
        return pd.read_parquet(self.path / name)

    def metrics(self, name: str) -> dict[str, float]:
        rows = [json.loads(line) for line in (self.path / name / "metrics.jsonl").read_text().splitlines()]
        return {row["name"]: row["value"] for row in rows if row["optimizer_step"] in (None, 1)}

    def models(self) -> dict[str, LogProbs]:
        return models_of(self.folder)

    def teacher(self, models: Mapping[str, LogProbs], row: Any, number: int) -> tuple[np.ndarray, str]:
        """log-probs [n, V] of the problem's own teacher or the mixture, and whose they are."""
        hint, tokenizer = " ".join(f"{number:03d}"), tokenizer_of(self.folder)
        question = tokenizer.decode(row.prompt_token_ids).removesuffix("\n")
        shown = tokenizer.encode(f"{question} {hint} {question}\n", add_special_tokens=False)
        first = models["first"](shown, row.completion_token_ids)
        second = models["second"](row.prompt_token_ids, row.completion_token_ids)
        if self.way == "routed":
            return (first, "first") if number % 3 == 0 else (second, "second")
        return np.log(0.75 * np.exp(first) + 0.25 * np.exp(second)), "both"


@functools.cache
def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "student")


@functools.cache
def models_of(folder: Path) -> dict[str, LogProbs]:
    temperatures = {"student": T_STUDENT, "first": T_FIRST, "second": T_STUDENT}
    return {name: forward(folder / name, value) for name, value in temperatures.items()}


def forward(folder: Path, temperature: float) -> LogProbs:
    """(prompt, completion) -> log-probs [n, NUM_IDS], one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    @functools.cache  # one test after another asks for the same
    def of_ids(prompt: tuple[int, ...], completion: tuple[int, ...]) -> np.ndarray:
        ids = [*prompt, *completion]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        rows = logits[len(prompt) - 1 : len(ids) - 1, :NUM_IDS] / temperature
        found = rows.log_softmax(-1).numpy()
        found.flags.writeable = False
        return found

    return lambda prompt, completion: of_ids((*map(int, prompt),), (*map(int, completion),))


def of_tokens(logprobs: np.ndarray, completion: Any) -> np.ndarray:
    return logprobs[np.arange(len(completion)), np.asarray(completion, int)]


def number_of(prompt_id: str) -> int:
    return int(prompt_id.rpartition("/")[2])


@pytest.fixture(scope="module", params=CASES)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    way, _, objective = request.param.partition("-")
    folder = tmp_path_factory.mktemp(request.param)
    run_near(recipe(folder, way, OBJECTIVES[objective]), folder / "out")
    return Run(folder, way, objective)


# ------------------------------------------------------------------------------------------ from files alone


def test_each_teacher_scores_its_rows_after_its_own_prompt(files: Run) -> None:
    models, rollouts = files.models(), files.frame("round-001/rollout/rollouts.parquet")
    seen: list[str] = []
    for name in ("first", "second"):
        scores = files.frame(f"round-001/teacher-score-{name}/scores.parquet")
        assert (scores.teacher == name).all()
        pairs = scores.merge(rollouts, on=["prompt_id", "sample"], validate="one_to_one")
        assert len(pairs) == len(scores) > 0
        for row in pairs.itertuples():
            number = number_of(row.prompt_id)
            full = models[name](row.teacher_prompt_token_ids, row.completion_token_ids)
            np.testing.assert_allclose(
                row.teacher_logprobs, of_tokens(full, row.completion_token_ids), atol=1e-4, rtol=0
            )
            if files.way == "routed":
                assert (number % 3 == 0) == (name == "first")
            own_prompt = list(row.teacher_prompt_token_ids) != list(row.prompt_token_ids)
            assert own_prompt == (name == "first")
        seen += [f"{row.prompt_id}/{row.sample}" for row in pairs.itertuples()]
    assert len(seen) == len(rollouts) * (1 if files.way == "routed" else 2)
    assert len(set(seen)) == len(rollouts)


def test_the_loss_of_the_first_optimizer_step_follows_from_the_files(files: Run) -> None:
    models, rollouts = files.models(), files.frame("round-001/rollout/rollouts.parquet")
    completions = files.frame("round-001/train/completions.parquet")
    joined = completions[completions.optimizer_step == 1].merge(rollouts, on=["prompt_id", "sample"])
    assert len(joined) == 12
    losses, whose = [], set()
    for row in joined.itertuples():
        student = models["student"](row.prompt_token_ids, row.completion_token_ids)
        teacher, name = files.teacher(models, row, number_of(row.prompt_id))
        whose.add(name)
        losses.append(token_losses(files.objective, row, student, teacher))
    assert whose == ({"first", "second"} if files.way == "routed" else {"both"})
    expected = np.concatenate(losses).mean()
    found = files.metrics("round-001/train")["train/loss"]
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-4)
    assert abs(expected) > 1e-2, "a loss of nothing would prove nothing"


def token_losses(objective: str, row: Any, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    if objective == "token":
        s, q = of_tokens(student, row.completion_token_ids), of_tokens(teacher, row.completion_token_ids)
        return 0.7 * np.exp(s - np.asarray(row.sampler_logprobs, float)) * 0.5 * (s - q) ** 2
    if objective == "vocabulary":
        return (np.exp(student) * (student - teacher)).sum(1)
    values = []
    for t in range(len(teacher)):
        top = np.argsort(-teacher[t])[:5]
        P, S = (
            np.exp([*side[t, top], np.log(np.exp(np.delete(side[t], top)).sum())])
            for side in (teacher, student)
        )
        values.append((P * np.log(P / (0.3 * P + 0.7 * S))).sum())
    return np.array(values)


def test_held_out_reverse_kl_is_against_each_problems_own_teachers(files: Run) -> None:
    models, values = files.models(), []
    for row in files.frame("round-000/evaluate-student/reverse_kl.parquet").itertuples():
        teacher, name = files.teacher(models, row, number_of(row.prompt_id))
        assert list(row.teachers) == [name] or (name == "both" and set(row.teachers) == {"first", "second"})
        for one, prompt in zip(row.teachers, row.teachers_prompt_token_ids, strict=True):
            assert (list(prompt) != list(row.prompt_token_ids)) == (one == "first")
        student = models["student"](row.prompt_token_ids, row.completion_token_ids)
        values.append((np.exp(student) * (student - teacher)).sum(-1))
        np.testing.assert_allclose(row.reverse_kl_nats, values[-1], atol=1e-4)
        np.testing.assert_allclose(
            row.teacher_logprobs, of_tokens(teacher, row.completion_token_ids), atol=1e-4, rtol=0
        )
    summary = json.loads((files.path / "round-000/evaluate-student/summary.json").read_text())
    assert summary["reverse_kl_exact_nats"] == pytest.approx(np.concatenate(values).mean(), abs=1e-4)


def test_metrics_are_of_each_teacher_and_of_all(files: Run) -> None:
    models, rollouts = files.models(), files.frame("round-001/rollout/rollouts.parquet")
    totals = []
    for row in rollouts.itertuples():
        teacher, _ = files.teacher(models, row, number_of(row.prompt_id))
        totals.append(row.sampler_logprobs - of_tokens(teacher, row.completion_token_ids))
    trained = files.metrics("round-001/train")
    assert trained["score/reverse_kl_nats"] == pytest.approx(np.concatenate(totals).mean(), abs=1e-4)
    assert trained["score/unscorable_tokens"] == 0
    for name in ("first", "second"):
        scores = files.frame(f"round-001/teacher-score-{name}/scores.parquet").merge(rollouts)
        own = np.concatenate([row.sampler_logprobs - row.teacher_logprobs for row in scores.itertuples()])
        metrics = files.metrics(f"round-001/teacher-score-{name}")
        assert metrics[f"score/{name}/reverse_kl_nats"] == pytest.approx(own.mean(), abs=1e-4)
        assert metrics[f"score/{name}/unscorable_tokens"] == 0
        assert metrics[f"time/teacher_score/{name}_seconds"] > 0


def test_each_teacher_is_evaluated_on_what_it_teaches(files: Run) -> None:
    for name in ("first", "second"):
        grades = files.frame(f"round-000/evaluate-{name}/grades.parquet")
        numbers = {number_of(prompt_id) for prompt_id in grades.prompt_id}
        wanted = {n for n in range(6) if files.way == "mixed" or (n % 3 == 0) == (name == "first")}
        assert numbers == wanted
        summary = json.loads((files.path / f"round-000/evaluate-{name}/summary.json").read_text())
        assert (summary["problems"], summary["model"]) == (len(wanted), name)
        assert "accuracy_change" in summary


def test_the_commands_know_of_every_teacher(files: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    place = ["recipe.yaml", "--workspace", "out"]
    monkeypatch.chdir(files.folder)
    monkeypatch.setattr(kdpipe.pipeline.request, "Worker", NearWorker)

    def said(command: str, *more: str) -> str:
        result = CliRunner().invoke(app, [command, *place, *more])
        assert result.exit_code == 0, result.output
        return result.stdout

    plan = said("plan")
    for name in ("first", "second"):
        assert re.search(rf"teacher-score:{name}@1 +done", plan)
        assert re.search(rf"evaluate:{name}@0 +done", plan)
        assert re.search(rf"^{name} +\d", said("run"), re.MULTILINE)
    whose = "its teacher" if files.way == "routed" else "each teacher"
    kept = {"token": "the sampled token", "top5": "5 ids", "vocabulary": "its hidden state"}[files.objective]
    if files.way == "mixed" and files.objective == "top5":
        kept = "its hidden state"
    assert f"kept of {whose} for each token: {kept}" in plan
    total = files.metrics("round-001/train")["score/reverse_kl_nats"]
    assert f"reverse KL {total:6.3f}" in said("status")
    assert "rollout@1: 3 of 24 completions" in said("samples", "--limit", "3")
    assert said("verify", "--full")


# --------------------------------------------------------------------------------------- stopping and the gate


def stop_at(loaded: LoadedRecipe, workspace: Path, step: str, unit: str, done: int) -> None:
    """Runs until that much of a step is done, and there asks it to stop."""

    def on_event(at: str, event: dict[str, Any]) -> None:
        if (at, event.get("unit"), event.get("done")) == (step, unit, done):
            os.kill(os.getpid(), signal.SIGTERM)

    watcher = Watcher()
    watcher.on_event = on_event
    with pytest.raises(Interrupted, match=f"at {step}"):
        run_near(loaded, workspace, watcher=watcher)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["routed", "mixed"])
def test_a_run_stopped_in_the_middle_ends_with_the_same_digests(tmp_path: Path, way: str) -> None:
    settings = {"runtime__part_rows": 2, "runtime__checkpoint_steps": 1}
    folders = tmp_path / "unbroken", tmp_path / "stopped"
    for folder in folders:
        folder.mkdir()
    run_near(recipe(folders[0], way, OBJECTIVES["vocabulary"], **settings), folders[0] / "out")
    loaded = recipe(folders[1], way, OBJECTIVES["vocabulary"], **settings)
    stop_at(loaded, folders[1] / "out", "teacher-score:second@1", "completions", 2)
    stop_at(loaded, folders[1] / "out", "train@1", "optimizer steps", 1)
    run_near(loaded, folders[1] / "out")
    assert payload_digests(folders[1] / "out") == payload_digests(folders[0] / "out")


def test_a_round_in_which_a_teacher_has_nothing_to_score_is_trained_by_the_others(tmp_path: Path) -> None:
    settings = {"rollout": {"prompts": 1, "samples": 2, "max_new_tokens": 4}, "train__minibatches": 1}
    loaded = recipe(tmp_path, "routed", OBJECTIVES["vocabulary"], rounds=2, **settings)
    project = run_near(loaded, tmp_path / "out")
    counts = [
        len(pd.read_parquet(path)) for path in project.run.path.glob("round-*/teacher-score-*/scores.parquet")
    ]
    assert sorted(counts) == [0, 0, 2, 2]


@pytest.mark.parametrize("way", ["routed", "mixed"])
def test_every_teacher_has_to_be_better_than_the_student(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = requirements.headrooms
    bounds = {"first": 0.1, "second": 0.0}
    monkeypatch.setattr(
        requirements,
        "headrooms",
        lambda project: [replace(one, high=bounds[one.teacher]) for one in known(project)],
    )
    loaded = recipe(tmp_path, way, OBJECTIVES["token"], runtime__allow_weak_teacher=False)
    with pytest.raises(PreflightError, match="teacher 'second' is not better than the student") as caught:
        run_near(loaded, tmp_path / "out")
    assert ("on the 4 problems that it teaches" in caught.value.message) == (way == "routed")


def test_routes_are_checked_before_anything_is_done(tmp_path: Path) -> None:
    wrong = [{**ROUTED[0], "dtype": "float32"}, {**ROUTED[1], "only": {"kind": 1}}]
    with pytest.raises(Exception, match="8 of 24 train problems match no teacher") as caught:
        run_near(recipe(tmp_path, "routed", OBJECTIVES["token"], teachers=wrong), tmp_path / "out")
    assert "jsonl/train/2 (kind: 2), jsonl/train/5 (kind: 2), jsonl/train/8 (kind: 2), ..." in str(
        caught.value
    )
    assert not list((tmp_path / "out").glob("store/*/*/manifest.json"))


# --------------------------------------------------------------------------------------------- joining


def rollout(prompt_id: str) -> Rollout:
    values = {
        "question": "",
        "expected": "",
        "text": "",
        "answer_strict": None,
        "answer_flexible": None,
        "answer": None,
    }
    return Rollout(
        prompt_id=prompt_id,
        sample=0,
        prompt_token_ids=[1],
        completion_token_ids=[2, 3],
        sampler_logprobs=[-1.0, -2.0],
        source="student",
        finish_reason="length",
        correct=False,
        reward=0.0,
        **values,  # type: ignore[arg-type]
    )


def scored(
    teacher: str, *prompt_ids: str, scorable: tuple[bool, bool] = (True, True), top: int = 0
) -> TeacherScores:
    rows = [
        Scores(
            prompt_id,
            0,
            teacher,
            [1],
            np.array([-1.0, -3.0], np.float32),
            np.array(scorable),
            np.full((2, top), 5, np.int32),
            np.zeros((2, top), np.float32),
            np.zeros(2, np.float32),
        )
        for prompt_id in prompt_ids
    ]
    return TeacherScores(teacher, rows)


@pytest.mark.parametrize(
    ("teachers", "is_mixed", "message"),
    [
        ([scored("a", "p", "q"), scored("b", "q")], False, "q, sample 0 is scored by a, b, expected one"),
        ([scored("a", "p"), scored("b")], False, "q, sample 0 is scored by no teacher, expected one"),
        ([scored("a", "p", "q", "p")], False, "p, sample 0 occurs twice in the scores of 'a'"),
        ([scored("a", "p", "q", "x")], False, "x, sample 0 is not among its rollouts in the scores of 'a'"),
        ([scored("a", "p", "q"), scored("b", "p")], True, "q, sample 0 is scored by a, expected all 2"),
    ],
)
def test_scores_that_are_missing_or_doubled_are_a_damaged_artifact(
    teachers: list[TeacherScores], is_mixed: bool, message: str
) -> None:
    weights = {"a": 0.5, "b": 0.5} if is_mixed else None
    with pytest.raises(ArtifactError) as caught:
        join_scores([rollout("p"), rollout("q")], teachers, weights=weights, round_number=3)
    assert message in caught.value.message
    assert "round 3" in caught.value.message
    assert caught.value.exit_code == 5


def test_rows_are_joined_by_their_keys_in_whatever_order_they_stand() -> None:
    joined = join_scores(
        [rollout("p"), rollout("q")], [scored("a", "q"), scored("b", "p")], weights=None, round_number=1
    )
    assert [row.teacher for row in joined.rows] == ["b", "a"]


def test_a_token_of_a_mixture_is_scorable_where_all_teachers_have_it() -> None:
    teachers = [scored("a", "p", scorable=(True, False)), scored("b", "p")]
    joined = join_scores([rollout("p")], teachers, weights={"a": 0.25, "b": 0.75}, round_number=1)
    [row] = joined.rows
    assert row.scorable.tolist() == [True, False]
    assert row.teacher_logprobs == pytest.approx([-1.0, 0.0])


def test_supports_of_routed_teachers_are_made_equally_wide() -> None:
    teachers = [scored("a", "p", top=2), scored("b", "q", top=3)]
    joined = join_scores([rollout("p"), rollout("q")], teachers, weights=None, round_number=1)
    found = [(row.topk_ids.tolist(), row.topk_logprobs.tolist()) for row in joined.rows]  # type: ignore[union-attr]
    assert found[0] == ([[5, 5, -1]] * 2, [[0.0, 0.0, -np.inf]] * 2)
    assert found[1] == ([[5, 5, 5]] * 2, [[0.0, 0.0, 0.0]] * 2)


# ---------------------------------------------------------------------------------------------- memory


def test_of_several_teachers_one_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe(tmp_path, "mixed", OBJECTIVES["token"])
    held: list[set[str]] = []
    get = ModelCache.get

    def watched(cache: ModelCache, source: ModelSource) -> Any:
        model = get(cache, source)
        held.append({digest for digest, _ in cache._models} & cache._turns)
        if source.digest in cache._turns:
            assert not any(weight.requires_grad or weight.grad is not None for weight in model.parameters())
        return model

    monkeypatch.setattr(ModelCache, "get", watched)
    run_near(recipe(tmp_path, "mixed", OBJECTIVES["token"]), tmp_path / "out")
    assert len(set().union(*held)) == 2
    assert max(map(len, held)) == 1


def test_the_tables_of_single_teachers_are_as_they_were(tmp_path: Path) -> None:
    one = [{"name": "first", "model": "./first", "dtype": "float32"}]
    project = run_near(recipe(tmp_path, "mixed", OBJECTIVES["token"], teachers=one), tmp_path / "out")
    names = pq.read_schema(project.run.path / "round-000/evaluate-student/reverse_kl.parquet").names
    assert "teacher_prompt_token_ids" in names
    assert "teachers" not in names
    assert (project.run.path / "round-001/teacher-score/scores.parquet").exists()


def test_a_mixture_of_which_too_much_is_not_scorable_stops_before_it_trains(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, "mixed", OBJECTIVES["token"])
    teachers = [scored("a", "p", scorable=(True, False)), scored("b", "p")]
    weights = {"a": 0.5, "b": 0.5}
    scores = join_scores([rollout("p")], teachers, weights=weights, round_number=1)
    nothing = cast("Any", None)
    job = Job(loaded.recipe.runtime, 1, 1, [], [], nothing, nothing)
    context = SimpleNamespace(rollouts=lambda: [rollout("p")], scores=lambda *_: scores)
    with pytest.raises(
        PreflightError, match="a teacher of the mixture lacks the ids of 1 of 2 sampled tokens"
    ):
        train(TrainSettings.of(loaded.recipe, 1), job, cast("Any", context))


def test_the_cold_start_of_a_specialist_reads_only_what_it_teaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[Any]] = []
    real = kdpipe.stages.sft._examples

    def watched(text: Text, problems: Sequence[Problem], written: Any) -> Any:
        read.append([problem.fields["operation"] for problem in problems])
        return real(text, problems, written)

    monkeypatch.setattr(kdpipe.stages.sft, "_examples", watched)
    scratch = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    specialist = {"scratch": scratch, "sft": {"steps": 1, "batch": 4}, "dtype": "float32"}
    teachers = [
        {**specialist, "name": "adds", "only": {"operation": "addition"}},
        {**specialist, "name": "takes", "only": {"operation": "subtraction"}},
    ]
    plain = json.loads(
        json.dumps(teachers)
    )  # YAML would write what is shared as aliases, which recipes may not hold
    run_near(load_tiny(tmp_path, teachers=plain), tmp_path / "out", rounds=0)
    everything, adds, takes = read
    assert set(everything) == {"addition", "subtraction"}
    assert (set(adds), set(takes)) == ({"addition"}, {"subtraction"})
    assert len(adds) + len(takes) == len(everything)


@pytest.mark.slow
def test_the_study_of_specialists_runs_with_less_of_everything(tmp_path: Path) -> None:
    sets = ["student.sft.steps=4", "teachers.0.sft.steps=6", "teachers.1.sft.steps=6", "rounds=1"]
    sets += ["rollout.prompts=8", "evaluate.problems=12", "evaluate.reverse_kl_problems=4"]
    sets += ["task.train_problems=64", "task.test_problems=16", "evaluate.samples=1", "evaluate.every=1"]
    sets += ["runtime.device=cpu", "runtime.allow_weak_teacher=true"]
    study = Path(__file__).parents[2] / "benchmarks" / "specialists.yaml"
    project = run_near(load_recipe(study, tuple(sets)), tmp_path / "out")
    taught = [len(pd.read_parquet(path)) for path in project.run.path.glob("round-001/*/scores.parquet")]
    assert (len(taught), sum(taught)) == (2, 8)
    summary = json.loads((project.run.path / "round-001/evaluate-student/summary.json").read_text())
    assert summary["reverse_kl_exact_nats"] > 0
