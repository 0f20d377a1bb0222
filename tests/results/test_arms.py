"""Control arms: whose scores a shuffled teacher gives, by enumeration; what arms share; their table from real runs."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import kdpipe.pipeline.request
from kdpipe.cli.app import app
from kdpipe.cli.comparison_table import markdown_lines
from kdpipe.data.rows import Rollout
from kdpipe.data.tables import Scores
from kdpipe.errors import RecipeError, StepError
from kdpipe.method import statistics
from kdpipe.method.interval import Interval
from kdpipe.method.mixture import RoundScores, TeacherScores, donors_of, shuffled
from kdpipe.method.objective import shares, token_loss
from kdpipe.method.token_batch import TokenBatch
from kdpipe.pipeline.plan import run_hash
from kdpipe.pipeline.project import Project, open_project
from kdpipe.recipe.file import load_recipe
from kdpipe.recipe.objective import Objective
from kdpipe.results.contender import Contender
from kdpipe.results.studies import (
    ARMS,
    ArmName,
    arm_rows,
    arm_runs,
    forecast,
    make_study,
    obstacle,
    parse_arms,
    possible_arms,
)
from kdpipe.results.table import comparison_json
from kdpipe.stages.train import CONSTANT_ADVANTAGE
from kdpipe.store.stage import Stage
from tests.tiny_models import FLOAT32_NATS
from tests.worlds import NearWorker, SilentMirror, load_tiny, tiny_recipe, write_recipe

FEW = {"rounds": 1, "rollout__prompts": 4, "rollout__samples": 2, "train__minibatches": 2}


# ------------------------------------------------------------------------------------------ shuffled scores


def rollout(prompt: str, sample: int, length: int) -> Rollout:
    ids, logprobs = list(range(length)), [-1.0] * length
    return Rollout(
        prompt,
        sample,
        "",
        "",
        [1],
        ids,
        logprobs,
        "student",
        "stop",
        "",
        None,
        None,
        None,
        correct=False,
        reward=0,
    )


def scores(row: Rollout, number: int) -> Scores:
    """Scores in which every value says whose it is and where it stood: 100 * completion + position."""
    tags = 100 * number + np.arange(len(row.completion_token_ids))
    return Scores(
        row.prompt_id,
        row.sample,
        "teacher",
        [1],
        -tags.astype(np.float32),
        tags % 2 == 0,
        np.stack([tags, tags], -1).astype(np.int32),
        -np.stack([tags, tags], -1).astype(np.float32),
        -tags.astype(np.float32),
    )


def test_position_t_takes_all_that_position_t_wrapped_of_another_prompts_completion_has() -> None:
    """Every way to give 1 to 3 tokens to two samples of two prompts and one of a third."""
    for lengths in itertools.product((1, 2, 3), repeat=5):
        keys = [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0)]
        rows = [rollout(*key, length) for key, length in zip(keys, lengths, strict=True)]
        own = [scores(row, number) for number, row in enumerate(rows)]
        found = shuffled(RoundScores(own, [], [], None), rows, seed=3, round_number=2)
        for row, mine, taken in zip(rows, own, found.rows, strict=True):
            assert (taken.prompt_id, taken.sample) == (mine.prompt_id, mine.sample)
            tags = -taken.teacher_logprobs
            donor = int(tags[0]) // 100
            assert rows[donor].prompt_id != row.prompt_id
            wanted = [100 * donor + t % lengths[donor] for t in range(len(row.completion_token_ids))]
            assert tags.tolist() == wanted
            assert taken.scorable.tolist() == [tag % 2 == 0 for tag in wanted]
            assert taken.topk_ids is not None
            assert taken.topk_logprobs is not None
            assert taken.tail_logprobs is not None
            assert taken.topk_ids.tolist() == [[tag, tag] for tag in wanted]
            assert taken.topk_logprobs.tolist() == [[-tag, -tag] for tag in wanted]
            assert taken.tail_logprobs.tolist() == [-tag for tag in wanted]


def test_donors_depend_on_seed_and_round_and_not_on_the_order_of_the_rows() -> None:
    prompts = [f"p{number}" for number in range(12)]

    def givers(names: list[str], **draw: int) -> dict[str, str]:
        found = donors_of(names, [2] * len(names), **{"seed": 1, "round_number": 1, **draw})
        return {name: names[donor.number] for name, donor in zip(names, found, strict=True)}

    assert givers(prompts) == givers(prompts[::-1]) == givers(prompts)
    assert givers(prompts) != givers(prompts, seed=2)
    assert givers(prompts) != givers(prompts, round_number=2)
    assert sorted(givers(prompts).values()) == sorted(prompts)  # each prompt gives once


def test_an_empty_completion_gives_no_scores_and_takes_none() -> None:
    found = donors_of(["a", "b", "c"], [2, 0, 1], seed=1, round_number=1)
    assert (found[0].number, found[2].number) == (2, 0)
    assert len(found[1].positions) == 0
    with pytest.raises(StepError, match="no prompt but a has a completion with tokens"):
        donors_of(["a", "b"], [2, 0], seed=1, round_number=1)


class States:
    """The hidden states of a scored round, as the file gives them: each holds its row and position."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def rows(self, indices: list[int]) -> torch.Tensor:
        return torch.tensor([[row, t] for row in indices for t in range(self.lengths[row])]).reshape(-1, 2)


