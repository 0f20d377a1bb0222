"""The recipe: defaults, YAML with its repairs, --set, and messages that say where and what to do."""

from __future__ import annotations

import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kdpipe.errors import RecipeError
from kdpipe.recipe.file import LoadedRecipe, load_recipe
from kdpipe.recipe.objective import JsdTerm, K2Term, RklTerm
from kdpipe.recipe.runtime import Tracking
from kdpipe.recipe.schema import ModelTeacher, Recipe, ScratchTeacher, SelfTeacher, ServedTeacher, resolved
from kdpipe.recipe.stages import Keeping
from kdpipe.recipe.teacher import ABSENT, Server
from kdpipe.recipe.yaml_source import MAX_DEPTH, parse_value, read_yaml

MINIMAL = """\
name: small
rounds: 2
task: {kind: arithmetic}
student: {scratch: {}, sft: {steps: 5}}
teachers:
  - scratch: {}
    sft: {steps: 5}
"""


def load(tmp_path: Path, text: str = MINIMAL, *overrides: str) -> LoadedRecipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def error_of(tmp_path: Path, text: str = MINIMAL, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, *overrides)
    assert caught.value.exit_code == 2
    return caught.value.message.replace(f"{tmp_path}/", "")


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        found: dict[str, Any] = {}
        for key, item in value.items():
            found |= leaves(item, f"{name}.{key}" if name else key)
        return found
    return {name: value}


# ----------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "localhost", "[::1]", "a.example"])
def test_plain_http_is_for_this_machine_unless_it_is_allowed(host: str) -> None:
    fields = {"urls": [f"http://{host}:8000/v1"], "model": "m", "tokenizer": "t"}
    assert Server(**fields, allow_http=True).allow_http
    if host != "a.example":
        Server(**fields)
    else:
        with pytest.raises(ValueError, match="allow_http: true"):
            Server(**fields)


@pytest.mark.parametrize(
    "uri",
    [
        *(
            "http://127.0.0.1:5000",
            "https://host/mlflow",
            "databricks",
            "./mlruns",
            "sqlite:////tmp/a#b;c.db",
        ),
        "postgresql+psycopg2://kim@db:5432/mlflow?sslmode=require",
        "mssql+pyodbc://kim@host/db?driver=ODBC+Driver+18+for+SQL+Server",
    ],
)
def test_a_tracking_address_without_secrets_is_taken(uri: str) -> None:
    assert Tracking(uri=uri).uri == uri


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("float32", "{self: initial}", "float32"),
        ("bfloat16", "{self: ema, decay: 0.9}", "bfloat16"),
        ("auto", "{self: initial}", "auto"),
        ("float32", "{self: initial, dtype: bfloat16}", "bfloat16"),
        ("float32", "{scratch: {}, sft: {steps: 5}}", "auto"),
    ],
)
def test_a_teacher_that_is_the_student_has_its_dtype(
    tmp_path: Path, student: str, teacher: str, expected: str
) -> None:
    loaded = load(tmp_path, MINIMAL, f"student.dtype={student}", f"teachers=[{teacher}]")
    assert loaded.recipe.teacher.dtype == expected
    written = Recipe.model_validate(resolved(loaded.recipe))
    assert written == loaded.recipe


def test_a_recipe_of_a_few_lines_gets_the_documented_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path).recipe
    found = leaves(resolved(recipe))
    expected = {
        "seed": 1,
        "rollout.temperature": 1.0,
        "rollout.samples": 1,
        "rollout.engine": "hf",
        "teacher_score.keep": "auto",
        "train.objective.kind": "kd",
        "train.objective.kd.term": "rkl",
        "train.minibatches": 1,
        "train.optimizer.schedule": "constant",
        "evaluate.temperature": 0.0,
        "evaluate.teacher": True,
        "runtime.keep.weights": 2,
        "tracking.uri": None,
    }
    assert {name: found[name] for name in expected} == expected
    assert recipe.teacher.name == "teacher"
    assert (recipe.keep, recipe.train.objective.has_kd, recipe.train.objective.has_rl) == (
        Keeping(),
        True,
        False,
    )


def test_what_is_resolved_is_a_recipe_with_the_same_meaning(tmp_path: Path) -> None:
    recipe = load(tmp_path).recipe
    assert Recipe.model_validate_json(json.dumps(resolved(recipe)), strict=True) == recipe


