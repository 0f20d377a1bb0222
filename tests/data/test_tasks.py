import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdpipe.data.graders.number import grade_number
from kdpipe.data.tasks import data_files, hub_data, read_problems
from kdpipe.data.tasks.arithmetic import read_problems as make_problems
from kdpipe.data.tasks.arithmetic import words
from kdpipe.errors import DataError
from kdpipe.recipe.task import ArithmeticTask, DatasetTask, Gsm8kTask, JsonlTask

REAL = Path(__file__).parents[3] / "shared/data/gsm8k"
needs_gsm8k = pytest.mark.skipif(not REAL.is_dir(), reason=f"GSM8K is not at {REAL}")
ROWS = [
    {"question": f"How many {row}?", "answer": f"{row} + 1 = {row + 1}\n#### {row + 1}"} for row in range(3)
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path, rows):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def jsonl_task(folder, train, test=({"question": "q", "answer": "1", "id": "only"},), **settings):
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "test.jsonl", test)
    return JsonlTask(kind="jsonl", train="train.jsonl", test="test.jsonl", **settings)


def arithmetic(**settings):
    return ArithmeticTask(kind="arithmetic", **settings)


# ----------------------------------------------------------------------------------------------- gsm8k


@needs_gsm8k
@pytest.mark.parametrize("headline", ["strict", "flexible"])
def test_every_gsm8k_reference_solution_is_graded_right(headline):
    train, test = read_problems(Gsm8kTask(kind="gsm8k", data=str(REAL)), Path())
    assert (len(train), len(test)) == (7473, 1319)
    wrong = [p for p in train + test if not grade_number(p.solution, p.expected, reader=headline).correct]
    assert wrong == []


@needs_gsm8k
def test_gsm8k_rows_keep_their_order_and_text():
    _, test = read_problems(Gsm8kTask(kind="gsm8k", data=str(REAL)), Path())
    assert test[0].prompt_id == "gsm8k/test/0"
    assert test[0].question.startswith("Janet’s ducks lay 16 eggs")
    assert test[0].expected == "18"
    assert test[0].solution.endswith("#### 18")
    assert test[-1].prompt_id == "gsm8k/test/1318"


def test_gsm8k_is_the_same_from_jsonl_parquet_shards_and_the_hub_layout(tmp_path):
    for layout in ("jsonl", "parquet", "hub"):
        (tmp_path / layout).mkdir()
    for split in ("train", "test"):
        write_jsonl(tmp_path / "jsonl" / f"{split}.jsonl", ROWS)
        write_jsonl(tmp_path / "jsonl" / f"{split}_socratic.jsonl", ROWS * 2)
        write_parquet(tmp_path / "parquet" / f"{split}.parquet", ROWS)
        write_parquet(tmp_path / "hub/main" / f"{split}-00000-of-00002.parquet", ROWS[:2])
        write_parquet(tmp_path / "hub/main" / f"{split}-00001-of-00002.parquet", ROWS[2:])
        write_parquet(tmp_path / "hub/socratic" / f"{split}-00000-of-00001.parquet", ROWS * 2)
    task = Gsm8kTask(kind="gsm8k", data="jsonl")
    wanted = read_problems(task, tmp_path)
    assert [problem.prompt_id for problem in wanted[0]] == ["gsm8k/train/0", "gsm8k/train/1", "gsm8k/train/2"]
    assert [problem.expected for problem in wanted[1]] == ["1", "2", "3"]
    assert read_problems(Gsm8kTask(kind="gsm8k", data="parquet"), tmp_path) == wanted
    assert read_problems(Gsm8kTask(kind="gsm8k", data="./hub"), tmp_path) == wanted
    assert read_problems(Gsm8kTask(kind="gsm8k"), tmp_path, hub_folder=tmp_path / "hub") == wanted
    files = data_files(Gsm8kTask(kind="gsm8k", data="hub"), tmp_path)
    assert set(files) == {"train/0", "train/1", "test/0", "test/1"}
    assert data_files(task, tmp_path)["test"] == tmp_path / "jsonl/test.jsonl"


def test_a_missing_shard_is_named_by_its_numbering(tmp_path):
    write_parquet(tmp_path / "main/train-00001-of-00002.parquet", ROWS)
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet, expected all files"):
        data_files(Gsm8kTask(kind="gsm8k", data="."), tmp_path)


