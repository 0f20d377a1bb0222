"""docs/objectives.md says what the code has: tables and settings against the schema, results against the study."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from kdpipe.data.tables import topk_schema
from kdpipe.recipe.file import load_recipe
from kdpipe.recipe.objective import (
    BehaviourControl,
    DecoupledControl,
    DistillSchedule,
    KdTerm,
    Objective,
    RatioControl,
    Support,
)

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results" / "objectives.jsonl"
TERMS: dict[str, type[BaseModel]] = {
    get_args(term.model_fields["term"].annotation)[0]: term for term in get_args(get_args(KdTerm)[0])
}
SECTIONS: dict[str, type[BaseModel]] = {
    "field of a ratio control": RatioControl,
    "field of `decoupled`": DecoupledControl,
    "field of a support": Support,
    "field of `train.objective`": Objective,
    "field of `distill_schedule`": DistillSchedule,
    "field of `behaviour`": BehaviourControl,
}
OF_TERMS = "field of a term"


def tables() -> dict[str, list[list[str]]]:
    """The cells of every table, with its headings, by its first heading."""
    found: dict[str, list[list[str]]] = {}
    for block in re.findall(r"(?:^\|.*\n)+", DOC, re.MULTILINE):
        lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()]
        # A cell that is one piece of code stands for what is in it.
        rows = [[re.sub(r"^`([^`]*)`$", r"\1", cell) for cell in line] for line in lines]
        heading = lines[0][0]
        found[heading if heading not in found else f"{heading} again"] = [rows[0], *rows[2:]]
    return found


TABLES = tables()


def body(heading: str) -> list[list[str]]:
    return TABLES[heading][1:]


def said(default: Any) -> Any:
    """A default as the tables say it: a section that is named by one of its fields, by the value of that field."""
    if isinstance(default, BaseModel):
        for name in ("term", "control", "kind"):
            if name in type(default).model_fields:
                return getattr(default, name)
        return default.model_dump(mode="json", exclude_unset=True)
    return default


def choices(info: Any) -> list[str]:
    """The strings that a field may be, where it is one of several."""
    return [choice for choice in get_args(info.annotation) if isinstance(choice, str)]


def study(name: str = "objectives") -> ModuleType:
    """A script of benchmarks/ as a module."""
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location(f"{name}_study", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


# -------------------------------------------------------------------------------------- names and defaults


def test_every_row_of_every_table_has_as_many_cells_as_its_heading() -> None:
    for heading, (first, *rows) in TABLES.items():
        assert {len(row) for row in rows} == {len(first)}, heading


@pytest.mark.parametrize("heading", ["`term`", "`term` again"])
def test_the_terms_are_those_of_the_code(heading: str) -> None:
    assert [row[0] for row in body(heading)] == list(TERMS)


def test_every_term_has_a_formula_what_it_descends_a_source_and_a_use() -> None:
    for row in body("`term`"):
        assert re.search(r"\bs\b|\bS\b", row[1]), row
        assert len(row) == 4, row
        assert all(row), row
    assert all(len(use) > 20 for _, use in body("`term` again"))


def test_every_parameter_of_a_term_is_there_with_its_default() -> None:
    documented = {}
    for field, terms, default, _ in body(OF_TERMS):
        for term in terms.split(", "):
            assert (term, field) not in documented
            documented[term, field] = yaml.safe_load(default)
    assert documented == {
        (name, field): said(info.default)
        for name, term in TERMS.items()
        for field, info in term.model_fields.items()
        if field != "term"
    }


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_field_of_a_section_is_there_with_its_default(heading: str) -> None:
    assert TABLES[heading][0][1:] == ["default", "meaning"]
    documented = [(field, yaml.safe_load(default)) for field, default, _ in body(heading)]
    assert documented == [(name, said(info.default)) for name, info in SECTIONS[heading].model_fields.items()]


def test_no_table_tells_defaults_of_anything_else() -> None:
    with_defaults = {heading for heading, rows in TABLES.items() if "default" in rows[0]}
    assert with_defaults == {OF_TERMS, *SECTIONS}


@pytest.mark.parametrize(
    ("heading", "field"),
    [
        (heading, name)
        for heading, section in SECTIONS.items()
        for name, info in section.model_fields.items()
        if choices(info)
    ],
)
def test_every_choice_of_a_field_is_named_where_the_field_is(heading: str, field: str) -> None:
    [row] = [row for row in body(heading) if row[0] == field]
    for choice in choices(SECTIONS[heading].model_fields[field]):
        assert choice == row[1] or f"`{choice}`" in row[2], choice


def test_every_baseline_of_a_term_is_named() -> None:
    for field, terms, _, meaning in body(OF_TERMS):
        if field == "baseline":
            named = re.findall(r"`(\w+)`", meaning)
            for term in terms.split(", "):
                assert named == choices(TERMS[term].model_fields["baseline"]), term


def test_the_kinds_are_those_of_the_code_and_each_has_a_use_and_a_source() -> None:
    assert [row[0] for row in body("`kind`")] == choices(Objective.model_fields["kind"])
    assert all(all(row) for row in body("`kind`"))


def settings() -> list[Any]:
    """Every mapping in backquotes, with 8 for k."""
    return [
        yaml.safe_load(re.sub(r": k\b", ": 8", text)) for text in re.findall(r"`(\{[a-z_]+: [^`]*\})`", DOC)
    ]


def test_every_setting_that_is_shown_is_one_that_the_code_takes() -> None:
    shown = settings()
    assert len(shown) >= 9
    for value in shown:
        takers = 0
        for kind in (KdTerm, RatioControl, BehaviourControl, DistillSchedule, Support):
            try:
                TypeAdapter(kind).validate_python(value)
            except ValidationError:
                continue
            takers += 1
        assert takers, value


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_bytes_of_a_support_are_those_of_the_columns(dtype: Any) -> None:
    schema = topk_schema(dtype)
    ids, logprobs = (schema.field(name).type.value_type.value_type for name in ("topk_ids", "topk_logprobs"))
    tail, sampled = (schema.field(name).type.value_type for name in ("tail_logprobs", "teacher_logprobs"))
    per_id, apart = (ids.bit_width + logprobs.bit_width) // 8, tail.bit_width // 8
    said_bytes = [row[2] for row in body("objective")]
    assert f"{sampled.bit_width // 8} and {per_id}k + {apart}" in said_bytes
    assert str(sampled.bit_width // 8) in said_bytes


# ------------------------------------------------------------------------------------------------ the study


def test_the_document_holds_the_table_that_the_study_prints() -> None:
    script = study()
    marker = f"<!-- study: {RESULTS.relative_to(ROOT)} -->\n\n"
    assert DOC.count(marker) == 1
    assert DOC.partition(marker)[2].startswith(script.markdown(script.latest(script.read(RESULTS))) + "\n")


def test_the_document_holds_the_table_of_measured_variances() -> None:
    results = ROOT / "benchmarks" / "results" / "variance.jsonl"
    marker = f"<!-- study: {results.relative_to(ROOT)} -->\n\n"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert {row["seed"] for row in rows} == {1, 2, 3}
    assert len({row["commit"] for row in rows}) == 1
    assert DOC.partition(marker)[2].startswith(study("variance").markdown(rows) + "\n")


def test_every_arm_of_the_study_is_a_recipe_of_equal_rollouts() -> None:
    script = study()
    recipes = {
        name: load_recipe(script.RECIPE, tuple(script.overrides_of(name, 2))).recipe for name in script.ARMS
    }
    shared = {"rollout", "student", "teachers", "task", "rounds", "evaluate", "seed"}
    [alike] = {recipe.model_dump_json(include=shared) for recipe in recipes.values()}
    assert '"seed":2' in alike
    for name, recipe in recipes.items():
        objective = recipe.train.objective
        assert (recipe.train.minibatches, recipe.train.epochs) == (1, 1)
        assert recipe.rounds == recipe.evaluate.every
        assert recipe.reproduce is (objective.kind != "grpo" and objective.kd.term == "k1_loss"), name
        if objective.kind == "kdrl":
            assert (objective.rl_weight, objective.distill_weight) == (1.0, 5e-3)
    assert len({recipe.train.objective.model_dump_json() for recipe in recipes.values()}) == len(recipes)
    k2, rkl = (recipes[name].train.objective.kd for name in ("k2", "rkl"))
    assert (k2.baseline, rkl.baseline) == ("step", "none")  # else both would be the same run


def test_the_table_compares_joint_arms_with_grpo_seed_by_seed() -> None:
    def row(arm: str, seed: int, accuracy: float, reverse_kl: float) -> dict[str, Any]:
        before = {"accuracy": 0.2, "reverse_kl_exact_nats": 0.8}
        after = {"accuracy": accuracy, "reverse_kl_exact_nats": reverse_kl}
        return {"arm": arm, "seed": seed, "before": before, "after": after, "teacher_accuracy": 0.9}

    rows = [row("grpo", seed, 0.3 + seed / 100, 0.5) for seed in (1, 2, 3)]
    rows += [row("kdrl-rkl", seed, 0.3 + 2 * seed / 100, 0.5 - seed / 10) for seed in (3, 1, 2)]
    cells = [line.split(" | ") for line in study().markdown(rows).splitlines()]
    lines = {line[0]: line for line in cells}
    # Differences of 1, 2, 3 points: mean 2, standard deviation 1, half width 4.303 / sqrt(3).
    assert lines["| `kdrl-rkl`"][4] == "+2.0 ± 2.5 (+1.0 to +3.0)"
    assert lines["| `kdrl-rkl`"][5] == "-0.200 ± 0.248 (-0.300 to -0.100) |"
    assert lines["| `grpo`"][2] == "32.0 ± 2.5 (31.0 to 33.0)"
    assert lines["| student before"][2] == "20.0 ± 0.0 (20.0 to 20.0)"
    assert "not yet run" in lines["| `k1_loss`"]
