import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdpipe.data.rows import Turn
from kdpipe.data.tasks import read_problems
from kdpipe.errors import DataError
from kdpipe.recipe.task import JsonlTask

ASKED, SAID = {"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "It is 5.\n#### 5"}
SYSTEM = {"role": "system", "content": "You add."}
PARTS = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "3?"}]
GOOD = b'{"question": "q", "answer": "1"}\n'


def read(folder, rows, say=lambda _: None, **settings):
    """The problems of one file of rows, a list of objects or bytes with a suffix."""
    name, content = rows if isinstance(rows, tuple) else ("data.jsonl", rows)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content).encode()
    (folder / name).write_bytes(content)
    task = JsonlTask(kind="jsonl", train=name, test=name, **settings)
    return read_problems(task, folder, say=say)[0]


NESTED = {"task": {"asked": {"text": "2 + 3?"}, "right": 5}, "meta": {"id": "a"}, "a.b": "x"}


def test_a_dot_names_what_is_in_an_object_unless_a_field_has_that_name(tmp_path):
    named = {"question_field": "task.asked.text", "answer_field": "task.right", "id_field": "meta.id"}
    task = JsonlTask(kind="jsonl", train="a.jsonl", test="b.jsonl", **named)
    (tmp_path / "a.jsonl").write_text(json.dumps(NESTED) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps(NESTED | {"meta": {"id": "b"}}) + "\n")
    [found], _ = read_problems(task, tmp_path)
    assert (found.prompt_id, found.question, found.expected) == ("a", "2 + 3?", "5")
    assert read(tmp_path, [NESTED], question_field="a.b", answer_field="task.right")[0].question == "x"
    with pytest.raises(DataError, match=r"no record has the field 'task\.wrong'"):
        read(tmp_path, [NESTED], question_field="a.b", answer_field="task.wrong")
    with pytest.raises(DataError) as caught:
        read(tmp_path, [NESTED], question_field="task.asked", answer_field="task.right")
    assert caught.value.hint.endswith("; what is in an object is named with a dot: task.asked.text")


ASKS = {"question": "The capital of France?"}
LISTED = "The capital of France?\n\nA) Rome\nB) Paris"


@pytest.mark.parametrize(
    "record",
    [
        ASKS | {"choices": ["Rome", "Paris"], "answer": "B"},
        ASKS | {"choices": ["Rome", "Paris"], "answer": "paris"},
        ASKS | {"choices": ["Rome", "Paris"], "answer": 1},  # MMLU
        ASKS | {"choices": {"text": ["Rome", "Paris"], "label": ["1", "2"]}, "answer": "2"},  # ARC
        ASKS | {"options": {"A": "Rome", "B": "Paris"}, "answer": "B"},
        {"question": LISTED, "answer": "It is Paris.\n#### Paris"},
        {"question": LISTED, "choices": ["Paris", "Rome"], "answer": "Paris"},
    ],
)
def test_options_of_a_choice_are_listed_and_the_reference_is_a_letter(tmp_path, record):
    said = []
    [problem] = read(tmp_path, [record], grader="choice", say=said.append)
    assert (problem.question, problem.expected) == (LISTED, "B")
    assert ("with its options below it, where it does not list them" in said[0]) == (len(record) == 3)


def test_options_are_listed_for_a_choice_alone_and_an_answer_that_is_none_of_them_is_refused(tmp_path):
    record = ASKS | {"choices": ["Rome", "Paris"], "answer": "Oslo"}
    assert read(tmp_path, [record], grader="exact")[0].question == ASKS["question"]
    with pytest.raises(DataError, match="the answer is or ends in 'Oslo', expected a letter from A to E"):
        read(tmp_path, [record], grader="choice")


def test_what_is_below_a_question_is_said(tmp_path):
    said = []
    read(tmp_path, [{"instruction": "Add.", "input": "2 + 3", "output": "5"}], say=said.append)
    assert said == [
        "task: of each record 'instruction' is asked with 'input' below it, and 'output' is its answer"
    ]
    with pytest.raises(DataError, match="field 'input' is a list of text, expected text"):
        read(tmp_path, [{"instruction": "Add.", "input": ["2"], "output": "5"}])


def parquet(folder, rows):
    pq.write_table(pa.Table.from_pylist(rows), folder / "made.parquet")
    return "data.parquet", (folder / "made.parquet").read_bytes()


