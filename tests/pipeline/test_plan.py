"""The plan: which steps in which order, and fingerprints that miss nothing and contain nothing too much."""

from __future__ import annotations

import copy
import itertools
import json
import math
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, JsonValue, ValidationError

from kdpipe.errors import RecipeError
from kdpipe.pipeline.plan import Identities, Plan, make_plan, run_hash
from kdpipe.pipeline.status import leaves
from kdpipe.recipe.roles import Role
from kdpipe.recipe.schema import ModelTeacher, Recipe, ServedTeacher, Student
from kdpipe.store.step import canonical

Document = dict[str, Any]
Path_ = tuple[str | int, ...]

SFT: Document = {"steps": 5}
DISTILL: Document = {
    "name": "distill",
    "rounds": 3,
    "task": {"kind": "arithmetic"},
    "student": {"scratch": {}, "sft": SFT},
    "teachers": [{"scratch": {}, "sft": SFT}],
}
GSM8K: Document = {
    "name": "grade-school",
    "rounds": 2,
    "task": {"kind": "gsm8k", "few_shot": 2},
    "student": {"model": "org/student"},
    "teachers": [{"model": "org/teacher"}],
    "rollout": {"samples": 4},
    "train": {
        "objective": {
            "kind": "kdrl",
            "kd": {"term": "rkl", "ratio": {"control": "clip", "low": 0.5, "high": 2.0}},
            "behaviour": {"control": "truncate", "cap": 5.0},
        },
        "optimizer": {"schedule": "linear"},
    },
}
JSONL: Document = {
    "name": "own",
    "rounds": 2,
    "task": {"kind": "jsonl", "train": "train.jsonl", "test": "test.jsonl"},
    "student": {"model": "org/student", "sft": SFT, "lora": {}},
    "teachers": [{"self": "initial", "prompt": "{question} {solution}"}],
    "train": {"objective": {"kd": {"term": "jsd", "support": {"teacher_top_k": 8}}}},
    "teacher_score": {"keep": {"top_k": 8}},
}
DATASET: Document = {**JSONL, "name": "hub", "task": {"kind": "dataset", "path": "org/data"}}
TOKENS: Document = {
    **DISTILL,
    "name": "tokens",
    "teachers": [{"model": "org/teacher", "quantization": "fp8"}],
    "teacher_score": {"engine": "vllm"},
    "evaluate": {"engine": "vllm"},
    "train": {"objective": {"kd": {"term": "k2", "ratio": {"control": "truncate", "cap": 2.0}}}},
}
GRPO: Document = {
    **GSM8K,
    "name": "rewards",
    "train": {"objective": {"kind": "grpo", "dual_clip": 3.0}},
    "evaluate": {"reverse_kl_problems": 0},
}
LORA: Document = {
    **DISTILL,
    "name": "adapter",
    "student": {"scratch": {}, "sft": SFT, "lora": {"targets": ["q_proj"]}},
    "teachers": [{"self": "initial", "prompt": "{question} {solution}"}],
}
ROUTED: Document = {
    **DISTILL,
    "name": "routed",
    "task": {"kind": "arithmetic", "steps": [1]},
    "teachers": [
        {"name": "adds", "scratch": {}, "sft": SFT, "only": {"operation": "addition"}},
        {"name": "takes", "model": "org/teacher", "only": {"operation": ["subtraction"], "steps": [1, 2]}},
    ],
}
MIXED: Document = {
    **GSM8K,
    "name": "mixed",
    "teachers": [
        {"name": "first", "model": "org/first", "weight": 3},
        {"name": "second", "model": "org/second", "prompt": "{question} {solution}"},
    ],
    "train": {"objective": {"kd": {"term": "jsd", "support": "vocabulary"}}},
}
TEXT: Document = {
    **DISTILL,
    "name": "text",
    "rollout": {"on_policy_fraction": 0.5},
    "train": {"objective": {"kd": {"term": "jsd"}, "off_policy_term": "cross_entropy"}},
}
SERVED: Document = {
    **GSM8K,
    "name": "served",
    "teachers": [
        {
            "server": {
                "urls": ["https://one:8000/v1", "https://two/v1"],
                "model": "big",
                "tokenizer": "org/teacher",
                "api_key_env": "KEY",
            }
        }
    ],
    "train": {"objective": {"kd": {"term": "jsd", "support": {"teacher_top_k": 8}}}},
}
WRITTEN: Document = {
    **DISTILL,
    "name": "written",
    "student": {"scratch": {}, "sft": {"steps": 5, "text": "teacher", "samples": 2, "temperature": 0.5}},
    "rollout": {"on_policy_fraction": 0.5, "off_policy_text": "teacher"},
    "train": {"objective": {"kd": {"term": "jsd"}, "off_policy_term": "cross_entropy"}},
}
EMA: Document = {**DISTILL, "name": "average", "teachers": [{"self": "ema", "decay": 0.5}]}
OBJECTIVES: list[Document] = [
    {
        "kind": "kdrl",
        "kd": {
            "term": "rkl",
            "baseline": "exact",
            "support": "vocabulary",
            "decoupled": {
                "update": {"control": "clip", "low": 0.5, "high": 2.0},
                "behaviour": {"control": "mask", "low": 0.5, "high": 2.0},
            },
        },
        "mask": "wrong",
        "distill_schedule": {"kind": "linear", "end": 0.1, "rounds": 2},
        "normalization": "fixed",
        "fixed_length": 100,
    },
    {"kd": {"term": "k2", "baseline": "exact", "support": "vocabulary"}},
    {
        "kd": {
            "term": "k3",
            "baseline": "step",
            "decoupled": {"behaviour": {"control": "truncate", "cap": 2.0}},
        }
    },
    {"kd": {"term": "skew_kl", "support": "vocabulary"}},
    {"kd": {"term": "skew_kl", "support": {"student_top_k": 8}}},
    {"kd": {"term": "jsd", "support": {"union_top_k": 8}}},
    {"kd": {"term": "skew_rkl", "support": "vocabulary"}},
    {"kd": {"term": "jsd", "support": "vocabulary"}},
    {"kind": "then", "kd_rounds": 1, "kd": {"term": "jsd"}},
]
FORMS: list[Document] = [
    {**GSM8K, "name": f"form-{number}", "train": {"objective": objective}}
    for number, objective in enumerate(OBJECTIVES)
]
BASIC = {
    document["name"]: document
    for document in (
        DISTILL,
        GSM8K,
        JSONL,
        DATASET,
        TOKENS,
        GRPO,
        ROUTED,
        MIXED,
        TEXT,
        WRITTEN,
        EMA,
        LORA,
        SERVED,
    )
}
RECIPES = BASIC | {document["name"]: document for document in FORMS}


