"""The doctor: healthy worlds pass every probe, and each fault is caught by the probe that is there for it.

Faults are put where they happen (see clinic.py): into folders, or onto the wire between an engine and its caller.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import kdpipe.doctor.loss.check
import kdpipe.method.micro_batch
import kdpipe.models.batching
import kdpipe.pipeline.request
import kdpipe.pipeline.step_worker
import kdpipe.training.local
from kdpipe.cli.app import app
from kdpipe.doctor.engine import Scorer, knows_the_task, overlap, tolerance_of
from kdpipe.doctor.finding import CATCHES, FINDINGS, Measure, Outcome, found
from kdpipe.doctor.student import SHARES
from kdpipe.engines.protocol import Engine, TokenScores
from kdpipe.errors import PreflightError
from kdpipe.models.batching import pad_right
from kdpipe.models.devices import dtype_name
from kdpipe.models.reference import logprobs_of, perturb, plain_logprobs, rounding_noise
from kdpipe.models.source import ModelSource
from kdpipe.recipe.roles import STUDENT_ROLE
from tests import clinic
from tests.clinic import Findings, examined, load_world, verdicts, write_world
from tests.worlds import NearWorker, Watcher, load_tiny, run_near

NOT_ASKED = {"prompt", "own prompt", "top-k", "hidden states"}
"""Probes that an objective by sampled tokens, and a teacher that reads the student's prompt, have no use for."""
STUDENT_PROBES = {"prompt", "context", "load", "sampler", "loss", "reload"}
TEACHER_PROBES = set(CATCHES) - {"sampler", "loss", "reload"}
PRIVILEGED = "{question} {solution} {question}"
TOP5 = {"kd": {"term": "jsd", "beta": 1.0, "support": {"teacher_top_k": 5}}}
WHOLE = {"kd": {"term": "jsd", "beta": 1.0, "support": "vocabulary"}}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with clinic.one_thread():
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world that tests must not change."""
    return write_world(tmp_path_factory.mktemp("healthy"))


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the world, to be harmed."""
    shutil.copytree(folder, tmp_path / "world", ignore=shutil.ignore_patterns("out"))
    return tmp_path / "world"


