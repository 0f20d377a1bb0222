"""Rounds in which some prompts give their reference solution: what is kept of it, and what train makes of it.

The loss on a table of logits, in float64, against formulas; then whole runs, computed again from their files.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from kdpipe.errors import Interrupted
from kdpipe.method.objective import distribution_value, shares, token_loss
from kdpipe.method.token_batch import NonFiniteError, TeacherSupport, TokenBatch
from kdpipe.recipe.file import load_recipe
from kdpipe.recipe.objective import Objective
from tests.stages.test_from_files import forward, of_tokens, write_model, write_problems
from tests.worlds import Watcher, load_tiny, payload_digests, run_near

V, LENGTHS, REFERENCES = 5, [3, 2, 2, 4], (1, 3)
N = sum(LENGTHS)
NAN = float("nan")
OF = torch.tensor([number for number, length in enumerate(LENGTHS) for _ in range(length)])
OFF = torch.isin(OF, torch.tensor(REFERENCES))
IDS = torch.arange(N) * 3 % V


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------------------- the loss

TEACHER = random(2, N, V).log_softmax(-1)


def objective(**settings: Any) -> Objective:
    return Objective.model_validate(settings)


def batch_of(settings: Objective, *, off: Tensor = OFF, **columns: Tensor) -> TokenBatch:
    """Completions of which those of `off` have nan wherever only a sampled one has a number."""
    share = shares(settings, LENGTHS, max_new_tokens=8)
    given = {
        "behaviour": random(3, N) * 0.2 - 1.5,
        "proximal": random(4, N) * 0.2 - 1.5,
        "advantage": random(5, N),
        "baseline": random(6, N),
    }
    yes = torch.ones(N, dtype=torch.bool)
    columns = {
        **{name: value.masked_fill(off, NAN) for name, value in given.items()},
        "kept": yes,
        "scorable": yes,
        "kd_open": yes,
        "share": torch.tensor(share, dtype=torch.float64)[OF],
        "teacher": TEACHER[range(N), IDS],
        "off_policy": off,
    } | columns
    return TokenBatch(**columns, lengths=LENGTHS)


def loss_of(settings: Objective, batch: TokenBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss, its gradient to the logits [N, V] of each token, and the metrics."""
    logits = random(1, N, V).requires_grad_()
    logprobs = logits.log_softmax(-1)
    distribution = None
    if settings.distribution_support is not None:
        distribution = distribution_value(
            settings,
            logprobs,
            TeacherSupport(TEACHER),
            taught_N=batch.compared(settings),
            places_N=torch.arange(N),
        )
    loss, metrics = token_loss(settings, batch, logprobs[range(N), IDS], distribution)
    return loss.detach(), torch.autograd.grad(loss, logits)[0], metrics


def student() -> tuple[Tensor, Tensor]:
    """The student's logits, and its log-probs of the sampled tokens."""
    logits = random(1, N, V).requires_grad_()
    return logits, logits.log_softmax(-1)[range(N), IDS]


JSD = {"term": "jsd", "beta": 0.3, "support": "vocabulary"}


def jsd() -> Tensor:
    S, P = random(1, N, V).softmax(-1), TEACHER.exp()
    m = 0.3 * P + 0.7 * S
    return (0.3 * P * (P / m).log() + 0.7 * S * (S / m).log()).sum(-1)


@pytest.mark.parametrize("kd", ["rkl", "k2", "k3", "k1_loss"])
def test_reference_text_has_the_gradient_of_its_cross_entropy(kd: str) -> None:
    settings = objective(kd=kd, distill_weight=0.7)
    loss, gradient, _ = loss_of(settings, batch_of(settings, off=torch.ones(N, dtype=torch.bool)))
    logits, s = student()
    wanted = -0.7 * s.sum() / N
    torch.testing.assert_close(loss, wanted.detach(), rtol=0, atol=1e-15)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, logits)[0], rtol=0, atol=1e-15)