def test_paths_start_from_the_recipes_folder_and_the_text_is_kept_verbatim(tmp_path: Path) -> None:
    loaded = load(tmp_path, "# a comment\n" + MINIMAL)
    assert loaded.folder == tmp_path.resolve()
    assert loaded.text.startswith("# a comment\n")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-5", 1e-5),
        ("1E-5", 1e-5),
        ("1.7e-5", 1.7e-5),
        ("2.e3", 2000.0),
        (".5e1", 5.0),
        ("+1e2", 100.0),
        ("-1e2", -100.0),
        ("1_000", 1000),
        ("0.001", 0.001),
        ("0", 0),
        ("0x10", 16),
        ("~", None),
        ("true", True),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("'1e-5'", "1e-5"),
        ("'010'", "010"),
        ("'no'", "no"),
        ("[1e-5, a]", [1e-5, "a"]),
        ("", None),
    ],
)
def test_scalars_mean_what_they_look_like(written: str, value: Any) -> None:
    found, _ = parse_value(written, "here")
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("010", ["010", "octal"]),
        ("-0_7", ["octal"]),
        ("1:30", ["1:30", "base 60", "quotes"]),
        ("1:30.5", ["base 60"]),
        (".nan", ["finite"]),
        (".inf", ["finite"]),
        ("-.INF", ["finite"]),
        ("1e999", ["finite"]),
        ("9" * 5000, ["not a number"]),
        ("0x_", ["not a number"]),
        ("!!python/object:os.system x", ["tags are not used"]),
        ("!!str 5", ["tags are not used"]),
        ("!thing 5", ["tags are not used"]),
        ("&a 5", ["anchors and aliases are not used"]),
        ("*a", ["anchors and aliases are not used"]),
        ("{<<: {a: 1}}", ["merges"]),
        ("{[1]: 2}", ["keys are plain words"]),
        ("{a: 1, a: 2}", ["a", "twice"]),
        ("[" * 600, ["more than 50 levels"]),
        ("a: b: c", ["not valid YAML"]),
        ("\x07", ["not valid YAML"]),
    ],
)
def test_yaml_that_means_something_else_than_it_looks_is_refused(written: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_value(written, "here")
    for word in ["here", *words]:
        assert word in caught.value.message


def test_a_bomb_of_aliases_is_refused_before_it_grows(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    assert "recipe.yaml:1: not valid YAML: anchors and aliases" in error_of(tmp_path, "\n".join(lines))


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n", "# only a comment\n", "--- {}\n--- {}\n"])
def test_a_file_that_is_not_one_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert error_of(tmp_path, text).startswith("recipe.yaml")


def test_yaml_is_read_as_deep_as_any_recipe_goes_and_no_deeper() -> None:
    assert str(parse_value("[" * MAX_DEPTH + "]" * MAX_DEPTH, "here")[0]).count("[") == MAX_DEPTH
    siblings = "[" + ", ".join(["[[]]"] * MAX_DEPTH) + "]"
    assert parse_value(siblings, "here")[0] == [[[]]] * MAX_DEPTH
    with pytest.raises(RecipeError, match=rf"here:1: not valid YAML: more than {MAX_DEPTH} levels"):
        parse_value("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "here")


def test_lines_are_counted_in_the_file_also_of_nested_keys() -> None:
    document = read_yaml("a:\n  b:\n    - c: 1\n    - d: 2\n", "f")
    assert document.where(("a", "b", 1, "d")) == "f:4"
    assert document.where(("a", "b", 1, "nothing")) == "f:4"
    assert document.where(("nothing",)) == "f:1"
    assert document.spellings["a", "b", 0, "c"] == "1"


# --------------------------------------------------------------------------------------------- --set


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("train.optimizer.learning_rate=3e-5", "train.optimizer.learning_rate", 3e-5),
        ("rounds=7", "rounds", 7),
        ("evaluate.every=2", "evaluate.every", 2),
        ("evaluate={every: 3}", "evaluate.every", 3),
        ("rollout.stop=[a, b]", "rollout.stop", ["a", "b"]),
        ("rollout.stop=['a=b']", "rollout.stop", ["a=b"]),
        ("student.scratch.seed=4", "student.scratch.seed", 4),
        ("runtime.keep.weights=5", "runtime.keep.weights", 5),
        ("tracking.experiment=", "tracking.experiment", None),
        ("student.template.enable_thinking=false", "student.template.enable_thinking", False),
    ],
)
def test_set_changes_one_field_and_makes_the_sections_it_needs(
    tmp_path: Path, override: str, field: str, value: Any
) -> None:
    before, after = (leaves(resolved(load(tmp_path, MINIMAL, *extra).recipe)) for extra in ((), (override,)))
    assert after[field] == value
    assert {name for name in before.keys() & after.keys() if before[name] != after[name]} <= {field}


def test_set_reaches_into_lists_by_index(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL, "teachers.0.name=guru", "train.optimizer.betas=[0.8, 0.9]").recipe
    assert recipe.teacher.name == "guru"
    assert recipe.teacher.sft is not None
    again = "train: {optimizer: {betas: [0.9, 0.95]}}\n"
    assert load(tmp_path, MINIMAL + again, "train.optimizer.betas.1=0.5").recipe.train.optimizer.betas == (
        0.9,
        0.5,
    )


def test_set_of_kd_replaces_all_of_it(tmp_path: Path) -> None:
    text = MINIMAL + "train: {objective: {kd: {term: jsd, beta: 1.0, support: {teacher_top_k: 8}}}}\n"
    assert load(tmp_path, text).recipe.keep == Keeping(teacher_top_k=8)
    assert load(tmp_path, text, "train.objective.kd=k2").recipe.train.objective.kd == K2Term(term="k2")
    assert load(tmp_path, text, "train.objective.kd={term: rkl}").recipe.train.objective.kd == RklTerm(
        term="rkl"
    )
    assert isinstance(load(tmp_path, text, "train.objective.kd.beta=0").recipe.train.objective.kd, JsdTerm)


def test_the_last_of_two_sets_counts(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "rounds=3", "rounds=4").recipe.rounds == 4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rounds", ["--set rounds", "a.b=c"]),
        ("=3", ["a.b=c"]),
        ("a..b=3", ["a.b=c"]),
        ("a b=3", ["a.b=c"]),
        ("rounds=[1", ["--set rounds=[1", "not valid YAML"]),
        ("rounds=x", ["--set rounds=x", "rounds", "integer", "found x"]),
        ("rounds=010", ["octal"]),
        ("rollout.promts=3", ["--set rollout.promts=3", "rollout.promts", "did you mean 'prompts'"]),
        ("rolout.prompts=3", ["rolout", "did you mean 'rollout'"]),
        ("teachers.1.name=x", ["teachers is a list of 1", "'1' is not an index"]),
        ("teachers.x.name=x", ["'x' is not an index"]),
        ("teachers.².name=x", ["'²' is not an index"]),
        (f"teachers.{'9' * 5000}.name=x", ["is not an index"]),
        ("teachers.0.name.more=x", ["teachers.0.name", "string"]),
        ("name=no", ["write 'no' in quotes"]),
    ],
)
def test_a_bad_set_is_told_with_its_own_text(tmp_path: Path, override: str, words: list[str]) -> None:
    message = error_of(tmp_path, MINIMAL, override)
    for word in words:
        assert word in message