def test_a_folder_without_a_split_says_what_it_holds(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no test split; found train\.jsonl, expected test\.jsonl"):
        read_problems(Gsm8kTask(kind="gsm8k", data="."), tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        data_files(Gsm8kTask(kind="gsm8k", data="./nowhere"), tmp_path)


def test_gsm8k_refuses_an_answer_without_a_marked_number_and_names_its_line(tmp_path):
    for answer in ("it is 18", "18 ####", "#### eighteen"):
        write_jsonl(tmp_path / "train.jsonl", [ROWS[0], {"question": "q", "answer": answer}])
        write_jsonl(tmp_path / "test.jsonl", ROWS)
        with pytest.raises(DataError, match=r"train\.jsonl:2: the answer .*ends in"):
            read_problems(Gsm8kTask(kind="gsm8k", data="."), tmp_path)


def test_a_name_is_a_hub_id_unless_it_looks_like_a_path_or_is_a_folder(tmp_path):
    def name(data):
        found = hub_data(Gsm8kTask(kind="gsm8k", data=data), tmp_path)
        same = hub_data(DatasetTask(kind="dataset", path=data, revision="v1"), tmp_path)
        assert same == (found and (*found[:1], "v1", same.patterns))
        return found and found.name

    assert name("openai/gsm8k") == "openai/gsm8k"
    assert [name(data) for data in ("./x", "../x", "/x", "~/x")] == [None] * 4
    (tmp_path / "openai/gsm8k").mkdir(parents=True)
    assert name("openai/gsm8k") is None
    assert hub_data(arithmetic(), tmp_path) is None


def test_a_hub_id_has_no_local_files_and_reading_it_without_a_download_is_an_error(tmp_path):
    task = Gsm8kTask(kind="gsm8k")
    assert data_files(task, tmp_path) == {}
    with pytest.raises(DataError, match=r"'openai/gsm8k' is no folder .* downloaded"):
        read_problems(task, tmp_path)


# ----------------------------------------------------------------------------------------------- jsonl


def test_jsonl_answers_are_plain_or_marked_and_the_solution_is_the_whole_text(tmp_path):
    rows = [{"q": "a", "a": " $1,200 "}, {"q": "b", "a": "2 + 2 = 4\n#### 4"}]
    task = jsonl_task(tmp_path, rows, test=rows, question_field="q", answer_field="a")
    train, test = read_problems(task, tmp_path)
    assert [(p.prompt_id, p.question, p.expected, p.solution) for p in train] == [
        ("jsonl/train/0", "a", "$1,200", " $1,200 "),
        ("jsonl/train/1", "b", "4", "2 + 2 = 4\n#### 4"),
    ]
    assert test[1].prompt_id == "jsonl/test/1"


def test_parquet_and_jsonl_hold_the_same_problems(tmp_path):
    rows = [{"question": "a", "answer": "1", "id": 10}, {"question": "b\u2028c", "answer": "2", "id": 11}]
    task = jsonl_task(tmp_path, rows, id_field="id")
    write_parquet(tmp_path / "train.parquet", rows)
    wanted = read_problems(task, tmp_path)[0]
    assert [problem.prompt_id for problem in wanted] == ["10", "11"]
    assert read_problems(task.model_copy(update={"train": "train.parquet"}), tmp_path)[0] == wanted
    assert data_files(task, tmp_path) == {"train": tmp_path / "train.jsonl", "test": tmp_path / "test.jsonl"}


def test_the_other_texts_and_finite_numbers_of_a_record_are_fields_of_the_problem(tmp_path):
    row = {
        "question": "q",
        "answer": "1",
        "id": "a",
        "level": 3,
        "share": 0.5,
        "hint": "",
        "question_id": "x",
    }
    ignored = {"tags": ["t"], "hard": True, "none": None, "nan": float("nan"), "half": "\ud83d"}
    task = jsonl_task(tmp_path, [{**row, **ignored}], id_field="id")
    [problem] = read_problems(task, tmp_path)[0]
    assert problem.fields == {"id": "a", "level": 3, "share": 0.5, "hint": "", "question_id": "x"}
    write_parquet(tmp_path / "train.parquet", [row])
    assert read_problems(task.model_copy(update={"train": "train.parquet"}), tmp_path)[0] == [problem]


GOOD = b'{"question": "q", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no records"),
        (b"\n \n", "holds no records"),
        (GOOD + b"{nonsense}\n", r"bad\.jsonl:2: not valid JSON"),
        (GOOD + b"\n[1]\n", r"bad\.jsonl:3: a list, expected a JSON object"),
        (GOOD + b'{"question": "caf\xe9", "answer": "1"}', r"bad\.jsonl:2: byte 18 of the line is not UTF-8"),
        (b"[" * 100_000, r"bad\.jsonl:1: not valid JSON"),
        (b'{"question": "q"}', r"bad\.jsonl:1: has no answer to grade by; the record has: 'question'"),
        (b'{"question": "q", "answer": null}', r"bad\.jsonl:1: field 'answer' is null, expected text"),
        (b'{"question": null, "answer": "1"}', r"field 'question' is null, expected text"),
        (b'{"question": ["q"], "answer": "1"}', r"field 'question\[0\]' is text, expected a turn"),
        (b'{"question": " \\n", "answer": "1"}', r"bad\.jsonl:1: field 'question' is empty"),
        (
            b'{"question": "\\ud83d", "answer": "1"}',
            r"bad\.jsonl:1: field 'question' holds half of a surrogate",
        ),
        (b'{"question": "q", "answer": "forty"}', r"bad\.jsonl:1: .* 'forty', expected a number"),
        (b'{"question": "q", "answer": "42\\n####"}', r"bad\.jsonl:1: .* expected a number"),
        (b'{"question": "q", "answer": "42 #### x"}', r"bad\.jsonl:1: .* 'x', expected a number"),
    ],
)
def test_bad_jsonl_is_refused_with_file_and_line(tmp_path, content, message):
    task = jsonl_task(tmp_path, ROWS).model_copy(update={"train": "bad.jsonl"})
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_problems(task, tmp_path)


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    task = jsonl_task(tmp_path, ROWS)
    (tmp_path / "folder").mkdir()
    (tmp_path / "not.parquet").write_bytes(b"PAR1 but not really PAR1")
    write_parquet(tmp_path / "other.parquet", [{"question": "q", "reply": "1"}])
    write_parquet(tmp_path / "null.parquet", [*ROWS, {"question": "q", "answer": None}])
    for name, message in {
        "gone.jsonl": r"gone\.jsonl: no such file",
        "folder": r"folder: no such file",
        "not.parquet": r"not\.parquet: not a parquet file",
        "other.parquet": r"other\.parquet: row 0: has no answer to grade by; .* 'question', 'reply'",
        "null.parquet": r"null\.parquet: row 3: field 'answer' is null",
    }.items():
        with pytest.raises(DataError, match=message):
            read_problems(task.model_copy(update={"train": name}), tmp_path)