@pytest.mark.parametrize("normalization", ["token", "sequence", "fixed"])
def test_a_mixed_step_is_the_sum_of_both_terms_over_one_denominator(normalization: Any) -> None:
    settings = objective(
        kind="kdrl", kd="k2", rl_weight=1.5, distill_weight=0.4, normalization=normalization, clip_high=9.0
    )
    batch = batch_of(settings)
    loss, gradient, _ = loss_of(settings, batch)
    logits, s = student()
    # Cut to the sampled tokens first: nan times 0 is nan, in gradients, too.
    own = (~OFF).nonzero().squeeze(-1)
    b, p, q, A = (x[own] for x in (batch.behaviour, batch.proximal, TEACHER[range(N), IDS], batch.advantage))
    u, w = (s[own] - p).exp(), (s[own] - b).exp().detach()
    rl = torch.maximum(-A * u, -A * u.clamp(0.8, 10.0)) * (p - b).exp()
    length = torch.tensor(LENGTHS, dtype=torch.float64)[OF]
    share = {"token": length / length / N, "sequence": 1 / (4 * length), "fixed": length / length / 32}
    weight = share[normalization]
    wanted = (weight[own] * (1.5 * rl + 0.4 * w * (s[own] - q) ** 2 / 2)).sum()
    wanted = wanted - 0.4 * (weight * s)[OFF].sum()
    torch.testing.assert_close(loss, wanted.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, logits)[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["kd", "kdrl"])
def test_a_distribution_term_takes_reference_text_as_its_own_unless_another_is_named(kind: str) -> None:
    settings = objective(kind=kind, kd=JSD, distill_weight=0.4, rl_weight=0.0)
    loss, _, metrics = loss_of(settings, batch_of(settings))
    torch.testing.assert_close(loss, 0.4 * jsd().mean(), rtol=0, atol=1e-15)
    torch.testing.assert_close(metrics["kd_loss"], jsd()[~OFF].sum(), rtol=0, atol=1e-14)
    torch.testing.assert_close(metrics["off_policy_loss"], jsd()[OFF].sum(), rtol=0, atol=1e-14)
    named = settings.model_copy(update={"off_policy_term": "cross_entropy"})
    loss, _, _ = loss_of(named, batch_of(named))
    s = student()[1].detach()
    torch.testing.assert_close(loss, 0.4 * (jsd()[~OFF].sum() - s[OFF].sum()) / N, rtol=0, atol=1e-15)


def test_where_the_teacher_lacks_the_id_the_divergence_is_not_read_and_the_cross_entropy_is() -> None:
    scorable = torch.ones(N, dtype=torch.bool)
    scorable[4] = False
    assert bool(OFF[4])
    for term, changes in (("kd", True), ("cross_entropy", False)):
        settings = objective(kd=JSD, off_policy_term=term)
        gradient = loss_of(settings, batch_of(settings, scorable=scorable))[1]
        assert bool((gradient[4] == 0).all()) is changes


def test_a_kd_mask_and_the_srpo_signal_do_not_touch_reference_text() -> None:
    closed = torch.zeros(N, dtype=torch.bool)
    for settings in (
        objective(kind="kdrl", mask="wrong", kd=JSD, rl_weight=0.0, off_policy_term="cross_entropy"),
        objective(kind="srpo"),
    ):
        logits, s = student()
        wanted = torch.autograd.grad(-s.sum() / N, logits)[0]
        for is_open in (closed, ~closed):
            gradient = loss_of(settings, batch_of(settings, kd_open=is_open))[1]
            torch.testing.assert_close(gradient[OFF], wanted[OFF], rtol=0, atol=1e-15)


def test_at_a_weight_of_0_reference_text_is_not_trained_on_and_counts_all_the_same() -> None:
    settings = objective(kind="kdrl", distill_weight=0.0, clip_high=9.0)
    batch = batch_of(settings)
    loss, gradient, metrics = loss_of(settings, batch)
    assert (gradient[OFF] == 0).all()
    assert (gradient[~OFF] != 0).any()
    assert int(metrics["kept_tokens"]) == N
    torch.testing.assert_close(loss, metrics["rl_loss"] / N, rtol=0, atol=1e-14)
    unread = student()[1].detach().masked_fill(OFF, NAN)
    torch.testing.assert_close(token_loss(settings, batch, unread)[0], loss, rtol=0, atol=1e-14)


@pytest.mark.parametrize("term", ["kd", "cross_entropy"])
def test_a_number_of_reference_text_that_is_not_finite_is_told_with_its_place(term: str) -> None:
    settings = objective(kd=JSD, off_policy_term=term)
    values, s = jsd(), student()[1].detach()
    values[4] = s[4] = NAN
    with pytest.raises(NonFiniteError) as caught:
        token_loss(settings, batch_of(settings), s, values)
    assert caught.value.index == 4


