"""Finished runs, computed again from their files in float64 by code that knows nothing of kdpipe."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from tests.replay.difference import BOUNDS, BOUNDS_IN_BFLOAT16
from tests.replay.reading import Run
from tests.replay.recipes import CASES, Case
from tests.replay.replay import replay

MAKES_RUNS = {"recipes.py", "test_replay.py"}


def bounds_of(run: Run) -> dict[str, float]:
    return BOUNDS_IN_BFLOAT16 if run.recipe["student"]["dtype"] == "bfloat16" else BOUNDS


@pytest.fixture(scope="module", params=CASES)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Run]:
    case = CASES[request.param]
    return case, case.run(tmp_path_factory.mktemp("run"))


@pytest.mark.slow
def test_what_a_run_stored_follows_from_its_files(finished: tuple[Case, Run]) -> None:
    _, run = finished
    found = replay(run)
    print({kind: float(f"{value:.2g}") for kind, value in found.items()})
    assert found.over(bounds_of(run)) == {}


@pytest.mark.slow
def test_a_replay_of_another_recipe_does_not_agree(finished: tuple[Case, Run]) -> None:
    case, run = finished
    assert replay(Run(run.path, case.fault)).over(bounds_of(run))


def test_the_replay_knows_nothing_of_kdpipe() -> None:
    modules = [path for path in Path(__file__).parent.glob("*.py") if path.name not in MAKES_RUNS]
    assert len(modules) >= 10
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Import(names=names):
                    found = {alias.name for alias in names}
                case ast.ImportFrom(module=str(module)):
                    found = {module}
                case _:
                    continue
            for name in found:
                assert not name.startswith(("kdpipe", "importlib")), (path.name, name)
                assert not name.startswith("tests") or name.startswith("tests.replay"), (path.name, name)
                assert name != "tests.replay.recipes", (path.name, name)


# ----------------------------------------------------------------------------------------- changed files

Change = Callable[[Path], None]


def in_table(file: str, column: str, by: float) -> Change:
    """Moves the first number of a column."""

    def change(folder: Path) -> None:
        table = pq.read_table(folder / file)
        values = table[column].to_pylist()
        place = next(n for n, value in enumerate(values) if value)
        if isinstance(values[place], list):
            values[place][0] += by
        else:
            values[place] += by
        index = table.schema.get_field_index(column)
        changed = table.set_column(
            index, table.schema.field(index), pa.array(values, table.schema.field(index).type)
        )
        pq.write_table(changed, folder / file)

    return change


def in_tensors(file: str, name: str, by: float) -> Change:
    """Moves the first number of a tensor."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / file)
        tensors[name].view(-1)[0] += by
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return change


def in_metrics(name: str, by: float) -> Change:
    """Multiplies the last value of a metric."""

    def change(folder: Path) -> None:
        path = folder / "train/metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        [row for row in rows if row["name"] == name][-1]["value"] *= by
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return change


WEIGHT = "model.layers.0.mlp.up_proj.weight"
CHANGES: dict[str, tuple[str, Change]] = {
    "a token of a prompt": (
        "ids, order, grades",
        in_table("rollout/rollouts.parquet", "prompt_token_ids", 1),
    ),
    "b": ("log-probs", in_table("rollout/rollouts.parquet", "sampler_logprobs", 1e-4)),
    "q": ("log-probs", in_table("teacher-score/scores.parquet", "teacher_logprobs", 1e-4)),
    "p": ("log-probs", in_table("train/completions.parquet", "proximal_logprobs", 1e-4)),
    "a reward": ("ids, order, grades", in_table("rollout/rollouts.parquet", "reward", 0.5)),
    "an advantage": ("advantage", in_table("train/completions.parquet", "advantage", 1e-5)),
    "a weight": ("weights", in_tensors("train/model/model.safetensors", WEIGHT, 4e-3)),
    "a moment": ("moments", in_tensors("train/trainer/trainer.safetensors", f"exp_avg.{WEIGHT}", 1e-3)),
    "the loss": ("loss", in_metrics("train/loss", 1.001)),
    "the gradient's norm": ("gradient norm", in_metrics("train/grad_norm", 1.001)),
    "the rate": ("schedules", in_metrics("train/learning_rate", 1.0001)),
    "the distill weight": ("schedules", in_metrics("train/distill_weight", 1.0001)),
}


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return CASES["kdrl, linear schedule, wrong ones"].run(tmp_path_factory.mktemp("run"))


@pytest.mark.slow
@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_number_is_found_where_it_stands(what: str, unchanged: Run, tmp_path: Path) -> None:
    kind, change = CHANGES[what]
    shutil.copytree(unchanged.path, tmp_path / "run")  # of links, what they lead to
    change(tmp_path / "run/round-002")
    assert kind in replay(Run(tmp_path / "run")).over(BOUNDS)


# -------------------------------------------------------------------------------------------------- docs


def test_the_table_in_the_docs_has_these_bounds_and_counts() -> None:
    text = (Path(__file__).parents[2] / "docs/objectives.md").read_text(encoding="utf-8")
    section = text.partition("## Replayed from files")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in section.splitlines()
        if line.startswith("| ")
    ]
    table = {row[0]: (row[1], row[3]) for row in rows[1:]}
    for kind, bound in BOUNDS.items():
        assert table.pop(kind) == (f"{bound:.2g}", f"{BOUNDS_IN_BFLOAT16[kind]:.2g}"), kind
    assert not table
    assert f"{len(CASES)} recipes" in section
    assert f"of {len(CHANGES)} kinds" in section