def test_hidden_states_are_taken_from_the_same_donors_and_positions() -> None:
    lengths = [2, 3, 1, 4]
    rows = [rollout(name, 0, length) for name, length in zip("abcd", lengths, strict=True)]
    place = {0: 3, 1: 2, 2: 1, 3: 0}  # where the rows stand in the teacher's table
    hidden: Any = type("Hidden", (), {"file": States(lengths[::-1]), "head": None, "temperature": 0.5})
    own = [scores(row, number) for number, row in enumerate(rows)]
    given = RoundScores(own, [TeacherScores("teacher", [], hidden)], [place], None)
    found = shuffled(given, rows, seed=1, round_number=1)
    distribution: Any = found.distribution([2, 0, 3], top_k=7, device=torch.device("cpu"))
    tags = np.concatenate([-found.rows[number].teacher_logprobs for number in (2, 0, 3)])
    wanted = [[place[int(tag) // 100], int(tag) % 100] for tag in tags]
    assert distribution.hidden_NG.tolist() == wanted
    assert (distribution.temperature, distribution.top_k) == (0.5, 7)


def test_shuffled_sampled_token_scores_make_the_student_less_sure_in_expectation() -> None:
    """q no longer depends on the token, so E[(s - q) grad s] = E[s grad s], the gradient of minus the entropy."""
    logits = torch.tensor([0.7, -0.3, 0.1, 1.2], dtype=torch.float64, requires_grad=True)
    student = logits.log_softmax(-1)
    probabilities = student.exp()
    donated = [-0.4, -2.0, -1.1]  # what another prompt's tokens may have got, whatever is sampled here
    total = torch.zeros((), dtype=torch.float64)
    for token, q in itertools.product(range(4), donated):
        column = torch.ones(1, dtype=torch.float64)
        s = student[token : token + 1]
        batch = TokenBatch(
            behaviour=s.detach(),
            proximal=s.detach(),
            advantage=0 * column,
            kept=column.bool(),
            scorable=column.bool(),
            kd_open=column.bool(),
            share=column * probabilities[token].detach() / len(donated),
            lengths=[1],
            teacher=q * column,
        )
        total = total + token_loss(Objective.model_validate({"kind": "kd", "kd": "rkl"}), batch, s)[0]
    [found] = torch.autograd.grad(total, [logits], retain_graph=True)
    [wanted] = torch.autograd.grad((probabilities * student).sum(), [logits])
    assert found.tolist() == pytest.approx(wanted.tolist(), abs=1e-12)
    assert max(map(abs, wanted.tolist())) > 0.01


# --------------------------------------------------------------------------------------- constant advantage

END = 2  # of three ids
WORLD = [(END,), *((first, second) for first in (0, 1) for second in (0, 1, END))]  # at most two tokens


def expected_gradient(objective: Objective, sampler: torch.Tensor | None = None) -> torch.Tensor:
    """Of the constant advantage over all completions [prefixes, ids]; a row is the whole optimizer step."""
    logits_PV = torch.tensor([[0.7, -0.3, 0.1], [-1.0, 0.4, 0.2], [0.3, 0.9, -0.6]], dtype=torch.float64)
    student_PV = logits_PV.requires_grad_().log_softmax(-1)
    sampler_PV = student_PV.detach() if sampler is None else sampler.log_softmax(-1)
    total = student_PV.new_zeros(())
    for completion in WORLD:
        prefixes = torch.tensor([0, 1 + completion[0]][: len(completion)])
        s, b = (table[prefixes, torch.tensor(completion)] for table in (student_PV, sampler_PV))
        ones, [share] = torch.ones_like(b), shares(objective, [len(s)], max_new_tokens=2)
        batch = TokenBatch(
            behaviour=b,
            proximal=b,
            advantage=0 * ones,
            kept=ones.bool(),
            scorable=ones.bool(),
            kd_open=ones.bool(),
            share=share * ones,
            lengths=[len(s)],
            teacher=-3 * torch.rand(len(s), dtype=torch.float64),  # whatever it says
            signal=CONSTANT_ADVANTAGE * ones,
        )
        total = total + b.sum().exp() * token_loss(objective, batch, s)[0]
    [found] = torch.autograd.grad(total, [logits_PV])
    return found


def test_a_constant_advantage_has_no_expected_gradient_by_a_fixed_length_on_policy_and_off() -> None:
    objective = Objective.model_validate({"kind": "kd", "kd": "rkl", "normalization": "fixed"})
    other = torch.tensor([[0.0, 1.0, 0.5], [0.3, 0.1, -1.0], [-0.2, 0.0, 0.8]], dtype=torch.float64)
    assert float(expected_gradient(objective).abs().max()) < 1e-15
    assert float(expected_gradient(objective, other).abs().max()) < 1e-15
    cut = {"term": "rkl", "ratio": {"control": "truncate", "cap": 1.0}}
    biased = objective.model_validate({"kind": "kd", "kd": cut, "normalization": "fixed"})
    assert float(expected_gradient(biased, other).abs().max()) > 0.01  # a cut ratio leaves one


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_a_constant_advantage_by_the_tokens_of_a_step_makes_completions_longer(normalization: str) -> None:
    """The expected gradient is that of E[1 / tokens], which is descended."""
    logits_PV = torch.tensor([[0.7, -0.3, 0.1], [-1.0, 0.4, 0.2], [0.3, 0.9, -0.6]], dtype=torch.float64)
    ends = logits_PV.requires_grad_().softmax(-1)[0, END]
    [wanted] = torch.autograd.grad(ends * 1 + (1 - ends) / 2, [logits_PV])
    objective = Objective.model_validate({"kind": "kd", "kd": "rkl", "normalization": normalization})
    torch.testing.assert_close(expected_gradient(objective), wanted, atol=1e-14, rtol=0)
    assert float(wanted[0, END]) > 0.05


def test_a_constant_advantage_is_a_signal_even_where_teacher_and_student_agree() -> None:
    s = torch.tensor([-0.5, -1.5])
    ones = torch.ones(2)
    batch = TokenBatch(
        behaviour=s,
        proximal=s,
        advantage=0 * ones,
        kept=ones.bool(),
        scorable=ones.bool(),
        kd_open=ones.bool(),
        share=ones,
        lengths=[2],
        teacher=s,
        signal=CONSTANT_ADVANTAGE * ones,
    )
    student = s.clone().requires_grad_()
    loss, metrics = token_loss(Objective(), batch, student)
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert student.grad.tolist() == pytest.approx([1.0, 1.0])  # each sampled token is made less probable
    assert (int(metrics["signal_tokens"]), int(metrics["rounding_tokens"])) == (2, 0)


# ------------------------------------------------------------------------------------------------- planning


def projects(folder: Path, **changes: Any) -> dict[tuple[str, int], Project]:
    path = write_recipe(folder, **{**FEW, **changes})
    runs = arm_runs(load_recipe(path), ARMS, seeds=2)
    return {
        (run.arm, run.seed): open_project(load_recipe(path, run.overrides), folder / "out") for run in runs
    }


def prints(project: Project) -> dict[str, str]:
    return {step.id: step.fingerprint for step in project.plan.steps}


def test_arms_of_a_seed_share_student_0_teacher_and_the_first_rollouts_and_seeds_share_the_teacher(
    tmp_path: Path,
) -> None:
    found = {key: prints(project) for key, project in projects(tmp_path).items()}
    assert len({json.dumps(steps, sort_keys=True) for steps in found.values()}) == 12
    for seed in (1, 2):
        for step in ("sft:student@0", "rollout@1"):
            assert len({found[arm, seed][step] for arm in ARMS}) == 1
        taught = [arm for arm in ARMS if arm != "self-teacher"]
        for step in ("sft:teacher@0", "evaluate:student@0", "evaluate:teacher@0"):
            assert len({found[arm, seed][step] for arm in taught}) == 1
        scored = {found[arm, seed]["teacher-score@1"] for arm in ("kd", "kdrl", "shuffled-teacher")}
        assert len(scored) == 1
        assert "teacher-score@1" not in found["rl", seed]
        assert len({found[arm, seed]["train@1"] for arm in ARMS}) == 6
    assert found["kd", 1]["sft:teacher@0"] == found["kd", 2]["sft:teacher@0"]
    assert found["kd", 1]["sft:student@0"] != found["kd", 2]["sft:student@0"]


def test_the_arm_that_the_recipe_is_has_the_steps_of_the_recipes_own_run(tmp_path: Path) -> None:
    plain = open_project(load_recipe(write_recipe(tmp_path, **FEW)), tmp_path / "out")
    assert prints(projects(tmp_path)["kd", 1]) == prints(plain)


def test_a_recipe_without_a_control_is_named_as_if_there_were_none() -> None:
    """The hash of the document as it was before the field; with a control it is another one."""
    import hashlib

    from kdpipe.recipe.schema import Recipe, resolved
    from kdpipe.store.step import canonical

    recipe = Recipe.model_validate(tiny_recipe())
    document: Any = {
        name: value
        for name, value in resolved(recipe).items()
        if name not in ("rounds", "runtime", "tracking")
    }
    del document["train"]["control"]
    assert run_hash(recipe) == hashlib.sha256(canonical(document)).hexdigest()[:8]
    other = Recipe.model_validate(tiny_recipe(train__control="shuffled_teacher"))
    assert run_hash(other) != run_hash(recipe)


def test_the_forecast_counts_each_shared_step_once(tmp_path: Path) -> None:
    found = list(projects(tmp_path).values())
    needs = forecast(found, rounds=None)
    distinct = {f"{step.stage}/{step.fingerprint}" for project in found for step in project.plan.steps}
    assert sum(one.todo - one.shared for one in needs) == len(distinct)
    assert [one.steps for one in needs] == [len(project.plan.steps) for project in found]


GROUPS = ("rollout.samples=4",)
HALF = (*GROUPS, "rollout.on_policy_fraction=0.5")
JSD = "train.objective.kd={term: jsd, beta: 1.0, support: vocabulary}"
SEVERAL = 'teachers=[{name: a, self: initial, prompt: "{question}a"}, {name: b, self: initial, prompt: "{question}b"}]'


LEFT_OUT = [
    ((), {"rl": "rollout.samples is 1", "kdrl": "rollout.samples is 1"}),
    ((*GROUPS, "train.objective={kind: kdrl, distill_schedule: {kind: linear, end: 0.0}}"), {}),
    ((*GROUPS, JSD, "teacher_score.keep=hidden", "train.control=shuffled_teacher"), {}),
    (HALF, {"rl": "on_policy_fraction is 0.5"}),
    (
        (*HALF, "train.objective.kd=jsd"),
        {"rl": "on_policy_fraction is 0.5", "constant-advantage": "compared with the teacher's distribution"},
    ),
    ((*GROUPS, SEVERAL), {"shuffled-teacher": "a single teacher"}),
    (
        (*GROUPS, "teachers=[{self: current}]", "train.control=self_teacher"),
        dict.fromkeys(("kd", "rl", "kdrl", "shuffled-teacher", "constant-advantage"), "very student"),
    ),
]
MORE_LEFT_OUT = [
    (
        (
            *GROUPS,
            "train.objective={kind: srpo, distill_weight: 0, distill_schedule: {kind: cosine, end: 1}}",
        ),
        {},
    ),
    ((*GROUPS, "train.objective={kind: then, kd_rounds: 1, kd: {term: rkl, baseline: group}}"), {}),
    (
        (*GROUPS, "train.objective={kind: kdrl, mask: wrong, kd: k3, rl_weight: 0}"),
        {"rl": "rl_weight is 0", "kdrl": "rl_weight is 0"},
    ),
    (
        (*GROUPS, "train.objective={kind: grpo, distill_weight: 0}"),
        {arm: "distill_weight is 0" for arm in ARMS if arm != "rl"},
    ),
    ((*GROUPS, "rollout.prompts=1", "train.minibatches=1"), {"shuffled-teacher": "rollout.prompts is 1"}),
    (
        (*HALF, "rollout.off_policy_text=teacher", "train.objective.off_policy_term=cross_entropy"),
        {"rl": "on_policy_fraction is 0.5", "self-teacher": "writes text"},
    ),
    (
        (*GROUPS, "rollout.on_policy_fraction=0"),
        {
            "rl": "on_policy_fraction is 0",
            "kdrl": "on_policy_fraction 0",
            "constant-advantage": "samples nothing",
        },
    ),
    ((*GROUPS, "student.sft={steps: 2, text: teacher}"), {"self-teacher": "writes text"}),
    (
        (
            *GROUPS,
            "train.objective.kd={term: jsd, support: {teacher_top_k: 3}}",
            "teacher_score.logprobs=float16",
        ),
        {},
    ),
]


@pytest.mark.parametrize(
    ("overrides", "left_out"),
    [*LEFT_OUT, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_LEFT_OUT)],
)
def test_arms_that_a_recipe_cannot_have_are_named_with_what_to_set(
    tmp_path: Path, overrides: tuple[str, ...], left_out: dict[str, str]
) -> None:
    loaded = load_tiny(tmp_path, *overrides, rollout__samples=1, rollout__prompts=8)
    possible, errors = possible_arms(loaded)
    named = {error.message.removeprefix("arm ").partition(":")[0]: error for error in errors}
    assert set(named) == set(left_out)
    assert possible == tuple(arm for arm in ARMS if arm not in left_out)
    for arm, error in named.items():
        assert left_out[arm] in error.message
        with pytest.raises(RecipeError, match=f"arm {arm}: ") as caught:
            arm_runs(loaded, parse_arms(arm), seeds=1)
        assert "leave the arm out of --arms" in caught.value.hint
        sets = re.findall(r"--set (\S+=\S+)", error.hint)
        helped = load_recipe(loaded.path, (*overrides, *sets))
        assert not sets or obstacle(helped, parse_arms(arm)[0]) is None, "what it says to set does not help"


def test_arms_without_rl_keep_the_larger_weight_of_a_schedule_with_a_zero(tmp_path: Path) -> None:
    def objectives(*overrides: str) -> list[tuple[str, float, float | None]]:
        loaded = load_tiny(tmp_path, *overrides, rollout__samples=4)
        runs = arm_runs(loaded, ("kd", "kdrl", "constant-advantage"), seeds=1)
        found = [
            load_recipe(loaded.path, (*overrides, *run.overrides)).recipe.train.objective for run in runs
        ]
        return [(one.kind, one.distill_weight, one.distill_schedule.end) for one in found]

    down = "train.objective={kind: kdrl, distill_weight: 0.5, distill_schedule: {kind: linear, end: 0}}"
    assert objectives(down) == [("kd", 0.5, None), ("kdrl", 0.5, 0.0), ("kd", 0.5, None)]
    up = "train.objective={kind: kdrl, distill_weight: 0, distill_schedule: {kind: linear, end: 0.25}}"
    assert objectives(up) == [("kd", 0.25, None), ("kdrl", 0.0, 0.25), ("kd", 0.25, None)]
    between = "train.objective={kind: kdrl, distill_weight: 0.5, distill_schedule: {kind: linear, end: 0.1}}"
    assert objectives(between) == [("kd", 0.5, 0.1), ("kdrl", 0.5, 0.1), ("kd", 0.5, 0.1)]


def test_a_constant_takes_the_place_of_a_sampled_term_with_the_recipes_own_ratios(tmp_path: Path) -> None:
    def term(kd: str) -> Any:
        loaded = load_tiny(tmp_path, f"train.objective.kd={kd}")
        [run] = arm_runs(loaded, ("constant-advantage",), seeds=1)
        return load_recipe(loaded.path, (*loaded.overrides, *run.overrides)).recipe.train.objective.kd

    plain = Objective.model_validate({"kd": "rkl"}).kd
    assert term("{term: jsd, beta: 0.5}") == term("k1_loss") == term("{term: rkl, gamma: 0.5}") == plain
    cut = {"control": "truncate", "cap": 2.0}
    found = term("{term: k2, ratio: {control: truncate, cap: 2.0}, baseline: exact}")
    assert found == Objective.model_validate({"kd": {"term": "rkl", "ratio": cut}}).kd


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.control=self_teacher"], "self_teacher needs teachers"),
        (["train.control=shuffled_teacher", "rollout.prompts=1"], "rollout.prompts of 2 or more"),
        (["train.control=shuffled_teacher", "train.objective.kind=grpo"], "an objective with a KD term"),
        (
            ["train.control=shuffled_teacher", "teachers=[{self: initial}, {name: b, self: initial}]"],
            "single",
        ),
        (["train.control=none", "teachers=[{self: current}]"], "the very student that samples"),
        (["train.control=constant_advantage", "train.objective.kd=k1_loss"], "needs kd: rkl"),
        (["train.control=constant_advantage", "train.objective.kd={term: jsd}"], "needs kd: rkl"),
        (["train.control=constant_advantage", "train.objective.kd={term: rkl, gamma: 0.5}"], "needs kd: rkl"),
        (
            ["train.control=constant_advantage", "train.objective.kd={term: rkl, baseline: step}"],
            "needs kd: rkl",
        ),
        (["train.control=constant_advantage", "train.objective.kind=srpo"], "kind kd, kdrl or then"),
    ],
)
def test_a_control_that_means_nothing_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_recipe(tmp_path, train__minibatches=1), tuple(overrides))