def test_a_list_of_numbers_has_no_fields_to_set(tmp_path: Path) -> None:
    text = MINIMAL + "train: {optimizer: {betas: [0.9, 0.95]}}\n"
    assert "train.optimizer.betas.0 is not a mapping" in error_of(
        tmp_path, text, "train.optimizer.betas.0.x=1"
    )


# ------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize(
    ("line", "where", "words"),
    [
        ("sede: 3", "recipe.yaml:8: sede: ", ["unknown key", "did you mean 'seed'"]),
        ("rollout: {sample: 3}", "recipe.yaml:8: rollout.sample: ", ["did you mean 'samples'"]),
        ("train:\n  optimizer:\n    lr: 1", "recipe.yaml:10: train.optimizer.lr: ", ["learning_rate"]),
        (
            "train: {objective: {kd: {term: jsd, bata: 1}}}",
            "recipe.yaml:8: train.objective.kd.bata: ",
            ["'beta'"],
        ),
        (
            "train: {objective: {kd: {term: rkl, ratio: {controll: none}}}}",
            "recipe.yaml:8: train.objective.kd.ratio.controll: ",
            ["'control'"],
        ),
        ("runtime: {keep: {weight: 1}}", "recipe.yaml:8: runtime.keep.weight: ", ["'weights'"]),
        ("seed: -1", "recipe.yaml:8: seed: ", ["greater than or equal to 0", "found -1"]),
        ("seed: one", "recipe.yaml:8: seed: ", ["integer", "found one"]),
        ("seed: 1.5", "recipe.yaml:8: seed: ", ["integer"]),
        ("seed: true", "recipe.yaml:8: seed: ", ["integer", "found true"]),
        ("rollout: {temperature: 0}", "recipe.yaml:8: rollout.temperature: ", ["greater than 0"]),
        ("rollout: {engine: vlm}", "recipe.yaml:8: rollout.engine: ", ["'hf' or 'vllm'", "found vlm"]),
        ("rollout: 3", "recipe.yaml:8: rollout: ", ["expected a mapping", "found 3"]),
        ("rollout: [3]", "recipe.yaml:8: rollout: ", ["expected a mapping"]),
        ("rollout: {stop: end}", "recipe.yaml:8: rollout.stop: ", ["expected a list", "found end"]),
        ("train: {optimizer: {betas: 1}}", "recipe.yaml:8: train.optimizer.betas: ", ["expected a list"]),
        ("rollout: {stop: [no]}", "recipe.yaml:8: rollout.stop.0: ", ["no without quotes", "'no' in quotes"]),
        ("tracking: {experiment: on}", "recipe.yaml:8: tracking.experiment: ", ["on without quotes", "'on'"]),
        ("evaluate: {teacher: 1}", "recipe.yaml:8: evaluate.teacher: ", ["boolean"]),
        ("train: {objective: {kd: k9}}", "recipe.yaml:8: train.objective.kd", ["'rkl', 'k2', 'k3'"]),
        (
            "train: {objective: {kind: kl}}",
            "recipe.yaml:8: train.objective.kind: ",
            ["'kd', 'grpo', 'kdrl', 'srpo' or 'then'"],
        ),
        ("name: again", "recipe.yaml:8: name: ", ["twice"]),
        (
            "runtime: {part_rows: 16}\nrollout: {prompts: 2}\nrollout: {}",
            "recipe.yaml:10: rollout: ",
            ["twice"],
        ),
    ],
)
def test_every_error_names_file_line_and_field(
    tmp_path: Path, line: str, where: str, words: list[str]
) -> None:
    message = error_of(tmp_path, MINIMAL + line + "\n")
    assert message.startswith(where)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("old", "new", "where", "words"),
    [
        ("name: small\n", "", "recipe.yaml:1: name: ", ["required"]),
        ("name: small", "name: ../up", "recipe.yaml:1: name: ", ["pattern", "found ../up"]),
        ("name: small", "name: .hidden", "recipe.yaml:1: name: ", ["pattern"]),
        ("name: small", "name: no", "recipe.yaml:1: name: ", ["no without quotes"]),
        ("rounds: 2\n", "", "recipe.yaml:1: rounds: ", ["required"]),
        (
            "{kind: arithmetic}",
            "{kind: arithmatic}",
            "recipe.yaml:3: task",
            ["'gsm8k', 'arithmetic', 'jsonl'"],
        ),
        ("{kind: arithmetic}", "{}", "recipe.yaml:3: task", ["kind"]),
        ("{kind: arithmetic}", "{kind: arithmetic, step: [1]}", "recipe.yaml:3: task.step: ", ["'steps'"]),
        (
            "{kind: arithmetic}",
            "{kind: arithmetic, few_shot: 1}",
            "recipe.yaml:3: task.few_shot: ",
            ["known: "],
        ),
        ("{kind: arithmetic}", "{kind: jsonl, test: t}", "recipe.yaml:3: task.train: ", ["required"]),
        ("sft: {steps: 5}}", "sft: {step: 5}}", "recipe.yaml:4: student.sft.step", ["required", "'steps'"]),
        ("  - scratch: {}", "  - scrach: {}", "recipe.yaml:6: teachers.0.scrach: ", ["'scratch'"]),
        (
            "{scratch: {}, sft: {steps: 5}}",
            "{}",
            "recipe.yaml:4: student: ",
            ["exactly one of: model, scratch"],
        ),
        (
            "    sft: {steps: 5}",
            "    sft: 5",
            "recipe.yaml:7: teachers.0.sft: ",
            ["expected a mapping", "found 5"],
        ),
        ("    sft: {steps: 5}", "    sft: {steps: no}", "recipe.yaml:7: teachers.0.sft.steps: ", ["integer"]),
        (
            "scratch: {}, sft",
            "scratch: {num_heads: 5}, sft",
            "recipe.yaml:4: student.scratch: ",
            ["must divide"],
        ),
    ],
)
def test_errors_in_required_sections_are_as_exact(
    tmp_path: Path, old: str, new: str, where: str, words: list[str]
) -> None:
    assert old in MINIMAL
    message = error_of(tmp_path, MINIMAL.replace(old, new, 1))
    assert message.startswith(where)
    for word in words:
        assert word in message