# ------------------------------------------------------------------------------------------ whole runs

PROMPTS, SAMPLES, SAMPLED, T = 12, 3, 5, 1.3
OBJECTIVES: dict[str, dict[str, Any]] = {
    "jsd": {"kd": {"term": "jsd", "beta": 1.0, "support": "vocabulary"}, "distill_weight": 0.7},
    "top5": {
        "kd": {"term": "jsd", "beta": 1.0, "support": {"teacher_top_k": 5}},
        "off_policy_term": "cross_entropy",
        "normalization": "sequence",
    },
    "joint": {
        "kind": "kdrl",
        "kd": {"term": "rkl", "baseline": "step"},
        "distill_weight": 0.25,
        "batch_normalization": True,
    },
}


def recipe(folder: Path, settings: dict[str, Any], **changes: Any) -> Any:
    if not (folder / "student").exists():
        write_model(folder / "student", hidden=16, layers=1, seed=1)
        write_model(folder / "teacher", hidden=24, layers=2, seed=2)
        write_problems(folder / "train.jsonl", 40)
        write_problems(folder / "test.jsonl", 2)
    files = {"train": "train.jsonl", "test": "test.jsonl", "prompt": "plain", "instruction": ""}
    given: dict[str, Any] = {
        "rounds": 2,
        "task": {"kind": "jsonl", **files},
        "student": {"model": "./student", "dtype": "float32"},
        "teachers": [{"model": "./teacher", "dtype": "float32"}],
        "rollout": {"prompts": PROMPTS, "samples": SAMPLES, "max_new_tokens": 2, "temperature": T},
        "rollout__on_policy_fraction": 0.4,  # 4.8 prompts
        "train": {"objective": settings, "optimizer": {"learning_rate": 2e-3}, "minibatches": 2},
        "evaluate": {"reverse_kl_problems": 0, "teacher": False, "every": 2},
        "runtime__part_rows": 9,
        "runtime__train_tokens": 400,  # an optimizer step is several micro-batches
    }
    return load_tiny(folder, **{**given, **changes})


@dataclass(frozen=True)
class Files:
    """A finished run, as an outsider sees it."""

    folder: Path
    objective: str

    def path(self, number: int) -> Path:
        [run] = (self.folder / "out" / "runs").iterdir()
        return run / f"round-{number:03d}"

    def frame(self, number: int, name: str) -> pd.DataFrame:
        return pd.read_parquet(self.path(number) / name)

    def rollouts(self, number: int) -> pd.DataFrame:
        return self.frame(number, "rollout/rollouts.parquet")

    def metrics(self, number: int, stage: str, step: int | None = None) -> dict[str, float]:
        lines = (self.path(number) / stage / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return {row["name"]: row["value"] for row in rows if row["optimizer_step"] == step}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name == "jsd" else pytest.mark.slow) for name in OBJECTIVES],
)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp(request.param)
    run_near(recipe(folder, OBJECTIVES[request.param]), folder / "out")
    return Files(folder, request.param)


def test_each_prompt_is_sampled_for_or_gives_its_reference(files: Files) -> None:
    tokenizer = AutoTokenizer.from_pretrained(files.folder / "student")
    lines = (files.folder / "train.jsonl").read_text().splitlines()
    problems = {f"jsonl/train/{row}": json.loads(line) for row, line in enumerate(lines)}
    sampled = []
    for number in (1, 2):
        rollouts = files.rollouts(number)
        own, given = (rollouts[rollouts.source == source] for source in ("student", "reference"))
        assert (own.prompt_id.nunique(), given.prompt_id.nunique()) == (SAMPLED, PROMPTS - SAMPLED)
        assert not {*own.prompt_id} & {*given.prompt_id}
        assert (len(own), len(given)) == (SAMPLED * SAMPLES, PROMPTS - SAMPLED)
        assert own.sampler_logprobs.notna().all()
        assert given.sampler_logprobs.isna().all()
        for row in given.itertuples():
            problem = problems[row.prompt_id]
            solution = tokenizer.encode(problem["answer"], add_special_tokens=False)
            assert list(row.completion_token_ids) == [*solution, tokenizer.eos_token_id]
            assert len(row.completion_token_ids) > 2, "longer than what may be sampled, and whole"
            assert tokenizer.decode(row.prompt_token_ids) == problem["question"] + "\n"
            assert (row.sample, row.finish_reason, row.text) == (0, "stop", problem["answer"])
            assert row.correct
        sampled.append({*own.prompt_id})
    assert sampled[0] != sampled[1]


