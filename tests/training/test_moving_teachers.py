"""Teachers that move with the student: the one that sampled, and the average of the students so far."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kdpipe.errors import Interrupted
from kdpipe.models.cache import ModelCache
from kdpipe.models.source import ModelSource
from kdpipe.pipeline.project import open_project
from kdpipe.training.local import LocalTrainer
from tests.worlds import SMALLEST, NearWorker, Watcher, load_tiny, payload_digests, run_near

DECAY = 0.75
PROMPT = "{question}\n{solution}\n{question}\n"
KINDS: dict[str, dict[str, Any]] = {
    "current": {"self": "current", "prompt": PROMPT},
    "ema": {"self": "ema", "decay": DECAY},
    "ema, bfloat16": {"self": "ema", "decay": DECAY, "dtype": "bfloat16"},
}
Weights = dict[str, torch.Tensor]


def changes(kind: str, **more: Any) -> dict[str, Any]:
    dtype = "bfloat16" if kind.endswith("bfloat16") else "float32"
    # Large steps, so that each round's student is another. An average that is the student itself in round 1 teaches it
    # nothing by q - s: k1_loss pushes all the same.
    train: dict[str, Any] = {"optimizer": {"learning_rate": 1e-2}, "minibatches": 2}
    if kind != "current":
        train["objective"] = {"kd": "k1_loss"}
    found = {"teachers": [KINDS[kind]], "student__dtype": dtype, "train": train, **more}
    return found if kind == "current" else {**found, "reproduce": True}


@pytest.fixture(
    scope="module",
    params=[
        # The average in bfloat16 has float32 masters beside it: it holds what the others do.
        pytest.param(name, marks=() if name == "ema, bfloat16" else pytest.mark.slow)
        for name in KINDS
    ],
)
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """(kind, folder of the recipe, folder of its run) of three rounds that keep all weights."""
    folder = tmp_path_factory.mktemp("moving")
    keep = {"weights": 9, "optimizer": 9}
    loaded = load_tiny(folder, **changes(request.param, runtime__keep=keep))
    return request.param, folder, run_near(loaded, folder / "out").run.path


def student_weights(run: Path, number: int) -> Weights:
    """The student after round `number`, as wide as it was trained."""
    if number == 0:
        weights = load_file(run / "round-000/sft-student/model/model.safetensors")
    else:
        entry = run / f"round-{number:03d}/train"
        masters = load_file(entry / "trainer/trainer.safetensors")
        weights = {name[7:]: value for name, value in masters.items() if name.startswith("master.")}
        weights = weights or load_file(entry / "model/model.safetensors")
    weights.pop("lm_head.weight", None)  # tied to the embeddings
    return {name: value.double() for name, value in weights.items()}


def average(run: Path, number: int) -> Weights:
    """EMA_0 = student 0, EMA_r = decay EMA_(r-1) + (1 - decay) student r, in float64."""
    if number == 0:
        return student_weights(run, 0)
    before, student = average(run, number - 1), student_weights(run, number)
    return {name: DECAY * before[name] + (1 - DECAY) * student[name] for name in before}


def teacher(run: Path, kind: str, number: int) -> Any:
    """The float64 model that scores round `number` + 1."""
    model = AutoModelForCausalLM.from_pretrained(run / "round-000/sft-student/model", dtype=torch.float64)
    weights = student_weights(run, number) if kind == "current" else average(run, number)
    for name, weight in model.named_parameters():
        weight.data.copy_(weights[name])
    return model


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def expected(model: Any, prompt: list[int], completion: list[int]) -> list[float]:
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return [float(logprobs[len(prompt) - 1 + t, token]) for t, token in enumerate(completion)]


def test_scores_are_those_of_the_student_that_sampled_or_of_the_average(
    finished: tuple[str, Path, Path],
) -> None:
    kind, _, run = finished
    tolerance = 0.1 if kind.endswith("bfloat16") else 1e-4
    moved = []
    for number in (1, 2, 3):
        model, still = teacher(run, kind, number - 1), teacher(run, kind, 0)
        rollouts = rows(run / f"round-{number:03d}/rollout/rollouts.parquet")
        scores = rows(run / f"round-{number:03d}/teacher-score/scores.parquet")
        for rollout, score in zip(rollouts, scores, strict=True):
            ids, prompt = rollout["completion_token_ids"], score["teacher_prompt_token_ids"]
            assert (prompt != rollout["prompt_token_ids"]) == (kind == "current")
            wanted = expected(model, prompt, ids)
            assert score["teacher_logprobs"] == pytest.approx(wanted, abs=tolerance)
            moved.append(max(abs(a - b) for a, b in zip(wanted, expected(still, prompt, ids), strict=True)))
    if tolerance < 0.1:
        assert max(moved) > 100 * tolerance, "a teacher that stands still would pass"


def test_held_out_reverse_kl_is_against_the_teacher_of_the_next_round(
    finished: tuple[str, Path, Path],
) -> None:
    kind, _, run = finished
    tolerance = 0.1 if kind.endswith("bfloat16") else 1e-4
    for number in (0, 1, 3):
        model = teacher(run, kind, number)
        for row in rows(run / f"round-{number:03d}/evaluate-student/reverse_kl.parquet"):
            wanted = expected(model, row["teacher_prompt_token_ids"], row["completion_token_ids"])
            assert row["teacher_logprobs"] == pytest.approx(wanted, abs=tolerance)
    summary = json.loads((run / "round-000/evaluate-teacher/summary.json").read_text())
    assert summary["model"] == "teacher"


def test_the_average_is_a_model_folder_with_masters_where_it_is_narrower(
    finished: tuple[str, Path, Path],
) -> None:
    kind, _, run = finished
    for number in (1, 2, 3):
        folder = run / f"round-{number:03d}/train/ema"
        if kind == "current":
            assert not folder.exists()
            continue
        wanted = average(run, number)
        model = AutoModelForCausalLM.from_pretrained(folder)
        is_narrow = kind.endswith("bfloat16")
        assert model.dtype == (torch.bfloat16 if is_narrow else torch.float32)
        masters = load_file(folder / "masters/trainer.safetensors") if is_narrow else {}
        assert (folder / "masters").exists() == is_narrow
        for name, weight in model.named_parameters():
            full = masters[f"master.{name}"] if is_narrow else weight
            torch.testing.assert_close(full.double(), wanted[name], atol=1e-6, rtol=0)
            assert torch.equal(full.to(weight.dtype), weight)
        manifest = json.loads((folder.parent / "manifest.json").read_text())
        assert any(file["path"] == "ema/model.safetensors" for file in manifest["files"])


def stopped(loaded: Any, workspace: Path, step: str) -> None:
    def on_event(at: str, event: dict[str, Any]) -> None:
        if (at, event.get("unit"), event.get("done")) == (step, "optimizer steps", 1):
            os.kill(os.getpid(), signal.SIGTERM)

    watcher = Watcher()
    watcher.on_event = on_event
    with pytest.raises(Interrupted, match=f"at {step}"):
        run_near(loaded, workspace, watcher=watcher)


@pytest.mark.parametrize(
    "kd", ["rkl", pytest.param({"term": "jsd", "beta": 1.0, "support": "vocabulary"}, id="jsd")]
)
def test_a_teacher_that_is_still_the_student_moves_no_weight_and_every_step_is_counted(
    tmp_path: Path, kd: Any
) -> None:
    sections: dict[str, Any] = {**SMALLEST, **changes("ema", rounds=2)}
    sections["train"] |= {"objective": {"kd": kd}}
    project = run_near(load_tiny(tmp_path, **sections), tmp_path / "out")
    assert skipped_steps(project.run.path) == {1: [1, 2], 2: [3, 4]}
    before, after = (student_weights(project.run.path, number) for number in (0, 2))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_teacher_of_its_own_has_every_step_taken(tmp_path: Path) -> None:
    project = run_near(load_tiny(tmp_path, **SMALLEST, rounds=1), tmp_path / "out")
    assert skipped_steps(project.run.path) == {1: []}


def skipped_steps(run: Path) -> dict[int, list[int]]:
    """The optimizer steps of each round that are counted as skipped."""
    found = {}
    for path in sorted(run.glob("round-*/train/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [row["optimizer_step"] for row in rows if row["name"] == "train/skipped"]
        found[int(path.parts[-3].removeprefix("round-"))] = steps
    return found


@pytest.mark.slow
def test_a_run_stopped_while_it_trains_ends_with_the_same_digests(
    finished: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, folder, _ = finished
    monkeypatch.setattr(NearWorker, "forgetful", True)
    loaded = load_tiny(tmp_path, **changes(kind, runtime__checkpoint_steps=1, rounds=2))
    stopped(loaded, tmp_path / "out", "train@1")
    stopped(loaded, tmp_path / "out", "train@2")
    run_near(loaded, tmp_path / "out")
    unbroken = payload_digests(folder / "out")
    found = payload_digests(tmp_path / "out")
    assert found == {step: unbroken[step] for step in found}
    assert "train@2" in found


@pytest.mark.slow
def test_old_averages_are_dropped_and_made_again_when_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NearWorker, "forgetful", True)
    keep = {"weights": 1, "optimizer": 1}
    loaded = load_tiny(tmp_path, **changes("ema", runtime__keep=keep))
    run_near(loaded, tmp_path / "out")
    before = payload_digests(tmp_path / "out")

    def has_average() -> list[bool]:
        run = open_project(loaded, tmp_path / "out").run.path
        return [(run / f"round-{number:03d}/train/ema").exists() for number in (1, 2, 3)]

    assert has_average() == [False, False, True]
    watcher = Watcher()
    run_near(loaded, tmp_path / "out", watcher=watcher, force=("teacher-score@3",))
    assert watcher.performed == ["train@1", "train@2", "teacher-score@3"]
    assert payload_digests(tmp_path / "out") == before


@pytest.mark.slow
def test_a_teacher_holds_no_gradient_and_no_second_copy_of_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[LocalTrainer] = []
    scored: list[tuple[Any, bool]] = []
    get, init = ModelCache.get, LocalTrainer.__init__

    def watched(cache: ModelCache, source: ModelSource) -> Any:
        model = get(cache, source)
        of_trainer = bool(trainers) and model is trainers[-1].model
        scored.append((model, of_trainer))
        assert all(weight.grad is None for weight in model.parameters())
        assert of_trainer or not any(weight.requires_grad for weight in model.parameters())
        return model

    def begun(self: LocalTrainer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        trainers.append(self)

    monkeypatch.setattr(ModelCache, "get", watched)
    monkeypatch.setattr(LocalTrainer, "__init__", begun)
    for kind in ("current", "ema", "another model"):
        trainers.clear()
        scored.clear()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        settings = {"rounds": 2} if kind == "another model" else changes(kind, rounds=2)
        run_near(load_tiny(tmp_path, **settings), tmp_path / "out")
        cold_starts = 2 if kind == "another model" else 1
        assert len(trainers) == cold_starts + 1, "of cold starts and of the student, of nothing else"
        models = {id(model) for model, _ in scored}
        # Student 0, then the one that is trained; beside them the teacher, or one average of each round.
        assert len(models) == {"current": 2, "ema": 4, "another model": 3}[kind]


def test_initial_is_the_very_model_that_the_cold_start_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    real = ModelCache.get

    def watched(cache: ModelCache, source: ModelSource) -> Any:
        if not cache.holds(source):
            opened.append(source.folder)
        return real(cache, source)

    monkeypatch.setattr(ModelCache, "get", watched)
    teachers = [{"name": "shown", "self": "initial", "prompt": PROMPT}]
    run_near(load_tiny(tmp_path, teachers=teachers, rounds=2), tmp_path / "out")
    assert opened == []