def test_a_wrong_key_in_one_of_several_forms_is_told_with_the_forms(tmp_path: Path) -> None:
    message = error_of(tmp_path, MINIMAL + "teacher_score: {keep: {topk: 4}}\n")
    assert "recipe.yaml:8: teacher_score.keep.topk: unknown key; did you mean 'top_k'?" in message
    assert "'auto', 'token' or 'hidden'" in message


def test_all_errors_are_told_at_once_a_line_each(tmp_path: Path) -> None:
    lines = error_of(tmp_path, MINIMAL + "seed: x\nrollout: {samples: 0, prompt: 1}\n").splitlines()
    assert [line.split(": ")[1] for line in lines] == ["seed", "rollout.samples", "rollout.prompt"]


# ------------------------------------------------------------------------------------------ teachers

SERVER = "server: {urls: ['https://a/v1'], model: m, tokenizer: t}"


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("{model: ./m, revision: main}", ModelTeacher),
        ("{scratch: {}, sft: {steps: 5}}", ScratchTeacher),
        ("{self: initial}", SelfTeacher),
        (f"{{{SERVER}}}", ServedTeacher),
        ("{self: initial, model: null, revision: null, scratch: null, server: null, sft: null}", SelfTeacher),
        (f"{{{SERVER}, dtype: auto, self: null, decay: null, quantization: null}}", ServedTeacher),
    ],
)
def test_a_teacher_is_of_the_kind_whose_field_it_sets(tmp_path: Path, written: str, kind: type) -> None:
    recipe = load(tmp_path, MINIMAL, f"teachers=[{written}]").recipe
    assert type(recipe.teacher) is kind
    assert Recipe.model_validate_json(json.dumps(resolved(recipe)), strict=True) == recipe


