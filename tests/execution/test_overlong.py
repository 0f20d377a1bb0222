"""What must fit is counted in tokens at a run's start, and what does not fit is refused or left out everywhere."""

import json
from pathlib import Path

import pytest

from kdpipe.errors import PreflightError
from kdpipe.execution import overlong
from kdpipe.pipeline.identities import Sources
from tests import clinic
from tests.worlds import Watcher, run_near


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return clinic.write_world(tmp_path_factory.mktemp("world"))


def lengthened(world: Path, folder: Path, split: str, row: int, **texts: str) -> Path:
    """The world with other texts in one record of a split."""
    for name in ("student", "teacher", "train.jsonl", "test.jsonl"):
        (folder / name).symlink_to(world / name)
    rows = [json.loads(line) for line in (world / f"{split}.jsonl").read_text().splitlines()]
    rows[row] |= texts
    (folder / f"{split}.jsonl").unlink()
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder


LONG = "Tom has 7 pens " * 25


def test_one_prompt_that_does_not_fit_is_refused_at_the_start_with_its_length(world, tmp_path):
    for split, row in (("train", 3), ("test", 5)):
        folder = tmp_path / split
        folder.mkdir()
        loaded = clinic.load_world(lengthened(world, folder, split, row, question=LONG))
        with pytest.raises(
            PreflightError, match=f"1 of .* {split} problems do not fit the context of 96"
        ) as caught:
            run_near(loaded, folder / "out")
        assert f"jsonl/{split}/{row}: a prompt of 101 + 16 new tokens" in caught.value.message
        assert "task.drop_overlong" in caught.value.hint


def test_a_solution_counts_where_it_is_trained_on(world, tmp_path):
    answer = "Tom has " * 45 + "\n#### 7"
    folder = lengthened(world, tmp_path, "train", 3, answer=answer)
    with pytest.raises(PreflightError, match=r"jsonl/train/3: .* tokens of its solution"):
        run_near(clinic.load_world(folder, rollout__on_policy_fraction=0.5), folder / "off policy")
    with pytest.raises(PreflightError, match=r"jsonl/train/3: .* tokens of its solution"):
        run_near(clinic.load_world(folder, student__sft={"steps": 1, "batch": 2}), folder / "sft")
    few = {"steps": 1, "batch": 2, "problems": 3}
    run_near(clinic.load_world(folder, student__sft=few), folder / "few", rounds=0)


def test_what_is_left_out_is_counted_once_and_the_same_when_a_run_goes_on(world, tmp_path, monkeypatch):
    folder = lengthened(world, tmp_path, "train", 3, question=LONG)
    loaded = clinic.load_world(folder, task__drop_overlong=True, rollout__prompts=23)
    project = run_near(loaded, folder / "out", rounds=0)
    remembered = json.loads((project.run.path / "prompts.json").read_text())["value"]
    assert (remembered["train"], remembered["test"]) == (["jsonl/train/3"], [])
    monkeypatch.setattr(overlong, "_counted", None)  # what is known is not counted again
    seen, said = Watcher(), []
    seen.on_event = lambda _step, event: said.append(event.get("text", ""))
    run_near(loaded, folder / "out", watcher=seen)
    assert sum("1 of 24 train and 0 of 8 test problems are left out" in text for text in said) == 1


def test_what_decides_who_is_left_out_is_part_of_what_the_data_are(world):
    def data(**changes):
        return Sources(clinic.load_world(world, **changes), world / "out").identities().data

    kept = data(task__drop_overlong=True)
    assert data() == data(rollout__max_new_tokens=8)
    assert kept != data(task__drop_overlong=True, rollout__max_new_tokens=8)
    assert kept["train"]["digest"] == data()["train"]["digest"]