def own_folder(folder: Path, tmp_path: Path) -> Path:
    """A folder for a recipe of its own, over the same models."""
    for name in ("student", "teacher", "train.jsonl", "test.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    return tmp_path


# ------------------------------------------------------------------------------------------- healthy


def assert_healthy(findings: Findings, *, teachers: tuple[str, ...], skipped: set[str]) -> None:
    assert set(verdicts(findings, about="student")) == STUDENT_PROBES
    for name in teachers:
        assert set(verdicts(findings, about=name)) == TEACHER_PROBES
        ailing = {probe: v for probe, v in verdicts(findings, about=name).items() if v != "ok"}
        assert ailing == dict.fromkeys(skipped, "skipped"), [
            findings[probe, name]["said"] for probe in ailing
        ]
    assert set(verdicts(findings, about="student").values()) == {"ok"}


BFLOAT16 = {
    "student": {"model": "./student", "dtype": "bfloat16"},
    "teachers": [{"model": "./teacher", "dtype": "bfloat16"}],
}
HEALTHY: dict[str, tuple[dict[str, Any], set[str]]] = {
    "sampled token": ({}, NOT_ASKED),
    "top-k": ({"train__objective": TOP5}, {"prompt", "own prompt", "hidden states"}),
    "whole distribution": ({"train__objective": WHOLE}, {"prompt", "own prompt", "top-k"}),
    "privileged": (
        {"teachers": [{"model": "./teacher", "dtype": "float32", "prompt": PRIVILEGED, "temperature": 0.7}]},
        {"top-k", "hidden states"},
    ),
    "self": ({"teachers": [{"self": "initial", "prompt": PRIVILEGED}]}, {"top-k", "hidden states"}),
    "average": ({"teachers": [{"self": "ema", "decay": 0.9}]}, NOT_ASKED),
    "lora": (
        {"student": {"model": "./student", "dtype": "float32", "lora": {"rank": 2, "alpha": 4}}},
        NOT_ASKED,
    ),
    "bfloat16": (BFLOAT16, NOT_ASKED),
}
QUICK = ("whole distribution", "privileged", "bfloat16")
COSTLY = pytest.mark.slow
"""Variations on what a cheaper test covers."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else COSTLY) for name in HEALTHY],
)
def test_a_healthy_world_passes_every_probe(name: str, folder: Path, tmp_path: Path) -> None:
    changes, skipped = HEALTHY[name]
    findings = examined(load_world(own_folder(folder, tmp_path), **changes))
    assert_healthy(findings, teachers=("teacher",), skipped=skipped)
    if "own prompt" not in skipped:
        assert findings["own prompt", "teacher"]["measures"][0]["value"] <= 2e-3


@COSTLY
@pytest.mark.parametrize(("student", "teacher"), [("gpt2", "gpt2"), ("untied", "tied")])
def test_other_architectures_pass_too(student: str, teacher: str, tmp_path: Path) -> None:
    findings = examined(load_world(write_world(tmp_path, student=student, teacher=teacher)))
    assert_healthy(findings, teachers=("teacher",), skipped=NOT_ASKED)


@pytest.mark.parametrize("way", ["routed", pytest.param("mixed", marks=COSTLY)])
def test_each_of_several_teachers_is_examined_on_what_it_teaches(
    way: str, folder: Path, tmp_path: Path
) -> None:
    teachers: list[dict[str, Any]] = [
        {"name": "even", "model": "./teacher", "dtype": "float32", "only": {"kind": 0}},
        {"name": "odd", "model": "./student", "dtype": "float32", "only": {"kind": 1}, "prompt": PRIVILEGED},
    ]
    if way == "mixed":
        teachers = [{k: v for k, v in one.items() if k != "only"} for one in teachers]
    findings = examined(load_world(own_folder(folder, tmp_path), teachers=teachers))
    assert_healthy(
        {k: v for k, v in findings.items() if k[1] != "odd"}, teachers=("even",), skipped=NOT_ASKED
    )
    assert_healthy(
        {k: v for k, v in findings.items() if k[1] != "even"},
        teachers=("odd",),
        skipped={"top-k", "hidden states"},
    )


def test_models_that_no_step_has_made_are_stood_in_for_and_not_blamed(tmp_path: Path) -> None:
    findings = examined(load_tiny(tmp_path))
    expected = dict.fromkeys(TEACHER_PROBES, "ok") | dict.fromkeys({*NOT_ASKED, "knows the task"}, "skipped")
    assert verdicts(findings) == expected
    assert findings["load", "teacher"]["said"] == "engine hf, untrained weights: sft:teacher@0 is not done"
    assert findings["load", "student"]["said"] == "engine hf, untrained weights: sft:student@0 is not done"
    assert not list((tmp_path / "out").rglob("*.safetensors"))


# --------------------------------------------------------------------------------- faults on the wire

WIRES: dict[str, tuple[Callable[[Engine], Engine], dict[str, Any], dict[str, str]]] = {
    "late": (
        clinic.Late,
        {},
        {
            "null test": r"each score is that of the token before: they come one position late",
            "shift": r"token 0 of 7 was changed, and the first score that moved is that of token 1: .* come late",
        },
    ),
    "early": (
        clinic.Early,
        {},
        {
            "null test": r"each score is that of the token after: they come one position early",
            "shift": r"token 3 of 7 was changed, and the first score that moved is that of token 2: .* come early",
        },
    ),
    "hot": (clinic.Hot, {}, {"null test": r"they fit temperature 1.69: the temperature is applied twice"}),
    "cold": (clinic.Cold, {}, {"null test": r"they fit temperature 1: the temperature is not applied"}),
    "drifting": (clinic.Drifting, {}, {"same twice": r"4 requests again"}),
    "crowded": (clinic.Crowded, {}, {"same twice": r"4 requests again"}),
    "deaf": (clinic.Deaf, {}, {"own weights": r"other weights, or other arithmetic"}),
    "other model": (clinic.OtherModel, {}, {"load": r"serves other-14b, not 'teacher-14b'; start it anew"}),
    "breaking": (clinic.Breaking, {}, {"null test": r"RuntimeError: CUDA error: an illegal memory access"}),
    "no top-k": (
        clinic.spoiling(clinic.without_top_k),
        {"train__objective": TOP5},
        {"top-k": r"request 0: 5 most probable ids were asked for, and none came"},
    ),
    "short top-k": (
        clinic.spoiling(clinic.short_top_k),
        {"train__objective": TOP5},
        {"top-k": r"request 0: ids of shape \[8, 4\], expected \[8, 5\]"},
    ),
    "doubled top-k": (
        clinic.spoiling(clinic.doubled_top_k),
        {"train__objective": TOP5},
        {"top-k": r"request 0: an id occurs twice among the 5 most probable ones"},
    ),
    "unsorted top-k": (
        clinic.spoiling(clinic.unsorted_top_k),
        {"train__objective": TOP5},
        {"top-k": "5 distinct ids"},
    ),
    "moved top-k": (
        clinic.spoiling(clinic.moved_top_k),
        {"train__objective": TOP5},
        {"top-k": "5 distinct ids"},
    ),
    "hidden states": (
        clinic.spoiling(clinic.rounded_hidden),
        {"train__objective": WHOLE},
        {"hidden states": "tokens through the output head"},
    ),
}


OTHERS_LIKE_IT = {
    "early",
    "cold",
    "crowded",
    "deaf",
    "other model",
    "short top-k",
    "doubled top-k",
    "moved top-k",
}
"""Faults that the default suite has the like of: the other way, another wrong list, or in a test of their own."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=COSTLY if name in OTHERS_LIKE_IT else ()) for name in WIRES],
)
def test_a_fault_on_the_wire_is_caught_by_its_probe(name: str, folder: Path, tmp_path: Path) -> None:
    wire, changes, expected = WIRES[name]
    findings = examined(load_world(own_folder(folder, tmp_path), **changes), wire)
    for probe, said in expected.items():
        finding = findings[probe, "teacher"]
        assert finding["verdict"] == "FAILED", finding
        assert re.search(said, finding["said"])
        assert finding["catches"] == CATCHES[probe]  # type: ignore[index]