def test_the_metrics_of_sampling_are_about_the_students_own_samples(files: Files) -> None:
    for number in (1, 2):
        rollouts, found = files.rollouts(number), files.metrics(number, "rollout")
        own = rollouts[rollouts.source == "student"]
        assert found["rollout/on_policy_fraction"] == pytest.approx(SAMPLED / PROMPTS)
        assert found["rollout/reward_mean"] == pytest.approx(own.reward.mean())
        assert found["rollout/truncated_fraction"] == pytest.approx((own.finish_reason == "length").mean())
        assert found["rollout/completion_tokens_mean"] == pytest.approx(
            own.completion_token_ids.map(len).mean()
        )
        scores = files.frame(number, "teacher-score/scores.parquet")
        assert len(scores) == len(rollouts)
        pairs = own.merge(scores, on=["prompt_id", "sample"], validate="one_to_one")
        differences = np.concatenate([r.sampler_logprobs - r.teacher_logprobs for r in pairs.itertuples()])
        reverse_kl = files.metrics(number, "teacher-score")["score/reverse_kl_nats"]
        assert reverse_kl == pytest.approx(differences.mean(), abs=1e-5)
        assert files.metrics(number, "train")["train/mismatch_nats_max"] < 1e-4


def test_the_loss_of_a_first_optimizer_step_follows_from_the_files(files: Files) -> None:
    settings = OBJECTIVES[files.objective]
    for number in (1, 2):
        completions = files.frame(number, "train/completions.parquet")
        rollouts = files.rollouts(number)
        rollouts["own_advantage"] = advantages(rollouts) if files.objective == "joint" else 0.0
        rollouts.loc[rollouts.source != "student", "own_advantage"] = np.nan
        step = completions.optimizer_step.min()
        joined = completions[completions.optimizer_step == step].merge(rollouts, on=["prompt_id", "sample"])
        joined = joined.merge(files.frame(number, "teacher-score/scores.parquet"), on=["prompt_id", "sample"])
        np.testing.assert_allclose(joined.advantage.astype(float), joined.own_advantage, atol=1e-5)
        assert {*joined.source} == {"student", "reference"}
        losses, given = [], []
        rows = list(joined.itertuples())
        for row in rows:
            losses.append(token_losses(files, number, row, [other for other in rows if other is not row]))
            if row.source == "reference":
                given.append(losses[-1])
        weight = settings.get("distill_weight", 1.0)
        expected = np.concatenate(losses).mean()
        if settings.get("normalization") == "sequence":
            expected = np.mean([values.mean() for values in losses])
        found = files.metrics(number, "train", int(step))
        assert found["train/loss"] == pytest.approx(expected, abs=1e-4, rel=1e-4)
        assert found["train/off_policy_loss"] == pytest.approx(
            np.concatenate(given).mean() / weight, abs=1e-4
        )
        assert found["train/tokens"] == sum(map(len, losses))


def token_losses(files: Files, number: int, row: Any, others: Sequence[Any]) -> np.ndarray:
    """The loss of each token, before the first update, where s = p."""
    settings = OBJECTIVES[files.objective]
    weight = settings.get("distill_weight", 1.0)
    folder = files.folder / "student" if number == 1 else files.path(number - 1) / "train" / "model"
    student = forward(folder)(row.prompt_token_ids, row.completion_token_ids)
    teacher = forward(files.folder / "teacher")(row.prompt_token_ids, row.completion_token_ids)
    s, q = of_tokens(student, row.completion_token_ids), of_tokens(teacher, row.completion_token_ids)
    if row.source == "reference" and files.objective != "jsd":
        return -weight * s
    if files.objective == "jsd":
        return weight * (np.exp(student) * (student - teacher)).sum(-1)
    if files.objective == "top5":
        best = np.argsort(-teacher)[:, :5]
        S, P = (
            np.column_stack([kept := np.take_along_axis(np.exp(log), best, 1), 1 - kept.sum(1)])
            for log in (student, teacher)
        )
        return (S * np.log(S / P)).sum(1)
    own = [other for other in others if other.source == "student"]
    signals = np.concatenate([other.teacher_logprobs - other.proximal_logprobs for other in own])
    ratio = np.exp(s - np.asarray(row.sampler_logprobs, float))
    return -row.own_advantage * ratio - weight * ratio * ((q - s) - signals.mean()) * s