def recipe_of(document: Document) -> Recipe:
    return Recipe.model_validate_json(json.dumps(document), strict=True)


def identities_of(recipe: Recipe) -> Identities:
    """What sources.py finds: models and data by what the recipe names, so that another name is another thing."""
    models: dict[str, dict[str, JsonValue]] = {}
    for name, model in (("student", recipe.student), *((t.name, t) for t in recipe.teachers)):
        match model:
            case Student(model=str(named)) | ModelTeacher(model=named):
                models[name] = {"hub": named, "revision": model.revision or "pinned"}
            case ServedTeacher(server=server):
                tokenizer = {"hub": server.tokenizer, "revision": server.revision or "pinned"}
                models[name] = {"served": server.model, **tokenizer}
    task = recipe.task.model_dump()
    data: dict[str, dict[str, JsonValue]] = {}
    for split in ("train", "test"):
        if name := task.get("data") or task.get("path"):
            data[split] = {"hub": name, "revision": task["revision"] or "pinned"}
        elif split in task:
            data[split] = {"digest": task[split]}
    return Identities(models, data)


def plan_of(document: Document | Recipe) -> Plan:
    recipe = document if isinstance(document, Recipe) else recipe_of(document)
    return make_plan(recipe, identities_of(recipe))


def prints(document: Document | Recipe, *stages: str) -> dict[str, str]:
    return {
        step.id: step.fingerprint for step in plan_of(document).steps if not stages or step.stage in stages
    }


def with_value(document: Document, path: Path_, value: Any) -> Document:
    """The document with that value at `path`; what is not on the way is shared with `document`."""
    changed = copy.copy(document)
    node: Any = changed
    for part in path[:-1]:
        node[part] = copy.copy(node[part])
        node = node[part]
    node[path[-1]] = value
    return changed


# ---------------------------------------------------------------------------------------------- order


def test_steps_come_in_the_order_they_run() -> None:
    assert [step.id for step in plan_of({**DISTILL, "rounds": 2}).steps] == [
        "sft:student@0",
        "sft:teacher@0",
        "evaluate:student@0",
        "evaluate:teacher@0",
        "rollout@1",
        "teacher-score@1",
        "train@1",
        "evaluate:student@1",
        "rollout@2",
        "teacher-score@2",
        "train@2",
        "evaluate:student@2",
    ]


@pytest.mark.parametrize("name", BASIC)
def test_the_inputs_of_a_step_come_before_it(name: str) -> None:
    plan, seen = plan_of(RECIPES[name]), set[str]()
    for step in plan.steps:
        assert {source.step_id for source in step.inputs.values()} <= seen
        seen.add(step.id)
    assert len(seen) == len(plan.steps)
    assert len({step.fingerprint for step in plan.steps}) == len(plan.steps)