def test_what_is_resolved_has_the_same_fields_for_every_kind_of_teacher(tmp_path: Path) -> None:
    documents = [
        resolved(load(tmp_path, MINIMAL, f"teachers=[{written}]").recipe)["teachers"]
        for written in ("{model: ./m}", "{self: initial}", f"{{{SERVER}}}", "{scratch: {}}")
    ]
    assert all(set(teacher) == set(ABSENT) for [teacher] in documents)  # type: ignore[misc, arg-type, union-attr]


@pytest.mark.parametrize(
    ("written", "where", "words"),
    [
        ("{self: initial, revision: x}", "revision: ", ["goes with model", "is the student itself"]),
        ("{self: initial, sft: {steps: 1}}", "sft: ", ["goes with model or scratch", "remove it"]),
        ("{self: initial, quantization: fp8}", "quantization: ", ["goes with model or scratch"]),
        ("{model: ./m, decay: 0.5}", "decay: ", ["goes with self", "is a model", "found 0.5"]),
        ("{scratch: {}, revision: x}", "revision: ", ["goes with model", "is made from scratch"]),
        (f"{{{SERVER}, sft: {{steps: 1}}}}", "sft: ", ["goes with model or scratch", "is behind a server"]),
        (f"{{{SERVER}, dtype: float32}}", "dtype: ", ["goes with model, scratch or self", "found float32"]),
        ("{self: initial, promt: x}", "promt: ", ["unknown key; did you mean 'prompt'?"]),
        ("{self: initial, x: 1}", "x: ", ["known: decay, dtype, name, only, prompt, prompt_style, self, "]),
        ("{modell: ./m}", "modell: ", ["unknown key; did you mean 'model'?"]),
    ],
)
def test_a_field_of_another_kind_of_teacher_is_refused_with_its_line(
    tmp_path: Path, written: str, where: str, words: list[str]
) -> None:
    lines = written.replace(", ", ",\n      ").splitlines()
    text = MINIMAL.replace("  - scratch: {}\n    sft: {steps: 5}\n", "  - " + "\n".join(lines))
    number = next(n for n, line in enumerate(lines, 6) if line.strip(" {").startswith(where))
    message = error_of(tmp_path, text)
    assert message.startswith(f"recipe.yaml:{number}: teachers.0.{where}")
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("{model: ./m, self: initial}", "scratch, self, server; this teacher has model and self"),
        ("{}", "give exactly one of: model, scratch, self, server"),
        ("{name: a, self: null}", "give exactly one of: model, scratch, self, server"),
        ("initial", "a teacher is a mapping, as in - {self: initial} (found initial)"),
    ],
)
def test_a_teacher_of_no_kind_or_of_two_is_refused(tmp_path: Path, written: str, words: str) -> None:
    text = MINIMAL.replace("  - scratch: {}\n    sft: {steps: 5}\n", f"  - {written}\n")
    message = error_of(tmp_path, text)
    assert message.startswith("recipe.yaml:6: teachers.0: ")
    assert message.endswith(words)