def test_unknown_arms_are_named() -> None:
    assert parse_arms("rl, kd,rl") == ("rl", "kd")
    with pytest.raises(RecipeError, match="'dk' is no arm"):
        parse_arms("kd,dk")


# ------------------------------------------------------------------------------------------------ the table


def test_each_arm_stands_against_the_student_before_training() -> None:
    def run(name: str, seed: int, right: list[float]) -> Contender:
        return Contender(name, seed, 1, 1, {str(n): v for n, v in enumerate(right)}, {"x": name}, {}, {})

    before = {1: run("kd-1", 1, [0, 0, 1, 0]), 2: run("kd-2", 2, [0, 1, 0, 0])}
    ended: list[tuple[ArmName, Contender]] = [
        ("kd", run("kd-1", 1, [1, 1, 1, 0])),
        ("kd", run("kd-2", 2, [1, 1, 1, 1])),
        ("rl", run("rl-1", 1, [0, 1, 1, 0])),
        ("rl", run("rl-2", 2, [0, 1, 1, 0])),
    ]
    found = arm_rows([(arm, one.since(before[one.seed])) for arm, one in ended])
    assert [row.label for row in found] == ["student before", "kd", "rl"]
    assert [row.level.estimate for row in found] == [0.25, 0.875, 0.5]
    gains = [row.change.interval.estimate for row in found if row.change is not None]
    assert gains == [0.625, 0.25]