def test_a_fault_of_top_k_alone_is_told_of_nothing_else(folder: Path, tmp_path: Path) -> None:
    wire = clinic.spoiling(clinic.unsorted_top_k)
    findings = examined(load_world(own_folder(folder, tmp_path), train__objective=TOP5), wire)
    assert [key for key, one in findings.items() if one["verdict"] == "FAILED"] == [("top-k", "teacher")]


@pytest.mark.parametrize(
    ("wire", "said"),
    [
        (clinic.OldHead, "part of the weights, such as the output head, stays the old one"),
        (clinic.Deaf, "after other weights are loaded the scores are still the old ones"),
    ],
)
def test_weights_that_stay_when_others_are_loaded_are_caught_by_reload(
    wire: Any, said: str, folder: Path, tmp_path: Path
) -> None:
    findings = examined(load_world(own_folder(folder, tmp_path)), wire)
    assert findings["reload", "student"]["verdict"] == "FAILED"
    assert said in findings["reload", "student"]["said"]


def test_log_probs_of_samples_at_another_temperature_are_caught_by_sampler(
    folder: Path, tmp_path: Path
) -> None:
    loaded = load_world(own_folder(folder, tmp_path))
    finding = examined(loaded, clinic.RawSamples)["sampler", "student"]
    assert finding["verdict"] == "FAILED"
    assert "importance ratios would be wrong" in finding["said"]