def test_a_byte_order_mark_windows_lines_and_blank_lines_are_read(tmp_path):
    task = jsonl_task(tmp_path, ROWS)
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n\r\n") + GOOD)
    assert [problem.prompt_id for problem in read_problems(task, tmp_path)[0]] == [
        "jsonl/train/0",
        "jsonl/train/1",
    ]


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ("a\nb", "expected at most 200, all printable"),
        ("a\x1b[31m", "expected at most 200, all printable"),
        ("a" * 201, "has 201 characters"),
        (10**201, "has 202 characters"),
        ("", "'id' is empty"),
        (1.5, "'id' is 1.5, expected text"),
        (True, "'id' is true, expected text"),
        ("first", r"train\.jsonl:2: the id 'first' stands already at .*train\.jsonl:1"),
        ("only", r"test\.jsonl:1: the id 'only' stands already at .*train\.jsonl:2"),
    ],
)
def test_bad_and_repeated_ids_are_refused(tmp_path, identity, message):
    rows = [{"question": "q", "answer": "1", "id": "first"}, {"question": "q", "answer": "1", "id": identity}]
    with pytest.raises(DataError, match=message):
        read_problems(jsonl_task(tmp_path, rows, id_field="id"), tmp_path)


def test_an_id_of_200_characters_is_kept(tmp_path):
    rows = [{"question": "q", "answer": "1", "id": "é" * 200}]
    assert read_problems(jsonl_task(tmp_path, rows, id_field="id"), tmp_path)[0][0].prompt_id == "é" * 200


# ------------------------------------------------------------------------------------------ arithmetic


def operands_and_template(problem):
    """The words of a question, names numbered by first appearance and things left out; and its numbers."""
    names = {}
    shape, numbers = [], []
    for word in re.findall(r"\w+", problem.question):
        if word.isdigit():
            numbers.append(int(word))
        elif word in ("Ana", "Max", "Sue", "Tom"):
            shape.append(names.setdefault(word, f"name{len(names)}"))
        elif word not in ("apples", "books", "coins", "pens"):
            shape.append(word)
    return (" ".join(shape), *numbers)


def test_train_and_test_share_no_problem_and_none_stands_twice():
    train, test = make_problems(arithmetic(train_problems=20_000, test_problems=1000))
    assert (len(train), len(test)) == (20_000, 1000)
    assert len({operands_and_template(problem) for problem in train + test}) == 21_000


def test_worked_steps_are_true_and_end_in_the_answer():
    train, test = make_problems(arithmetic())
    for problem in train + test:
        *steps, last = problem.solution.split("\n")
        results = []
        for step in steps:
            left, sign, right, result = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+) \w+", step).groups()
            assert int(result) == (int(left) + int(right) if sign == "+" else int(left) - int(right))
            results.append(result)
        assert last == f"#### {problem.expected}" == f"#### {results[-1]}"
        for headline in ("strict", "flexible"):
            assert grade_number(problem.solution, problem.expected, reader=headline).correct