# ---------------------------------------------------------------------------------------------- fuzz

KEYS = [
    "name",
    "rounds",
    "task",
    "kind",
    "teachers",
    "train",
    "objective",
    "kd",
    "self",
    "keep",
    "x",
    "",
    "0",
]
WORDS = st.one_of(
    st.sampled_from(
        ["no", "on", "010", "1:30", ".nan", "1e-5", "~", "=", "<<", "jsd", "arithmetic", "\u202e", "²"]
    ),
    st.text(max_size=6),
    st.integers().map(str),
    st.floats().map(str),
)
DOCUMENTS = st.recursive(
    WORDS,
    lambda children: st.one_of(
        st.lists(children, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(st.tuples(st.sampled_from(KEYS), children), max_size=4).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
        ),
    ),
    max_leaves=8,
)
FUZZ = settings(
    deadline=None,
    max_examples=120,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def loads_or_refuses(text: str, *overrides: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            load_recipe(path, overrides)
        except RecipeError as error:
            message = error.message
        else:
            return
        assert message.strip()


@FUZZ
@given(
    st.one_of(
        st.text(),
        DOCUMENTS,
        st.lists(st.tuples(st.sampled_from(KEYS), DOCUMENTS)).map(
            lambda pairs: "\n".join(f"{key}: {value}" for key, value in pairs)
        ),
    )
)
@example("{" * 600)
@example("? [a]\n: b\n")
@example(": 5")
@example("=: =")
@example("a: |\n  \x85")
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    loads_or_refuses(text)


@FUZZ
@given(
    st.lists(
        st.one_of(
            st.text(max_size=20),
            st.tuples(
                st.lists(st.sampled_from([*KEYS, "1", "scratch", "sft"]), min_size=1, max_size=4), DOCUMENTS
            ).map(lambda pair: f"{'.'.join(pair[0])}={pair[1]}"),
        ),
        max_size=3,
    )
)
@example(["teachers.²=1"])
@example(["teachers.0.self=initial"])
@example(["teachers=[]"])
@example(["task=no"])
@example(["\udc80=\udc80"])
@example(["name=\udc80"])
def test_any_set_is_taken_or_a_recipe_error(overrides: list[str]) -> None:
    loads_or_refuses(MINIMAL, *overrides)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" + "1," * 490_000 + "1]", "more than 10,000 values"),
        ("{" + "".join(f"k{number}: 1, " for number in range(80_000)) + "}", "more than 10,000 values"),
        ("1\n" + "".join(f"k{number}: 1\n" for number in range(4_000)), "\nand 3,981 more"),
        ("a" * 1_000_000, "more than 1,000,000 bytes"),
    ],
)
def test_a_huge_recipe_is_refused_in_less_than_two_seconds(tmp_path: Path, text: str, told: str) -> None:
    before = time.process_time()
    message = error_of(tmp_path, f"{MINIMAL}huge: {text}")
    assert told in message
    assert len(message) < 5_000
    assert time.process_time() - before < 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("grader: none, headline: strict", "headline says how a number is read, and grader is none"),
        ("grader: exact, reward: flexible", "reward says how a number is read, and grader is exact"),
        (
            "grader: {python: 'g.py:f'}, headline: robust",
            "headline says how a number is read, and grader is g.py:f",
        ),
        ("today: 2024-02-30", "today is 2024-02-30, which is no day"),
    ],
)
def test_a_setting_of_the_task_that_would_be_read_by_nobody_is_refused(
    tmp_path: Path, change: str, told: str
) -> None:
    path = tmp_path / "r.yaml"
    task = f"{{kind: jsonl, train: a.jsonl, test: b.jsonl, {change}}}"
    path.write_text(f"name: x\ntask: {task}\nstudent: {{model: ./s}}\nteachers: [{{model: ./t}}]\n")
    with pytest.raises(RecipeError, match=re.escape(told)):
        load_recipe(path)
