import json
import sys

import pytest

from kdpipe.data.tasks import data_files, read_problems
from kdpipe.errors import DataError, PreflightError
from kdpipe.recipe.task import DatasetTask

pytestmark = pytest.mark.slow  # importing the library takes seconds


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two configurations of a data set, in the layout of the hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("sums", "chats"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    turns = [{"role": "user", "content": "Hello."}]
    rows = {
        "sums": [{"question": f"{row} + 1?", "answer": row + 1} for row in range(20)],
        "chats": [{"messages": turns, "source": None}, {"messages": turns, "source": "a"}],
    }
    for name, records in rows.items():
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / name / "rows.jsonl").write_text(lines)
    return tmp_path


def dataset(**settings):
    return DatasetTask(kind="dataset", path=".", **settings)


def test_slices_of_a_configuration_are_train_and_test(folder):
    task = dataset(config="sums", split={"train": "train[:90%]", "test": "train[90%:]"})
    train, test = read_problems(task, folder)
    assert [problem.expected for problem in train] == [str(row + 1) for row in range(18)]
    assert [(problem.prompt_id, problem.question) for problem in test] == [
        ("dataset/test/0", "18 + 1?"),
        ("dataset/test/1", "19 + 1?"),
    ]
    assert {name.partition("/")[0] for name in data_files(task, folder)} == {"train", "test"}


def test_its_records_have_the_forms_of_other_data(folder):
    task = dataset(config="chats", grader="none", split={"test": "train"})
    [first, second], _ = read_problems(task, folder)
    assert (first.question, first.expected, first.fields) == ("Hello.", None, {})
    assert second.fields == {"source": "a"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": "none"}, r"config none, split 'train': .*Available: \['sums', 'chats'\]"),
        ({"config": "sums"}, """split 'test': Unknown split "test"."""),
        ({"config": "sums", "split": {"train": "train[:90"}}, r"Unrecognized instruction format"),
        ({"config": "sums", "split": {"train": "train[:0]"}}, "corresponds to no data"),
        ({}, "Config name is missing"),
    ],
)  # fmt: skip
def test_what_the_library_refuses_is_one_sentence(folder, settings, message):
    with pytest.raises(DataError, match=message) as found:
        read_problems(dataset(**settings), folder)
    assert "\n" not in found.value.message


def test_without_the_library_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PreflightError) as found:
        read_problems(dataset(config="sums"), folder)
    assert found.value.hint == 'install it: pip install "kdpipe[data]"'