def test_the_fields_of_a_problem_are_those_of_its_worked_steps():
    found = set()
    for problem in make_problems(arithmetic())[0]:
        signs = re.findall(r" ([+-]) ", problem.solution)
        operation = {"+": "addition", "-": "subtraction"}.get("".join(sorted(set(signs))), "mixed")
        assert problem.fields == {"operation": operation, "steps": len(signs)}
        found.add((operation, len(signs)))
    assert len(found) == 5, "two operations of one or two steps, and mixed ones"


def answer_by_acting_out(question):
    *events, ask = re.findall(r"[^.?]+[.?]", question)
    owned = {}
    for event in events:
        name, verb, number, rest = re.fullmatch(r" ?(\w+) (\w+) (\d+)(.*)\.", event).groups()
        first = next(iter(owned.values()), 0)
        if verb == "has":
            owned[name] = (
                int(number) + first
                if rest == " more"
                else first - int(number)
                if rest == " less"
                else int(number)
            )
        else:
            owned[name] += {"buys": 1, "finds": 1, "loses": -1, "sells": -1, "gives": -1}[verb] * int(number)
        assert owned[name] >= 0
    asked = re.search(r"does (\w+) have", ask)
    return owned[asked[1]] if asked else sum(owned.values())


def test_acting_out_the_story_gives_the_answer():
    for problem in make_problems(arithmetic())[0]:
        assert int(problem.expected) == answer_by_acting_out(problem.question)


def test_equal_settings_make_equal_problems_and_other_seeds_others():
    first = make_problems(arithmetic(train_problems=100, test_problems=20))
    assert make_problems(arithmetic(train_problems=100, test_problems=20)) == first
    assert make_problems(arithmetic(train_problems=100, test_problems=20, seed=1))[1] != first[1]
    assert [problem.prompt_id for problem in first[0][:2]] == ["arithmetic/train/0", "arithmetic/train/1"]
    assert first[1][0].prompt_id == "arithmetic/test/0"


def test_problems_do_not_depend_on_the_hash_seed_of_the_process():
    code = (
        "from kdpipe.recipe.task import ArithmeticTask;"
        "from kdpipe.data.tasks.arithmetic import read_problems, words;"
        "print(read_problems(ArithmeticTask(kind='arithmetic', train_problems=50)), words())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            cwd=Path(__file__).parents[2],
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_the_test_split_does_not_change_with_the_size_of_train():
    assert (
        make_problems(arithmetic(train_problems=10))[1] == make_problems(arithmetic(train_problems=5000))[1]
    )


def test_one_and_two_steps_are_about_as_many_and_settings_choose():
    def num_steps(problems):
        return [problem.solution.count("\n") for problem in problems]

    train, test = make_problems(arithmetic(train_problems=2000))
    assert abs(num_steps(train).count(1) - 1000) < 50
    assert abs(num_steps(test).count(1) - 100) < 10
    for steps in (1, 2):
        train, test = make_problems(arithmetic(steps=[steps], train_problems=500))
        assert set(num_steps(train + test)) == {steps}


@pytest.mark.parametrize("max_operand", [5, 20, 99])
def test_operands_stay_in_range_and_reach_its_ends(max_operand):
    train, test = make_problems(arithmetic(max_operand=max_operand, train_problems=500))
    numbers = {number for problem in train + test for number in operands_and_template(problem)[1:]}
    assert (min(numbers), max(numbers)) == (1, max_operand)


def test_asking_for_more_problems_than_there_are_says_how_many_there_are():
    # One step, operands to n: 4 templates with all n*n pairs, 4 with the n*(n+1)/2 pairs a >= b.
    there_are = 4 * 25 + 4 * 15
    task = arithmetic(steps=[1], max_operand=5, train_problems=there_are - 20, test_problems=20)
    assert len(make_problems(task)[0]) == there_are - 20
    for update in ({"train_problems": there_are - 19}, {"test_problems": there_are + 1}):
        with pytest.raises(DataError, match=f"there are {there_are}$"):
            make_problems(task.model_copy(update=update))


def test_words_hold_every_word_of_the_problems_and_no_other():
    train, test = make_problems(arithmetic())
    texts = "\n".join(f"{problem.question}\n{problem.solution}" for problem in train + test)
    used = set(re.findall(r"[0-9]|\n|[.?]|[^\s0-9.?]+", texts))
    assert words() == sorted(used)


def test_importing_tasks_and_prompting_loads_nothing_heavy():
    code = (
        "import sys, kdpipe.data.tasks, kdpipe.models.prompting;"
        "print({'torch', 'transformers', 'tokenizers', 'pyarrow', 'numpy', 'jinja2'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "set()\n"