def test_models_that_are_named_need_no_cold_start_and_rewards_no_teacher() -> None:
    assert not prints(GSM8K, "sft")
    assert not prints(GRPO, "teacher-score")
    assert set(prints(JSONL, "sft")) == {"sft:student@0"}


def test_an_aliased_end_is_another_scoring_and_a_masked_one_is_not() -> None:
    def scored(end_token: str) -> dict[str, str]:
        document = {**DISTILL, "train": {"objective": {"kd": "rkl", "end_token": end_token}}}
        return prints(document, "teacher-score", "evaluate")

    keep, mask, alias = scored("keep"), scored("mask"), scored("alias")
    assert keep["teacher-score@1"] == mask["teacher-score@1"] != alias["teacher-score@1"]
    assert keep["evaluate:student@0"] == mask["evaluate:student@0"] != alias["evaluate:student@0"]


def test_a_moving_teacher_is_the_student_before_the_round_or_the_average_kept_with_it() -> None:
    shown = {"self": "current", "prompt": "{question} {solution}"}
    current, ema = plan_of({**DISTILL, "teachers": [shown]}), plan_of(EMA)

    def teacher(plan: Plan, step_id: str) -> tuple[str, tuple[str, ...]]:
        source = plan.step(step_id).inputs[Role.parse("teacher")]
        return source.step_id, source.opens

    for plan, opens in ((current, "model"), (ema, "ema")):
        assert teacher(plan, "teacher-score@1") == ("sft:student@0", ("model",))
        assert teacher(plan, "teacher-score@3") == ("train@2", (opens,))
        assert teacher(plan, "evaluate:student@0") == ("sft:student@0", ("model",))
        assert teacher(plan, "evaluate:student@2") == ("train@2", (opens,))
        assert teacher(plan, "evaluate:teacher@0") == ("sft:student@0", ("model",))
    assert Role.parse("ema") not in ema.step("train@1").inputs
    assert ema.step("train@2").inputs[Role.parse("ema")].opens == ("ema",)
    assert all(Role.parse("ema") not in step.inputs for step in current.steps)


def test_the_decay_changes_what_is_kept_and_all_that_follows() -> None:
    before, after = prints(EMA), prints({**EMA, "teachers": [{"self": "ema", "decay": 0.9}]})
    same = {step for step in before if before[step] == after[step]}
    assert same == {
        "sft:student@0",
        "evaluate:student@0",
        "evaluate:teacher@0",
        "rollout@1",
        "teacher-score@1",
    }


def test_several_teachers_are_steps_of_their_own() -> None:
    plan = plan_of({**ROUTED, "rounds": 1})
    assert [step.id for step in plan.steps] == [
        "sft:student@0",
        "sft:adds@0",
        "evaluate:student@0",
        "evaluate:adds@0",
        "evaluate:takes@0",
        "rollout@1",
        "teacher-score:adds@1",
        "teacher-score:takes@1",
        "train@1",
        "evaluate:student@1",
    ]
    assert plan.step("teacher-score:adds@1").link_name == "teacher-score-adds"
    roles = {str(role): source.step_id for role, source in plan.step("train@1").inputs.items()}
    assert roles == {
        "rollout": "rollout@1",
        "student": "sft:student@0",
        "scores:adds": "teacher-score:adds@1",
        "scores:takes": "teacher-score:takes@1",
    }


def test_a_teacher_changes_only_what_it_has_a_part_in() -> None:
    before = prints(ROUTED)
    other = copy.deepcopy(ROUTED)
    other["teachers"][1]["prompt"] = "{question}!"
    after = prints(other)
    same = {step for step in before if before[step] == after[step]}
    assert {"sft:adds@0", "rollout@1", "teacher-score:adds@1"} <= same
    assert {"evaluate:takes@0", "teacher-score:takes@1", "train@1", "evaluate:student@0"}.isdisjoint(same)


def test_equal_mixtures_and_equal_routes_are_one() -> None:
    doubled, spelled = copy.deepcopy(MIXED), copy.deepcopy(ROUTED)
    doubled["teachers"][0]["weight"], doubled["teachers"][1]["weight"] = 6, 2
    assert prints(doubled) == prints(MIXED)
    spelled["teachers"][0]["only"] = {"operation": ["addition"]}
    spelled["teachers"][1]["only"] = {"steps": [2, 1], "operation": "subtraction"}
    assert prints(spelled) == prints(ROUTED)


def test_a_weight_changes_training_and_not_what_is_scored() -> None:
    heavier = copy.deepcopy(MIXED)
    heavier["teachers"][0]["weight"] = 5
    before, after = prints(MIXED), prints(heavier)
    assert before["teacher-score:first@1"] == after["teacher-score:first@1"]
    assert before["teacher-score:second@1"] == after["teacher-score:second@1"]
    assert before["train@1"] != after["train@1"]
    assert before["evaluate:student@0"] != after["evaluate:student@0"]