def cold_loss(patch: pytest.MonkeyPatch) -> None:
    """The loss alone leaves the temperature out."""
    read = kdpipe.method.micro_batch.token_logprobs
    patch.setattr(
        kdpipe.method.micro_batch, "token_logprobs", lambda *a, **k: read(*a, **{**k, "temperature": 1.0})
    )


def cold_trainer(patch: pytest.MonkeyPatch) -> None:
    """Everything that is trained or held against it leaves the temperature out."""
    cold_loss(patch)
    patch.setattr(kdpipe.training.local, "token_logprobs", kdpipe.method.micro_batch.token_logprobs)


def padded_on_the_left(patch: pytest.MonkeyPatch) -> None:
    """Sequences of a micro-batch stand where positions of the others are read."""
    patch.setattr(
        kdpipe.models.batching, "pad_right", lambda rows, device=None: pad_right(rows).flip(1).to(device)
    )


LORA = {"student": {"model": "./student", "dtype": "float32", "lora": {"rank": 2, "alpha": 4}}}
BROKEN_LOSSES: dict[str, tuple[dict[str, Any], Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "without the temperature": ({}, cold_loss, {"loss"}),
    "trainer without the temperature": ({}, cold_trainer, {"loss", "sampler", "null test"}),
    "padding": ({}, padded_on_the_left, {"loss"}),
    "lora": (LORA, cold_loss, {"loss"}),
    "lora, padding": (LORA, padded_on_the_left, {"loss"}),
    "bfloat16": (BFLOAT16, cold_loss, {"loss"}),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "without the temperature" else COSTLY) for name in BROKEN_LOSSES],
)
def test_a_loss_that_reads_other_log_probs_than_the_students_is_caught_by_loss(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, spoil, expected = BROKEN_LOSSES[name]
    # A run would not come so far: check-loss refuses such losses, and then only warns. It forgets nothing it found.
    monkeypatch.setattr(kdpipe.doctor.loss.check, "_unsound", kdpipe.doctor.loss.check._unsound.__wrapped__)
    loaded = load_world(own_folder(folder, tmp_path), reproduce=True, **changes)
    spoil(monkeypatch)
    findings = examined(loaded, depth="quick")
    failed = {probe for (probe, _), one in findings.items() if one["verdict"] == "FAILED"}
    assert failed >= expected
    assert name.endswith("padding") or failed == expected  # engines pad too
    assert "training would move another distribution" in findings["loss", "student"]["said"]


def test_an_engine_that_runs_another_folder_is_caught_by_own_weights(copied: Path) -> None:
    clinic.write_patient(copied / "other", "untied", seed=7, steps=40)
    findings = examined(load_world(copied), clinic.Swapped)
    failed = [key for key, one in findings.items() if one["verdict"] == "FAILED"]
    assert failed == [("own weights", "teacher")]


# --------------------------------------------------------------------------------- faults in the files


def test_random_weights_are_caught_by_what_they_know_of_the_task(copied: Path) -> None:
    clinic.write_patient(copied / "teacher", "untied", seed=9, steps=0)
    findings = examined(load_world(copied))
    failed = [key for key, one in findings.items() if one["verdict"] == "FAILED"]
    assert failed == [("knows the task", "teacher")]
    said = findings["knows the task", "teacher"]["said"]
    assert re.search(r"have -[234]\.\d+ nats a token, guessing has -3\.00: its weights look random", said)


@pytest.mark.parametrize(
    ("rows", "verdict", "told"),
    [
        ([[-1.0, -1.2], [-1.1], [-0.9], [-1.3]], None, "guessing has -3.00"),
        ([[-3.2, -3.4], [-3.1], [-3.3], [-3.2]], None, "its weights look random"),
        ([[-4.5, -4.0], [-1.0], [-5.0], [-2.0]], "warning", "chance alone could explain it"),
        ([[-3.5], [], [], []], "warning", "on 1 problems"),
    ],
)
def test_a_teacher_looks_random_only_where_chance_alone_could_not_explain_it(
    rows: list[list[float]], verdict: str | None, told: str
) -> None:
    scorer = SimpleNamespace(num_ids=20, logprobs=lambda _: [np.array(row) for row in rows])
    found = knows_the_task(cast(Scorer, scorer), [], None)
    assert found.verdict == verdict
    assert told in found.said
    assert found.measures[0].is_ok == ("weights" not in found.said and verdict is None)


def test_an_output_head_of_zeros_is_caught_by_not_constant(copied: Path) -> None:
    path = copied / "teacher" / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"].zero_()
    save_file(weights, path, metadata={"format": "pt"})
    findings = examined(load_world(copied))
    finding = findings["not constant", "teacher"]
    assert finding["verdict"] == "FAILED"
    assert finding["said"] == "all 32 scores are -2.996, which is -ln 20: the weights are lost"
    shift = findings["shift", "teacher"]
    assert (shift["verdict"], shift["said"].partition(":")[0]) == ("skipped", "cannot be told")


def test_another_vocabulary_is_caught_and_its_ids_are_asked_no_further(copied: Path) -> None:
    clinic.swap_words(copied / "teacher", "apples", "pens")
    findings = examined(load_world(copied))
    finding = findings["vocabulary", "teacher"]
    assert finding["verdict"] == "FAILED"
    assert "2 of 20 shared ids stand for different strings" in finding["said"]
    assert "'apples'" in finding["said"]
    assert verdicts(findings)["own weights"] == "skipped"
    assert "see vocabulary" in findings["own weights", "teacher"]["said"]


def end_otherwise(teacher: Path) -> None:
    """The teacher ends its turns with `pens`, by all that says so."""
    number = clinic.WORDS.index("pens") + 3
    for name in ("config.json", "generation_config.json"):
        clinic.rewrite(teacher / name, {"eos_token_id": number})
    clinic.rewrite(teacher / "tokenizer_config.json", {"eos_token": "pens"})


def test_another_end_of_sequence_is_caught_unless_the_recipe_knows_of_it(copied: Path) -> None:
    end_otherwise(copied / "teacher")
    finding = examined(load_world(copied), depth="quick")["end of sequence", "teacher"]
    assert finding["verdict"] == "FAILED"
    assert "student ends with 1 '<eos>'; teacher with 19 'pens'" in finding["said"]
    assert "set train.objective.end_token to alias" in finding["said"]
    for choice in ("alias", "mask"):
        loaded = load_world(copied, train__objective__end_token=choice)
        finding = examined(loaded, depth="quick")["end of sequence", "teacher"]
        assert (finding["verdict"], finding["said"].rpartition("; ")[2]) == ("ok", f"end_token is {choice}")


TURN = "{% for m in messages %}{{ m['content'] }} \n {% endfor %}"


def test_another_chat_template_is_shown_side_by_side(copied: Path) -> None:
    clinic.set_template(copied / "student", TURN)
    clinic.set_template(copied / "teacher", "Tom has " + TURN)
    task = {"kind": "jsonl", "train": "train.jsonl", "test": "test.jsonl", "instruction": ""}
    finding = examined(load_world(copied, task=task), depth="quick")["template", "teacher"]
    assert finding["verdict"] == "warning"
    assert "that differ from token" in finding["said"]
    clinic.set_template(copied / "teacher", TURN)
    finding = examined(load_world(copied, task=task), depth="quick")["template", "teacher"]
    assert finding["verdict"] == "ok"
    assert "both render the same" in finding["said"]


def test_a_prompt_of_its_own_that_cannot_be_rendered_fails(copied: Path) -> None:
    clinic.set_template(copied / "student", TURN)
    task = {"kind": "jsonl", "train": "train.jsonl", "test": "test.jsonl", "instruction": ""}
    teacher = {"model": "./teacher", "dtype": "float32", "prompt": PRIVILEGED}
    finding = examined(load_world(copied, task=task, teachers=[teacher]), depth="quick")[
        "template", "teacher"
    ]
    assert finding["verdict"] == "FAILED"
    assert "has no chat template" in finding["said"]


def test_two_beginnings_of_a_sequence_are_caught_by_special_tokens(copied: Path) -> None:
    for name in ("student", "teacher"):
        clinic.rewrite(copied / name / "tokenizer_config.json", {"bos_token": "Tom"})
        clinic.set_template(copied / name, "Tom Tom " + TURN)
    task = {"kind": "jsonl", "train": "train.jsonl", "test": "test.jsonl", "allow_special_tokens": True}
    finding = examined(load_world(copied, task=task), depth="quick")["special tokens", "teacher"]
    assert finding["verdict"] == "FAILED"
    assert "begins with two beginning-of-sequence tokens (id 16)" in finding["said"]


def test_a_beginning_that_only_one_of_the_two_writes_is_worth_a_warning(copied: Path) -> None:
    clinic.begin_with(copied / "student", "pens")
    loaded = load_world(copied, task__allow_special_tokens=True)
    finding = examined(loaded, depth="quick")["special tokens", "teacher"]
    assert finding["verdict"] == "warning"
    assert "only the student's tokenizer puts a beginning-of-sequence token before" in finding["said"]
    assert "bos 'pens' 19 and none" in finding["said"]
    clinic.begin_with(copied / "teacher", "pens")
    finding = examined(load_world(copied), depth="quick")["special tokens", "teacher"]
    assert finding["verdict"] == "ok"


def test_a_prompt_that_does_not_fit_is_caught_by_context(folder: Path, tmp_path: Path) -> None:
    loaded = load_world(own_folder(folder, tmp_path), rollout__max_new_tokens=clinic.CONTEXT - 10)
    for name in ("student", "teacher"):
        finding = examined(loaded, depth="quick")["context", name]
        assert finding["verdict"] == "FAILED"
        assert f"+ 86 new tokens in a context of {clinic.CONTEXT}" in finding["said"]
        assert "task.drop_overlong" in finding["said"]


def test_a_folder_that_does_not_open_is_a_finding_not_a_traceback(copied: Path) -> None:
    (copied / "teacher" / "model.safetensors").write_bytes(b"nothing of the kind")
    findings = examined(load_world(copied))
    assert findings["load", "teacher"]["verdict"] == "FAILED"
    assert "cannot be opened as a causal language model" in findings["load", "teacher"]["said"]
    assert verdicts(findings)["null test"] == "ok"  # the student opens, in the teacher's engine too


# -------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_sound_pass_is_within_the_limits_and_they_grow_with_the_model(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Another sound pass: the weights of a deeper and louder model in float64."""
    pair = ([3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13, 14])
    limits = []
    for spread, layers in ((0.02, 1), (0.4, 6)):
        config = LlamaConfig(
            **{**clinic._LLAMA, "initializer_range": spread, "num_hidden_layers": layers}, hidden_size=32
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().to(dtype)
        noise = rounding_noise(model, [pair], temperature=1.0, num_ids=20, dtype=dtype)
        found = logprobs_of(model, pair, temperature=1.0, num_ids=20)
        exact = logprobs_of(model.double(), pair, temperature=1.0, num_ids=20)
        limit = tolerance_of(noise, dtype_name(dtype)).largest
        assert np.abs(found - exact).max() <= limit
        limits.append(float(noise.max()))
    assert limits[1] > 5 * limits[0] > 0


def test_a_copy_for_reload_is_changed_until_scores_move_by_a_bounded_amount(
    folder: Path, tmp_path: Path
) -> None:
    source = ModelSource(folder / "teacher", "teacher", "float32")
    pair = ([3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13, 14])
    moved = []
    for share in SHARES:
        perturb(source, tmp_path / f"{share}", dtype=torch.float32, share=share)
        copy = ModelSource(tmp_path / f"{share}", "copy", "float32")
        asked: Any = {
            "temperature": 1.0,
            "num_ids": 20,
            "dtype": torch.float32,
            "device": torch.device("cpu"),
        }
        [was], [now] = plain_logprobs(source, [pair], **asked), plain_logprobs(copy, [pair], **asked)
        moved.append(float(np.abs(was - now).max()))
    assert moved == sorted(moved, reverse=True)
    assert 0.001 < moved[-1] < 0.5


def test_every_limit_is_told_with_where_it_comes_from(folder: Path, tmp_path: Path) -> None:
    findings = examined(load_world(own_folder(folder, tmp_path), train__objective=TOP5))
    measures = [measure for one in findings.values() for measure in one["measures"]]
    assert {measure["origin"] for measure in measures if "own" in measure["origin"]}
    assert not [measure for measure in measures if not measure["origin"]]


def test_the_overlap_of_two_equal_models_is_whole_and_of_others_what_their_ids_share() -> None:
    def scores(*rows: list[int]) -> TokenScores:
        return TokenScores(np.zeros(len(rows), np.float32), np.array(rows, np.int32))

    same = scores([1, 2, 3, 4], [5, 6, 7, 8])
    assert overlap([same], [same], 4).said.startswith("100% of the teacher's 4")
    other = scores([4, 3, 9, 10], [5, 6, 7, 9])
    assert overlap([same], [other], 4).said.startswith("62% of the teacher's 4")
    assert overlap([], [], 4).verdict == "skipped"


# ------------------------------------------------------------------------------------------ verdicts


def test_a_number_that_is_none_never_passes() -> None:
    for measure in (Measure("off", float("nan"), 1.0), Measure("moved", float("nan"), 1.0, must_exceed=True)):
        finding = found("null test", "teacher", lambda m=measure: Outcome("said", (m,)))  # type: ignore[misc]
        assert finding.verdict == "FAILED"
        [sent] = json.loads(json.dumps(FINDINGS.dump_python((finding,), mode="json"), allow_nan=False))
        assert sent["measures"][0]["value"] is None
        [read] = FINDINGS.validate_python([sent])
        assert (read.verdict, read.measures[0].is_ok) == ("FAILED", False)


# ------------------------------------------------------------------------------- the command, and run


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers in this process."""
    monkeypatch.setattr(kdpipe.pipeline.request, "Worker", NearWorker)
    monkeypatch.setattr(sys, "argv", ["kdpipe", "doctor", "recipe.yaml"])


def invoke(folder: Path, *args: str, code: int) -> Any:
    recipe = str(folder / "recipe.yaml")
    result = CliRunner().invoke(app, ["doctor", recipe, "--workspace", str(folder / "out"), *args])
    assert result.exit_code == code, result.output
    return result


def test_the_command_tells_every_probe_and_what_comes_next(near: None, folder: Path, tmp_path: Path) -> None:
    load_world(own_folder(folder, tmp_path))
    shown = invoke(tmp_path, code=0).stdout
    for probe in CATCHES:
        assert re.search(rf"^  {re.escape(probe)} +(ok|skipped)  ", shown, re.MULTILINE)
    assert max(map(len, shown.splitlines()[:-2])) <= 80
    assert shown.index("knows the task") < shown.index("probes: ") < shown.index("takes (")
    assert shown.splitlines()[-1].startswith(f"next  kdpipe run {tmp_path / 'recipe.yaml'}")


def test_a_model_whose_sizes_nobody_knows_leaves_the_findings_as_they_are(near: None, copied: Path) -> None:
    clinic.rewrite(copied / "teacher" / "config.json", {"model_type": "unheard-of"})
    load_world(copied)
    result = invoke(copied, code=4)
    assert re.search(r"^  load +FAILED", result.stdout, re.MULTILINE)
    assert "what it takes is unknown: " in result.stdout
    assert "load (teacher)" in result.stderr


def test_a_failing_probe_exits_with_4_and_its_name(near: None, copied: Path) -> None:
    end_otherwise(copied / "teacher")
    load_world(copied)
    result = invoke(copied, code=4)
    assert "1 probe failed: end of sequence (teacher)" in result.stderr
    shown = " ".join(result.stdout.split())
    assert f"catches {CATCHES['end of sequence']}" in shown
    document = json.loads(invoke(copied, "--json", code=4).stdout)
    assert document["failed"] == ["end of sequence (teacher)"]
    [finding] = [one for one in document["findings"] if one["verdict"] == "FAILED"]
    assert finding["probe"] == "end of sequence"


def test_a_run_stops_before_it_samples_and_goes_on_when_told_so(copied: Path) -> None:
    end_otherwise(copied / "teacher")
    watcher = Watcher()
    loaded = load_world(copied, runtime__preflight=True)
    with pytest.raises(PreflightError, match=r"preflight of round 1: end of sequence \(teacher\)") as caught:
        run_near(loaded, copied / "out", watcher=watcher)
    assert caught.value.exit_code == 4
    assert "runtime.preflight=false" in caught.value.hint
    assert watcher.performed == ["evaluate:student@0"]
    run_near(load_world(copied, runtime__preflight=False), copied / "out", watcher=watcher)
    assert watcher.performed == [
        "evaluate:student@0",
        "rollout@1",
        "teacher-score@1",
        "train@1",
        "evaluate:student@1",
    ]


def test_a_healthy_run_is_examined_once_a_command_and_told_of_warnings(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = kdpipe.pipeline.step_worker.examination

    def counted(*args: Any, **settings: Any) -> Any:
        asked.append(args[2])
        return real(*args, **settings)

    monkeypatch.setattr(kdpipe.pipeline.step_worker, "examination", counted)
    clinic.set_template(copied / "student", TURN)
    clinic.set_template(copied / "teacher", "Tom has " + TURN)
    task = {"kind": "jsonl", "train": "train.jsonl", "test": "test.jsonl", "instruction": ""}
    loaded = load_world(copied, task=task, runtime__preflight=True, rounds=2)
    watcher = Watcher()
    run_near(loaded, copied / "out", watcher=watcher, rounds=1)
    assert [warning for warning in watcher.warnings if warning.startswith("template (teacher): ")]
    run_near(loaded, copied / "out")
    run_near(loaded, copied / "out")  # nothing is left to examine
    assert asked == [1, 2]


def test_where_teachers_write_the_models_are_examined_when_all_of_them_are_there(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = kdpipe.pipeline.step_worker.examination

    def seen(*args: Any, **settings: Any) -> Any:
        asked.append(real(*args, **settings))
        return asked[-1]

    monkeypatch.setattr(kdpipe.pipeline.step_worker, "examination", seen)
    student = {"model": "./student", "dtype": "float32", "sft": {"steps": 2, "batch": 4, "text": "teacher"}}
    loaded = load_world(copied, student=student, runtime__preflight=True)
    watcher = Watcher()
    run_near(loaded, copied / "out", watcher=watcher)
    assert watcher.performed[:2] == ["rollout:teacher@0", "sft:student@0"]
    [request] = asked
    assert request.missing == {}
    assert set(request.assignment.inputs) == {STUDENT_ROLE}


def test_a_teacher_with_a_chat_template_is_told_what_it_reads_and_can_have_its_own(copied: Path) -> None:
    clinic.set_template(copied / "teacher", "apples " + TURN)
    finding = examined(load_world(copied), depth="quick")["template", "teacher"]
    assert finding["verdict"] == "warning"
    assert "its own template writes" in finding["said"]
    assert "prompt_style to chat" in finding["said"]
    teacher = {"model": "./teacher", "dtype": "float32", "prompt_style": "chat"}
    found = examined(load_world(copied, teachers=[teacher]), depth="quick")
    assert found["template", "teacher"]["verdict"] == "ok"
    assert "reads a prompt of its own" in found["template", "teacher"]["said"]
    assert found["prompt", "teacher"]["said"].startswith("4 chat prompts")