@pytest.mark.parametrize(
    ("record", "turns", "question", "expected", "solution"),
    [
        ({"prompt": "2 + 3?", "answer": 5}, (), "2 + 3?", "5", "5"),
        ({"prompt": [ASKED], "completion": [SAID]}, (), "2 + 3?", "5", SAID["content"]),
        ({"messages": [ASKED, SAID]}, (), "2 + 3?", "5", SAID["content"]),
        ({"messages": [ASKED, SAID], "answer": 5.0}, (), "2 + 3?", "5.0", SAID["content"]),
        (
            {"messages": [SYSTEM, ASKED, SAID, {"role": "user", "content": "And 4?"}], "answer": "9"},
            (Turn("system", "You add."), Turn("user", "2 + 3?"), Turn("assistant", SAID["content"])),
            "And 4?",
            "9",
            "9",
        ),
        (
            {"messages": [{"role": "user", "content": PARTS}], "answer": 1e20},
            (),
            "2 + 3?",
            "100000000000000000000",
            "100000000000000000000",
        ),
        ({"problem": "2 + 3?", "solution": "#### 5", "level": 3}, (), "2 + 3?", "5", "#### 5"),
        ({"instruction": "Add.", "input": "2 + 3", "output": "5"}, (), "Add.\n\n2 + 3", "5", "5"),
        ({"instruction": "2 + 3?", "input": "", "output": "It is 5.\n#### 5"}, (), "2 + 3?", "5", "It is 5.\n#### 5"),
        ({"instruction": "You add.", "question": "2 + 3?", "output": "5"}, (), "2 + 3?", "5", "5"),
        ({"prompt": [ASKED], "reward_model": {"style": "rule", "ground_truth": "5"}}, (), "2 + 3?", "5", "5"),
        ({"question": "2 + 3?", "answer": 10**400, "x": 10**400}, (), "2 + 3?", str(10**400), str(10**400)),
    ],
)  # fmt: skip
def test_a_record_of_a_form_that_people_have_is_read_from_jsonl_and_parquet(
    tmp_path, record, turns, question, expected, solution
):
    sources = [[record], parquet(tmp_path, [record]) if "x" not in record else [record]]
    for source in sources:
        [problem] = read(tmp_path, source)
        assert (problem.turns, problem.question) == (turns, question)
        assert (problem.expected, problem.solution) == (expected, solution)
        assert "answer" not in problem.fields


def test_prompts_need_no_answer_where_nothing_is_graded(tmp_path):
    for record in ({"prompt": "Write a poem."}, {"messages": [{"role": "user", "content": "Write a poem."}]}):
        [problem] = read(tmp_path, [record], grader="none")
        assert (problem.question, problem.expected, problem.solution) == ("Write a poem.", None, None)
        with pytest.raises(DataError, match="no answer to grade by"):
            read(tmp_path, [record])
    solved, other = read(
        tmp_path, [{"prompt": "a", "answer": "text"}, {"prompt": "b", "answer": None}], grader="none"
    )
    assert (solved.solution, solved.expected, other.solution) == ("text", None, None)


def test_csv_keeps_quotes_commas_and_newlines_and_reads_numbers_as_they_are_written(tmp_path):
    text = '\ufeffprompt,answer,id\r\n"a, ""b""\nc",007,x\r\n\r\nplain,"1,000",y\r\n'
    first, second = read(tmp_path, ("data.csv", text.encode()))
    assert (first.question, first.expected, first.fields) == ('a, "b"\nc', "007", {"id": "x"})
    assert (second.question, second.expected) == ("plain", "1,000")
    [tabbed] = read(tmp_path, ("data.tsv", b"question\tanswer\na,b\t1\n"))
    assert tabbed.question == "a,b"


def test_the_fields_that_were_found_are_said_once_and_those_that_are_named_are_not(tmp_path):
    said = []
    read(tmp_path, [{"prompt": "a", "response": "1"}] * 2, say=said.append)
    assert said == ["task: of each record 'prompt' is asked, and 'response' is its answer"]
    read(
        tmp_path,
        [{"prompt": "a", "response": "1"}],
        said.append,
        question_field="prompt",
        answer_field="response",
    )
    assert len(said) == 1