def test_a_specialist_learns_and_scores_what_it_teaches() -> None:
    other = copy.deepcopy(ROUTED)
    other["teachers"][0]["only"] = {"operation": ["addition", "mixed"]}
    before, after = prints(ROUTED), prints(other)
    assert before["sft:adds@0"] != after["sft:adds@0"]
    assert before["teacher-score:takes@1"] == after["teacher-score:takes@1"]


@pytest.mark.parametrize(
    ("kd", "keep"),
    [
        ({"term": "jsd"}, "hidden"),
        ({"term": "rkl"}, "token"),
        ({"term": "rkl", "baseline": "exact"}, "hidden"),
    ],
)
def test_auto_keeps_hidden_states_where_a_mixture_needs_distributions(kd: Any, keep: str) -> None:
    document = {**MIXED, "train": {"objective": {"kd": kd}}}
    assert prints({**document, "teacher_score": {"keep": keep}}) == prints(document)


def test_the_student_is_evaluated_every_so_often_and_after_the_last_round() -> None:
    document = {**DISTILL, "rounds": 7, "evaluate": {"every": 3, "teacher": False}}
    assert set(prints(document, "evaluate")) == {f"evaluate:student@{number}" for number in (0, 3, 6, 7)}


def test_a_train_step_is_fingerprinted_with_the_objective_of_its_round() -> None:
    document = {**FORMS[-1], "rounds": 3}
    objective, plan = recipe_of(document).train.objective, plan_of(document)
    assert objective.kind == "then"
    for number in (1, 2, 3):
        fields: Any = plan.step(f"train@{number}").document["fields"]
        assert fields["train"]["objective"] == objective.in_round(number).model_dump(mode="json")


def test_round_r_samples_from_student_r_minus_1() -> None:
    plan = plan_of(DISTILL)
    assert plan.step("rollout@1").inputs[Role.parse("student")].step_id == "sft:student@0"
    assert plan.step("rollout@3").inputs[Role.parse("student")].step_id == "train@2"
    assert plan.step("train@3").inputs[Role.parse("student")].opens == ("model", "trainer")
    assert plan.step("train@1").inputs[Role.parse("student")].opens == ("model",)
    assert plan.step("evaluate@3").inputs[Role.parse("student")].step_id == "train@3"


def test_an_adapter_goes_with_the_model_below_it() -> None:
    plan = plan_of(LORA)
    for step_id in ("rollout@1", "train@1", "evaluate@0"):
        assert plan.step(step_id).inputs[Role.parse("student")].step_id == "sft:student@0"
        assert Role.parse("base") not in plan.step(step_id).inputs
    for step_id in ("rollout@2", "train@2", "evaluate@1"):
        inputs = plan.step(step_id).inputs
        assert (inputs[Role.parse("student")].step_id, inputs[Role.parse("base")].step_id) == (
            "train@1",
            "sft:student@0",
        )
        assert inputs[Role.parse("base")].opens == ("model",)
    assert plan.step("teacher-score@2").inputs[Role.parse("teacher")].step_id == "sft:student@0"


def test_a_teacher_that_is_the_student_as_it_samples_goes_with_the_model_below_its_adapter() -> None:
    teacher = {"self": "current", "prompt": "{question} {solution}"}
    plan = plan_of({**LORA, "teachers": [teacher]})
    inputs = plan.step("teacher-score@2").inputs
    assert (inputs[Role.parse("teacher")].step_id, inputs[Role.parse("base")].step_id) == (
        "train@1",
        "sft:student@0",
    )
    assert {*map(str, plan.step("teacher-score@1").inputs)} == {"rollout", "teacher"}
    recipe = recipe_of({**GSM8K, "student": {"model": "org/student", "lora": {}}, "teachers": [teacher]})
    named = make_plan(recipe, identities_of(recipe)).step("teacher-score@2")
    assert named.document["fields"]["teacher.model"] == {"hub": "org/student", "revision": "pinned"}  # type: ignore[index, call-overload]


@pytest.mark.parametrize("setting", ["rank", "alpha", "seed"])
def test_another_adapter_reuses_all_that_was_there_before_it_counts(setting: str) -> None:
    before, after = (
        plan_of(with_value(LORA, ("student", "lora"), {setting: value})).steps for value in (5, 6)
    )
    first = next(a.id for a, b in zip(before, after, strict=True) if a.fingerprint != b.fingerprint)
    assert first == "train@1"
    documents = [step.document["fields"] for step in before if step.stage == "train"]
    assert [fields["student.lora"] is not None for fields in documents if isinstance(fields, dict)] == [
        True,
        False,
        False,
    ]


def test_an_adapter_without_a_seed_has_the_recipes_and_not_that_of_train() -> None:
    step = plan_of({**LORA, "seed": 4, "train": {"seed": 9}}).step("train@1")
    assert step.document["fields"]["student.lora"]["seed"] == 4  # type: ignore[index, call-overload]