def test_arms_stand_against_the_arms_that_have_one_source_less_paired_by_seed_and_problem() -> None:
    right = {
        "kd": [[1, 1, 1, 0], [1, 1, 0, 1]],
        "rl": [[0, 1, 1, 0], [1, 0, 0, 1]],
        "kdrl": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "shuffled-teacher": [[0, 0, 1, 0], [0, 1, 0, 0]],
        "self-teacher": [[0, 0, 0, 0], [0, 0, 0, 1]],
    }
    apart = {
        "kd": 0.25,
        "rl": 2.0,
        "kdrl": 0.5,
        "shuffled-teacher": 3.0,
    }  # the nats of each token; not of self-teacher

    def run(arm: ArmName, seed: int) -> Contender:
        keys = [str(n) for n in range(4)]
        one = Contender(arm, seed, 1, 1, dict(zip(keys, right[arm][seed], strict=True)), {}, {}, {})
        if arm not in apart:
            return one
        nats = apart[arm]
        beside = replace(one, values=dict.fromkeys(keys, nats), totals=dict.fromkeys(keys, (nats, 1.0)))
        return replace(one, beside=beside)

    # The seeds of an arm end in any order.
    rows = arm_rows([(arm, run(arm, seed)) for arm in ARMS if arm in right for seed in (1, 0)])
    found = {
        f"{row.label} less {other}": [
            one.pairs[other].interval.estimate for one in row.measured if other in one.pairs
        ]
        for row in rows
        for other in row.pairs
    }
    assert found == {
        "kd less shuffled-teacher": [0.5, -2.75],
        "kd less self-teacher": [0.625],
        "kdrl less rl": [0.25, -1.5],
        "kdrl less kd": [0.0, 0.25],
    }
    assert all(row.difference is None for row in rows)
    pair = rows[[row.label for row in rows].index("kdrl")].pairs["rl"]
    by_seed = statistics.pooled(np.array(right["kdrl"], float) - np.array(right["rl"], float))
    assert pair.interval == Interval(by_seed.estimate, max(-1.0, by_seed.low), min(1.0, by_seed.high))
    lines = "\n".join(markdown_lines(rows))
    assert "| kdrl less rl | +25.0 (" in lines
    assert "against the first" not in lines
    assert "arm=" not in lines
    [document] = [row for row in comparison_json(rows) if row["label"] == "kd"]
    assert list(document["accuracy"]["pairs"]) == ["shuffled-teacher", "self-teacher"]  # type: ignore[index,call-overload,arg-type]