def test_train_and_test_may_have_a_form_each_and_no_answer_of_one_is_looked_for_in_the_other(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "test.jsonl").write_text('{"question": "b", "answer": "2"}\n')
    said = []
    task = JsonlTask(kind="jsonl", train="train.jsonl", test="test.jsonl", grader="none")
    [train], [test] = read_problems(task, tmp_path, say=said.append)
    assert (train.question, train.solution, test.question, test.solution) == ("a", None, "b", "2")
    [told] = said
    assert told == (
        "task: of each record of train 'prompt' is asked, and no field is its answer; "
        "of test 'question' is asked, and 'answer' is its answer"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" + GOOD.strip() + b"]", "a JSON array, expected JSONL"),
        (b"[\n" + GOOD + b"]", "a JSON array, expected JSONL"),
        (b'{\n  "question": "q",\n  "answer": "1"\n}\n', "JSON over several lines, expected JSONL"),
        (b"question,answer\nq,1\n", "CSV with the columns question, answer, expected JSONL"),
        (b"{'question': 'q', 'answer': '1'}", "objects as Python prints them"),
        (b"Write a poem.\n", "plain text, 'Write a poem.'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer, not the data"),
        (b"<!doctype html><html>", "a page of HTML or XML"),
        (b"PAR1xxxx", "a parquet file"),
        (gzip.compress(GOOD, mtime=0), "packed by gzip"),
        ("\ufeff{}".encode("utf-16-le"), "text in UTF-16"),
        (b'{"question": "q", "answer": "1", "answer": "2"}', ":1: .* the key 'answer' stands twice"),
        (b'{"messages": [{"role": "user", "role": "user", "content": "q"}]}', "the key 'role' stands twice"),
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_refused_by_the_form_it_has_with_one_right_line(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as found:
        read(tmp_path, content)
    assert found.value.hint
    if b"git-lfs" in content or content[:2] == b"\x1f\x8b":
        for name in ("data.parquet", "data.csv"):
            with pytest.raises(DataError, match=message):
                read(tmp_path, (name, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"question,answer\nq,1,2\n", r"data\.csv:2: 3 values, expected 2: question, answer"),
        (b'question,answer\n"q"x,1\n', r"data\.csv:2: not CSV"),
        (b'question,answer\n"q,1\n', "not CSV"),
        (b"question;answer\nq;1\n", "separated by ';', expected commas"),
        (b"answer,answer\nq,1\n", "the column 'answer' stands twice"),
        (b"question,answer\n\xe9,1\n", r"data\.csv:2: not UTF-8"),
        (b"question,answer\n", "holds no records"),
    ],
)
def test_a_csv_file_that_is_none_is_refused_with_its_line(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, ("data.csv", content))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": [{"from": "human", "value": "q"}]}, r"'conversations\[0\]' is a turn of ShareGPT"),
        ({"messages": [SAID]}, "asks with no turn of the user"),
        ({"messages": []}, "asks with no turn of the user"),
        ({"messages": [ASKED, SAID, SAID]}, "asks with a turn of the assistant"),
        ({"messages": [SYSTEM]}, "asks with a turn of the system"),
        ({"messages": [ASKED, SYSTEM]}, "a system turn after others"),
        ({"messages": [{"role": "tool", "content": "x"}, ASKED]}, r"messages\[0\]' is a turn of 'tool'"),
        ({"messages": [{"role": "user"}]}, "a turn with 'role', expected"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "a turn with 'tool_calls'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url'"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\]\.content' is 5, expected text"),
        ({"messages": json.dumps([ASKED])}, "a list written as text"),
        ({"prompt": ["q"]}, r"'prompt\[0\]' is text, expected a turn"),
        ({"prompt": {"text": "q", "id": 1}}, "an object with 'text', 'id', expected text or a list of turns"),
    ],
)
def test_a_conversation_of_another_form_is_refused_by_its_turn_with_one_right_line(tmp_path, record, message):
    with pytest.raises(DataError, match=message) as found:
        read(tmp_path, [record], grader="none")
    assert "one right line: {" in found.value.hint or "write it in quotes" in found.value.hint


@pytest.mark.parametrize(
    "answer", ["1.000,50", "1,5", "1,00,000", "12,34", "1,0000", "forty", "1/2", True, 1e999, ["5"]]
)
def test_an_answer_that_is_no_number_as_it_is_written_here_is_refused(tmp_path, answer):
    with pytest.raises(DataError, match=r"data\.jsonl:1: "):
        read(tmp_path, [{"question": "q", "answer": answer}])


@pytest.mark.parametrize(
    ("answer", "reader", "message"),
    [
        ("#### 11, no:\n#### 5", "strict", "ends in '5', but task.headline: strict reads '11,'"),
        ("it is\n####5", "strict", "strict reads None"),
        ("it is\n####5", "flexible", None),
        ("#### 11, no:\n#### 5", "flexible", None),
        ("5", "strict", None),
    ],
)
def test_a_solution_in_which_the_headlines_reader_reads_another_number_is_refused(
    tmp_path, answer, reader, message
):
    rows = [{"question": "q", "answer": answer}]
    if message is None:
        assert read(tmp_path, rows, headline=reader, reward="flexible")[0].expected == "5"
        return
    with pytest.raises(DataError, match=message):
        read(tmp_path, rows, headline=reader)


def test_an_answer_field_that_no_record_has_is_refused_also_where_nothing_is_graded(tmp_path):
    with pytest.raises(DataError, match="no record has the field 'reply'; this one has: 'prompt', 'answer'"):
        read(tmp_path, [{"prompt": "q", "answer": "1"}], answer_field="reply", grader="none")


def test_a_record_without_a_known_question_says_what_it_has(tmp_path):
    with pytest.raises(DataError, match="the record has: 'task', 'output'") as found:
        read(tmp_path, [{"task": "q", "output": "1"}])
    assert "task.question_field" in found.value.hint