def advantages(rollouts: pd.DataFrame) -> pd.Series:
    """GRPO by hand, of the student's own samples alone: groups, then all completions."""
    own = rollouts[rollouts.source == "student"]
    groups = own.reward.astype(float).groupby(own.prompt_id)
    values = (own.reward - groups.transform("mean")) / (groups.transform("std") + 1e-5)
    return (values - values.mean()) / (values.std() + 1e-5)


def test_what_is_sampled_for_a_prompt_does_not_depend_on_what_others_give(
    files: Files, tmp_path: Path
) -> None:
    changes = {"rollout__on_policy_fraction": 1.0, "rounds": 1, "evaluate__every": 1}
    settings = {name: value for name, value in OBJECTIVES["top5"].items() if name != "off_policy_term"}
    run_near(recipe(tmp_path, settings, **changes), tmp_path / "out")
    every = Files(tmp_path, "top5").rollouts(1)
    assert {*every.source} == {"student"}
    mixed = files.rollouts(1)
    pairs = mixed[mixed.source == "student"].merge(every, on=["prompt_id", "sample"], validate="one_to_one")
    assert len(pairs) == SAMPLED * SAMPLES
    for row in pairs.itertuples():
        assert list(row.completion_token_ids_x) == list(row.completion_token_ids_y)


def test_a_round_of_reference_text_alone_is_trained_on(tmp_path: Path) -> None:
    settings = {"kd": "rkl", "distill_weight": 1.0}
    loaded = recipe(tmp_path, settings, rollout__on_policy_fraction=0.0, runtime__part_rows=4)
    run_near(loaded, tmp_path / "out")
    run = Files(tmp_path, "")
    assert {*run.rollouts(1).source} == {"reference"}
    sampling = {name: value for name, value in run.metrics(1, "rollout").items() if "rollout/" in name}
    assert sampling == {"rollout/on_policy_fraction": 0.0}
    found = [run.metrics(1 + step // 2, "train", step + 1) for step in range(4)]
    assert all(metrics["train/loss"] == pytest.approx(metrics["train/off_policy_loss"]) for metrics in found)
    assert found[2]["train/loss"] + found[3]["train/loss"] < found[0]["train/loss"] + found[1]["train/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["jsd", "joint"])
def test_a_run_stopped_in_the_middle_ends_with_the_same_digests(tmp_path: Path, way: str) -> None:
    folders = tmp_path / "unbroken", tmp_path / "stopped"
    for folder in folders:
        folder.mkdir()
    settings = {"runtime__part_rows": 6, "runtime__checkpoint_steps": 1}
    loaded, other = (recipe(folder, OBJECTIVES[way], **settings) for folder in folders)
    run_near(loaded, folders[0] / "out")
    for step, unit in (("rollout@2", "completions"), ("train@2", "optimizer steps")):
        stop_in(other, folders[1] / "out", step, unit)
    run_near(other, folders[1] / "out")
    assert payload_digests(folders[1] / "out") == payload_digests(folders[0] / "out")


def stop_in(loaded: Any, workspace: Path, step: str, unit: str) -> None:
    """Runs until something of a step is done, and there asks it to stop."""

    def on_event(at: str, event: dict[str, Any]) -> None:
        if (at, event.get("unit")) == (step, unit) and 0 < event.get("done", 0) < event["total"]:
            os.kill(os.getpid(), signal.SIGTERM)

    watcher = Watcher()
    watcher.on_event = on_event
    with pytest.raises(Interrupted, match=f"at {step}"):
        run_near(loaded, workspace, watcher=watcher)


def test_a_round_has_as_many_rows_as_its_recipe_says(files: Files) -> None:
    loaded = load_recipe(files.folder / "recipe.yaml")
    assert loaded.recipe.rollout.rows == len(files.rollouts(1)) == len(files.rollouts(2))