def test_what_is_kept_of_a_study_names_the_arms_that_are_not_in_it(tmp_path: Path) -> None:
    reason = "arm rl: rollout.samples is 1, and a group of one has no advantage"
    study = make_study(tmp_path, "arms", recipe="tiny", runs={"tiny-1": "kd, seed 1"}, left_out=[reason])
    study.keep([], ["| a table |"], [])
    kept = study.comparison()
    assert kept is not None
    assert kept["left_out"] == [reason]
    assert f"Left out:\n\n* {reason}\n" in (study.path / "comparison.md").read_text()


@pytest.mark.slow
def test_a_study_runs_resumes_and_survives_an_arm_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command: six arms of one seed, the comparison, and the numbers again from the tables of the runs."""
    monkeypatch.setattr(kdpipe.pipeline.request, "Worker", NearWorker)
    monkeypatch.setattr("kdpipe.tracking.mirror.open_mirror", lambda _project: SilentMirror())
    threads = torch.get_num_threads()
    path = write_recipe(
        tmp_path,
        **FEW,
        train__objective={"kind": "kd", "kd": {"term": "jsd", "beta": 1.0, "support": "vocabulary"}},
    )
    page = tmp_path / "arms.html"
    command = [
        "arms",
        str(path),
        "--seeds",
        "1",
        "--workspace",
        str(tmp_path / "out"),
        "--json",
        "-o",
        str(page),
    ]
    refuse = NearWorker.call

    def failing(self: Any, request: Any, **rest: Any) -> Any:
        step, recipe = request.assignment.step, request.assignment.recipe
        if step.stage == Stage.TRAIN and recipe.train.objective.kind == "grpo":
            raise StepError("train@1: out of luck")
        return refuse(self, request, **rest)

    try:
        monkeypatch.setattr(NearWorker, "call", failing)
        broken = CliRunner().invoke(app, command)
        assert broken.exit_code == 1, broken.output
        assert "1 of 6 runs failed: rl, seed 1" in broken.output
        assert "Not shown: rl, seed 1 failed" in page.read_text()
        monkeypatch.setattr(NearWorker, "call", refuse)
        began = NearWorker.started
        done = CliRunner().invoke(app, command)
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    assert NearWorker.started == began + 1  # the other five were finished
    table = json.loads(next(line for line in done.stdout.splitlines() if '"comparison"' in line))["rows"]
    assert [row["label"] for row in table] == ["student before", *ARMS]
    assert "kdrl less rl" in page.read_text()
    assert "Not shown" not in page.read_text()
    for row in table:
        [run] = row["runs"]
        place = tmp_path / "out" / "runs" / run["run"] / f"round-{run['round']:03d}" / "evaluate-student"
        correct = pq.read_table(place / "grades.parquet")["correct"].to_pylist()
        assert math.isclose(row["accuracy"]["estimate"], sum(correct) / len(correct))
    runs = {row["label"]: tmp_path / "out" / "runs" / row["runs"][0]["run"] for row in table[1:]}
    # Nothing to learn until the first update:
    assert first_step(runs["self-teacher"], "grad_norm") < 1e-4 * first_step(runs["kd"], "grad_norm")
    # Each sampled token is pushed down by one constant: the loss is its mean log-prob, all ratios being 1.
    found = first_step(runs["constant-advantage"], "kd_loss")
    assert found == pytest.approx(first_logprob(runs["constant-advantage"]), abs=FLOAT32_NATS)
    # The scores were shuffled where they are read, and in that arm only:
    for arm in ("kd", "shuffled-teacher"):
        wanted = first_reverse_kl(runs[arm], is_shuffled=arm != "kd")
        assert first_step(runs[arm], "kd_reverse_kl_nats") == pytest.approx(wanted, abs=FLOAT32_NATS)


def first_step(run: Path, name: str) -> float:
    lines = (run / "round-001" / "train" / "metrics.jsonl").read_text().splitlines()
    return next(float(row["value"]) for row in map(json.loads, lines) if row["name"] == f"train/{name}")


def first_logprob(run: Path) -> float:
    """The mean log-prob of the tokens of the first optimizer step."""
    rows = pq.read_table(run / "round-001" / "train" / "completions.parquet").to_pylist()
    found = [p for row in rows if row["optimizer_step"] == 1 for p in row["proximal_logprobs"]]
    return float(np.mean(found))


def first_reverse_kl(run: Path, *, is_shuffled: bool) -> float:
    """The mean of s - q over the tokens of the first optimizer step, from the tables; s is p before any update."""
    place = run / "round-001"
    rows = pq.read_table(place / "rollout" / "rollouts.parquet").to_pylist()
    scored = pq.read_table(place / "teacher-score" / "scores.parquet").to_pylist()
    trained = pq.read_table(place / "train" / "completions.parquet").to_pylist()
    teacher = {(row["prompt_id"], row["sample"]): row["teacher_logprobs"] for row in scored}
    lengths = [len(row["completion_token_ids"]) for row in rows]
    donors = donors_of([row["prompt_id"] for row in rows], lengths, seed=1, round_number=1)
    differences: list[float] = []
    for row, donor in zip(rows, donors, strict=True):
        key = row["prompt_id"], row["sample"]
        [found] = [one for one in trained if (one["prompt_id"], one["sample"]) == key]
        giver = rows[donor.number]
        given = teacher[giver["prompt_id"], giver["sample"]]
        q = [given[t] for t in donor.positions] if is_shuffled else teacher[key]
        if found["optimizer_step"] == 1:
            differences += [s - t for s, t in zip(found["proximal_logprobs"], q, strict=True)]
    return sum(differences) / len(differences)


def test_arms_have_no_page_on_stdout_nor_in_the_place_of_a_folder(tmp_path: Path) -> None:
    for flags, said in ((["-o", "-"], "name a file"), (["-o", str(tmp_path)], "is a folder")):
        result = CliRunner().invoke(app, ["arms", "quickstart", "--arms", "kd", *flags])
        assert result.exit_code == 2
        assert said in result.stderr