def test_a_named_model_below_an_adapter_counts_in_every_step_that_opens_it() -> None:
    recipe = recipe_of({**GSM8K, "student": {"model": "org/student", "lora": {}}})
    known = identities_of(recipe)
    other = Identities({**known.models, "student": {"digest": "x"}}, known.data)
    one, two = make_plan(recipe, known), make_plan(recipe, other)
    for step_id in ("rollout@1", "rollout@2", "train@1", "train@2", "evaluate@2"):
        a, b = (plan.step(step_id).document["fields"]["student.model"] for plan in (one, two))  # type: ignore[index, call-overload]
        assert a is not None
        assert a != b, step_id


def test_ancestors_are_all_that_a_step_needs_and_no_more() -> None:
    plan = plan_of(DISTILL)
    assert [step.id for step in plan.ancestors(plan.step("train@1"))] == [
        "sft:student@0",
        "sft:teacher@0",
        "rollout@1",
        "teacher-score@1",
        "train@1",
    ]


def test_a_step_without_a_subject_is_the_students() -> None:
    plan = plan_of(DISTILL)
    assert plan.step("evaluate@2").id == "evaluate:student@2"
    assert plan.step("evaluate:teacher@0").subject == "teacher"
    assert plan.step("sft@0").id == "sft:student@0"


@pytest.mark.parametrize(
    "name", ["rollout@4", "rollout", "rollout@0", "nothing@1", "", "evaluate:nobody@0", "@"]
)
def test_an_unknown_step_is_told_with_those_there_are(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_of(DISTILL).step(name)
    assert f"{name}: no such step" in caught.value.message
    assert "rollout@" in caught.value.hint or "evaluate:student@0" in caught.value.hint


# ------------------------------------------------------------------------- every leaf field counts


def leaf_paths(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Every field of a model instance that is not itself a model, by the names that recipes use."""
    if isinstance(value, BaseModel):
        for name, info in type(value).model_fields.items():
            found = getattr(value, name)
            yield from leaf_paths(found, (*path, info.alias or name))
    elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
        for index, item in enumerate(value):
            yield from leaf_paths(item, (*path, index))
    else:
        yield path


def filled(document: Document) -> Document:
    dumped: Document = recipe_of(document).model_dump(mode="json", by_alias=True)
    return dumped


def others(value: Any) -> list[Any]:
    """Values to try in place of `value`, the likeliest first; the schema says which are valid."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, value * 2, max(value - 1, 0), 1]
        case float():
            return [value / 2, value + 1, value * 2, 0.25, 0.75, 5]
        case str():
            return [*LITERALS, f"{value}-other", f"{value} {{question}} again", TOP_3]
        case list():
            return [[1], ["sampler"], ["stop here"], [0.5, 0.6], [*value, *value]]
        case dict():
            return [{"enable_thinking": False}, {"level": ["high"]}]
        case None:
            return [7, 1.5, 0.5, True, "other", "{question}!", *LITERALS, SFT, {}, TOP_3]
    raise AssertionError(f"no other value for {value!r}")


TOP_3 = {"teacher_top_k": 3}
LITERALS = [
    "2026-11-30",
    "reference",
    "teacher",
    "kd",
    "kdrl",
    "grpo",
    "float32",
    "vllm",
    "plain",
    "flexible",
    "strict",
    "chat",
    "mean",
    "cosine",
    "constant",
    "debug",
    "mask",
    "token",
    "linear",
    "srpo",
    "all_wrong_groups",
    "sequence",
    "drop",
    "float16",
    "group",
    "exact",
    "none",
    "truncate",
    "vocabulary",
    "hidden",
    "shuffled_teacher",
]


def changes(document: Document, path: Path_) -> Iterator[Recipe]:
    """Valid recipes that differ from `document` in the one field at `path`."""
    node: Any = document
    for part in path:
        node = node[part]
    for value in [{"top_k": 5}] if path == ("teacher_score", "keep") else others(node):
        candidate = with_value(document, path, value)
        try:
            recipe = recipe_of(candidate)
        except ValidationError:
            continue
        if recipe.model_dump(mode="json", by_alias=True) != document:
            yield recipe


def without_effect(document: Document, path: Path_) -> str | None:
    """Why a change of this field leaves every fingerprint as it is; None when it must be seen."""
    if path == ("train", "optimizer", "schedule_rounds"):
        constant = document["train"]["optimizer"]["schedule"] == "constant"
        return "a constant schedule has no horizon" if constant else None
    scores = document["train"]["objective"]["kind"] != "grpo" or document["evaluate"]["reverse_kl_problems"]
    if path[0] == "teacher_score" and not scores:
        return "rewards alone are trained on, and nothing is scored"
    if path == ("teacher_score", "engine") and all("server" in teacher for teacher in document["teachers"]):
        return "servers score"
    if "server" in path and path[-1] in ("urls", "api_key_env", "allow_http"):
        return "where a server is and how it lets one in"
    match path[0]:
        case "name":
            return "what a run is called"
        case "tracking":
            return "where it is mirrored"
        case "runtime":
            return "how fast it goes and what is kept"
    return None


QUICK = {ROUTED["name"]}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_every_leaf_field_changes_a_fingerprint_or_cannot_change_results(name: str) -> None:
    document = filled(RECIPES[name])
    before = prints(document)
    for path in leaf_paths(recipe_of(document)):
        if name not in BASIC and path[0] not in ("train", "teacher_score"):
            continue
        reason = without_effect(document, path)
        for candidate in changes(
            document, path
        ):  # none: the test below finds a recipe in which there are some
            if reason is None:
                assert prints(candidate) != before, f"{path}: a change is not seen"
            else:
                assert prints(candidate) == before, f"{path}: {reason}, and yet fingerprints change"


def test_together_the_recipes_reach_every_leaf_of_the_schema() -> None:
    changed: set[tuple[str, str]] = set()
    for document in map(filled, RECIPES.values()):
        recipe = recipe_of(document)
        for path in leaf_paths(recipe):
            if (owner(recipe, path), str(path[-1])) not in changed and any(
                True for _ in changes(document, path)
            ):
                changed.add((owner(recipe, path), str(path[-1])))
    terms = ("RklTerm", "K2Term", "K3Term", "K1LossTerm", "JsdTerm", "SkewKlTerm", "SkewRklTerm")
    cannot = {*((term, "term") for term in terms), ("SelfTeacher", "self")}
    cannot |= {(task, "kind") for task in ("Gsm8kTask", "ArithmeticTask", "JsonlTask", "DatasetTask")}
    cannot |= {("ArithmeticTask", "grader"), ("PythonGrader", "python")}
    cannot |= {("Support", "teacher_top_k"), ("KeepTopK", "top_k")}  # only together: test below
    assert schema_leaves(Recipe) - changed - cannot == set()


def owner(recipe: Recipe, path: Path_) -> str:
    node: Any = recipe
    for part in path[:-1]:
        node = node[part] if isinstance(part, int) else getattr(node, part)
    return declared_in(type(node), str(path[-1]))


def declared_in(section: type[BaseModel], field: str) -> str:
    """The section that says what the field is: `section` or one that it is derived from."""
    name = {"self": "self_"}.get(field, field)
    return next(base.__name__ for base in section.__mro__ if name in base.__annotations__)


def schema_leaves(model: type[BaseModel]) -> set[tuple[str, str]]:
    """(section, field) of every field below `model` that holds no section."""
    found = set()
    for name, info in model.model_fields.items():
        sections = {
            part for part in parts(info.annotation) if isinstance(part, type) and issubclass(part, BaseModel)
        }
        for section in sections:
            found |= schema_leaves(section)
        if not sections or len(sections) < len(
            {p for p in parts(info.annotation) if p is not types.NoneType}
        ):
            found.add((declared_in(model, name), info.alias or name))
    return found


def parts(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from parts(get_args(annotation)[0])
    elif origin in (Union, types.UnionType, list):
        for argument in get_args(annotation):
            yield from parts(argument)
    elif origin is Literal:
        yield "literal"
    else:
        yield annotation


def test_the_term_of_reference_text_is_named_or_its_default_and_no_other_round_has_one() -> None:
    unnamed, named = (
        {**TEXT, "train": {"objective": {"kd": {"term": "jsd"}, **more}}}
        for more in ({}, {"off_policy_term": "kd"})
    )
    assert prints(unnamed) == prints(named) != prints(TEXT)
    fields: Any = plan_of({**TEXT, "rollout": {}, "train": {}}).step("train@1").document["fields"]
    assert fields["train"]["objective"]["off_policy_term"] is None


def test_the_share_of_sampled_prompts_changes_rounds_and_not_what_is_held_out() -> None:
    other = with_value(TEXT, ("rollout", "on_policy_fraction"), 0.25)
    before, after = prints(TEXT), prints(other)
    same = {step for step in before if before[step] == after[step]}
    assert same == {"sft:student@0", "sft:teacher@0", "evaluate:student@0", "evaluate:teacher@0"}


def test_another_term_is_another_training() -> None:
    terms: list[Any] = [
        "rkl",
        "k2",
        "jsd",
        {"term": "jsd", "support": {"teacher_top_k": 9}},
        {"term": "jsd", "support": "vocabulary"},
        {"term": "k2", "ratio": {"control": "truncate", "cap": 2.0}},
        {"term": "rkl", "ratio": {"control": "mask", "low": 0.5, "high": 2.0}},
        {"term": "rkl", "ratio": {"control": "clip", "low": 0.5, "high": 2.0}},
    ]
    found = [prints({**DISTILL, "train": {"objective": {"kd": term}}})["train@1"] for term in terms]
    assert len(set(found)) == len(terms)
    kept = [prints({**DISTILL, "train": {"objective": {"kd": term}}})["teacher-score@1"] for term in terms]
    # Tokens suffice to rkl and k2; each support is scored for itself.
    assert [kept.index(value) for value in kept] == [0, 0, 2, 3, 4, 0, 0, 0]


def test_what_auto_keeps_and_the_same_said_in_full_are_one() -> None:
    objective = {"objective": {"kd": {"term": "jsd", "support": {"teacher_top_k": 8}}}}
    auto = {**DISTILL, "train": objective}
    assert prints(auto) == prints({**auto, "teacher_score": {"keep": {"top_k": 8}}})


# --------------------------------------------------------------- what must not change a fingerprint


@pytest.mark.parametrize("name", BASIC)
def test_no_setting_of_evaluate_changes_what_is_trained(name: str) -> None:
    document = filled(RECIPES[name])
    stages = ("sft", "rollout", "teacher-score", "train")
    before = prints(document, *stages)
    tried = 0
    for path in leaf_paths(recipe_of(document)):
        if path[0] == "evaluate":
            for candidate in changes(document, path):
                assert prints(candidate, *stages) == before, path
                tried += 1
    assert tried >= 9


@pytest.mark.parametrize("name", ["distill", "own", "rewards", "tokens", "average"])
def test_more_rounds_leave_those_before_as_they_are(name: str) -> None:
    document = {**RECIPES[name], "rounds": 3}
    short, long = prints(document), prints({**document, "rounds": 9})
    assert short.items() <= long.items()


BEFORE_TRAINING = {
    "sft:student@0",
    "sft:teacher@0",
    "evaluate:student@0",
    "evaluate:teacher@0",
    "rollout@1",
    "teacher-score@1",
}
"""All that comes before the first optimizer step."""


def test_more_rounds_train_anew_where_the_schedule_ends_with_them() -> None:
    document = {**DISTILL, "train": {"optimizer": {"schedule": "linear"}}}
    short, long = prints(document), prints({**document, "rounds": 9})
    same = {step for step in short if short[step] == long[step]}
    # All that comes before the first optimizer step is reused.
    assert same == BEFORE_TRAINING


def test_a_schedule_with_its_own_horizon_does_not_mind_more_rounds() -> None:
    document = {**DISTILL, "train": {"optimizer": {"schedule": "cosine", "schedule_rounds": 20}}}
    assert prints(document).items() <= prints({**document, "rounds": 9}).items()
    said = {**DISTILL, "train": {"optimizer": {"schedule": "cosine", "schedule_rounds": 3}}}
    assert prints(said) == prints({**DISTILL, "train": {"optimizer": {"schedule": "cosine"}}})


def test_a_new_learning_rate_reuses_all_that_was_there_before_it_counts() -> None:
    before = prints(DISTILL)
    after = prints({**DISTILL, "train": {"optimizer": {"learning_rate": 0.5}}})
    same = {step for step in before if before[step] == after[step]}
    assert same == BEFORE_TRAINING


def test_seeds_of_a_study_share_a_teacher_with_a_seed_of_its_own() -> None:
    document = with_value(DISTILL, ("teachers", 0, "sft"), {"steps": 5, "seed": 0})
    first, second = (prints({**document, "seed": seed}) for seed in (1, 2))
    assert first["sft:teacher@0"] == second["sft:teacher@0"]
    assert first["sft:student@0"] != second["sft:student@0"]
    assert first["train@1"] != second["train@1"]


def test_evaluations_of_one_recipe_are_paired_by_one_seed() -> None:
    assert len({step.seed for step in plan_of(DISTILL).steps if step.stage == "evaluate"}) == 1


# ------------------------------------------------------------------------------------------ identities


def test_a_model_counts_by_what_it_is_and_not_by_what_it_is_called() -> None:
    first, second = recipe_of(GSM8K), recipe_of({**GSM8K, "student": {"model": "./elsewhere"}})
    same = Identities({"student": {"digest": "a"}, "teacher": {"digest": "b"}}, {"train": {"digest": "c"}})
    assert make_plan(first, same) == make_plan(second, same)


@pytest.mark.parametrize(
    ("models", "data"),
    [
        ({"student": {"digest": "x"}}, {}),
        ({"teacher": {"digest": "x"}}, {}),
        ({"student": {"hub": "org/student", "revision": "unresolved"}}, {}),
        ({}, {"train": {"digest": "x"}}),
        ({}, {"test": {"digest": "x"}}),
    ],
)
def test_other_content_is_another_fingerprint(models: dict[str, Any], data: dict[str, Any]) -> None:
    recipe = recipe_of(GSM8K)
    known = identities_of(recipe)
    other = Identities({**known.models, **models}, {**known.data, **data})
    before, after = make_plan(recipe, known).steps, make_plan(recipe, other).steps
    changed = {a.id for a, b in zip(before, after, strict=True) if a.fingerprint != b.fingerprint}
    expected = {
        "student": "rollout@1",
        "teacher": "teacher-score@1",
        "train": "rollout@1",
        "test": "evaluate:student@0",
    }
    (name,) = {**models, **data}
    assert expected[name] in changed
    if name == "test":
        assert not any(step.startswith(("rollout", "teacher-score", "train")) for step in changed)


def test_a_server_may_move_and_what_it_serves_may_not() -> None:
    def moved(**server: Any) -> Document:
        [teacher] = SERVED["teachers"]
        return {**SERVED, "teachers": [{"server": {**teacher["server"], **server}}]}

    elsewhere = moved(urls=["https://three/v1"], api_key_env=None)
    assert prints(elsewhere) == prints(SERVED)
    assert run_hash(recipe_of(elsewhere)) == run_hash(recipe_of(SERVED))
    before = prints(SERVED)
    for other in ({"model": "bigger"}, {"tokenizer": "org/other"}, {"revision": "v2"}):
        after = prints(moved(**other))
        assert {"rollout@1"} == {
            step for step in before if step.endswith("@1") and before[step] == after[step]
        }
        assert run_hash(recipe_of(moved(**other))) != run_hash(recipe_of(SERVED))


def test_a_model_made_by_a_step_enters_by_that_step() -> None:
    plan = plan_of(DISTILL)
    score = plan.step("teacher-score@1").document
    assert score["fields"]["teacher.model"] is None  # type: ignore[index, call-overload]
    assert score["inputs"]["teacher"] == plan.step("sft:teacher@0").fingerprint  # type: ignore[index, call-overload]


def test_each_file_of_a_split_counts() -> None:
    recipe = recipe_of(GSM8K)
    data = {"train/0": {"digest": "a"}, "train/1": {"digest": "b"}, "test": {"digest": "c"}}
    other = {**data, "train/1": {"digest": "x"}}
    models = identities_of(recipe).models
    one, two = (make_plan(recipe, Identities(models, found)).step("rollout@1") for found in (data, other))  # type: ignore[arg-type]
    assert one.fingerprint != two.fingerprint


# ------------------------------------------------------------------------------------- canonical, names


def test_equal_values_are_equal_bytes() -> None:
    assert canonical({"b": [1, "é"], "a": None}) == canonical({"a": None, "b": [1, "é"]})
    assert canonical({"a": 1}) != canonical({"a": 1.0})
    assert canonical({"a": 1}) != canonical({"a": "1"})


@pytest.mark.parametrize(
    "value",
    [{1, 2}, object(), Path("a"), b"a", 1j, math.nan, math.inf, -math.inf, [{"deep": {1}}]],
    ids=["set", "object", "path", "bytes", "complex", "nan", "inf", "minus inf", "deep set"],
)
def test_what_json_cannot_hold_is_not_hashed(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        canonical(value)


def test_keys_that_are_not_text_are_not_hashed() -> None:
    # JSON would turn 1 into "1", and two documents into one.
    with pytest.raises(TypeError):
        canonical({1: "a"})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "extra",
    [{"rounds": 99}, {"runtime": {"threads": 3}}, {"tracking": {"uri": "http://x", "enabled": False}}],
)
def test_a_run_keeps_its_name_when_rounds_runtime_and_tracking_change(extra: Document) -> None:
    assert run_hash(recipe_of({**DISTILL, **extra})) == run_hash(recipe_of(DISTILL))


def test_a_run_has_another_name_when_anything_else_changes() -> None:
    variants = [DISTILL, GSM8K, {**DISTILL, "seed": 2}, {**DISTILL, "evaluate": {"every": 2}}]
    hashes = {run_hash(recipe_of(document)) for document in variants}
    assert len(hashes) == len(variants)
    assert all(len(value) == 8 for value in hashes)


@pytest.mark.parametrize("name", BASIC)
def test_a_documents_fields_have_one_name_each_so_that_a_difference_can_be_told(name: str) -> None:
    for step in plan_of(RECIPES[name]).steps:
        fields = step.document["fields"]
        assert isinstance(fields, dict)
        names = [leaf for leaf, _ in leaves(fields)]
        assert len(names) == len(set(names)), step.id


def test_the_plan_of_a_recipe_is_always_the_same() -> None:
    assert all(plan_of(a) == plan_of(b) for a, b in itertools.pairwise([DISTILL, copy.deepcopy(DISTILL)]))
