"""The store: entries are whole or not there, damage is found, locks are held."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdpipe.errors import ArtifactError, KdpipeError, LockError, StepError
from kdpipe.store.artifacts import Draft, Entry, Store, tidy, tidy_if_free
from kdpipe.store.durable import append_line, file_digest, read_lines, write_bytes, write_durably, write_json
from kdpipe.store.locks import is_running, run_lock
from kdpipe.store.step import Step

FINGERPRINT = "ab12" * 16


def make_step(step_id: str = "rollout@1", fingerprint: str = FINGERPRINT) -> Step:
    stage = step_id.partition("@")[0]
    return Step(step_id, stage, 1, "", 1, {}, {"stage": stage, "fields": {}}, fingerprint)  # type: ignore[arg-type]


class Notes(list[tuple[str, dict[str, Any]]]):
    def __call__(self, kind: str, fields: Any) -> None:
        self.append((kind, dict(fields)))


def draft_in(workspace: Path, notes: Notes | None = None) -> Draft:
    return Draft(Store(workspace).entry(make_step()), make_step(), note=Notes() if notes is None else notes)


def commit(workspace: Path, *, rows: bytes = b"rows", metric: float = 1.0, started: float = 0.0) -> Entry:
    draft = draft_in(workspace)
    draft.write("rollouts.parquet", lambda path: path.write_bytes(rows) and None)

    def write_model(folder: Path) -> None:
        (folder / "deep").mkdir(parents=True)
        (folder / "config.json").write_bytes(b"{}")
        (folder / "deep" / "weights").write_bytes(b"1234567")

    draft.write("model", write_model)
    draft.metric("rollout/reward_mean", metric)
    draft.commit(inputs={"student": "d1"}, provenance={"started": started})
    return Store(workspace).entry(make_step())


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------------------- durable writes


def test_a_writer_that_raises_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fails(draft: Path) -> None:
        draft.write_bytes(b"half")
        raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        write_durably(path, fails)
    assert path.read_bytes() == b"old"
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert names_in(tmp_path) == {"file"}


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    def folder_with(name: str) -> Callable[[Path], None]:
        def write(draft: Path) -> None:
            draft.mkdir()
            (draft / name).write_text(name)

        return write

    write_durably(tmp_path / "model", folder_with("first"))
    write_durably(tmp_path / "model", folder_with("second"))
    assert names_in(tmp_path / "model") == {"second"}


def test_what_is_written_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, bool]] = []

    def fsync(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        flushed.append((name, (tmp_path / "model").exists()))

    def write(draft: Path) -> None:
        draft.mkdir()
        (draft / "weights").write_bytes(b"1234567")

    monkeypatch.setattr(os, "fsync", fsync)
    write_durably(tmp_path / "model", write)
    assert flushed == [("weights", False), (".tmp-model", False), (tmp_path.name, True)]


KILLED_WRITER = """
import os, sys, signal
from pathlib import Path
from kdpipe.store.durable import write_durably
def writer(draft):
    if sys.argv[2] == "folder":
        draft.mkdir()
        draft = draft / "inside"
    with draft.open("wb") as file:
        file.write(b"x" * 100)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
write_durably(Path(sys.argv[1]), writer)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_process_killed_while_writing_leaves_the_old_and_its_leftovers_go(
    tmp_path: Path, kind: str
) -> None:
    draft = draft_in(tmp_path)
    path = draft.folder / "payload"
    write_bytes(path, b"old")
    done = subprocess.run([sys.executable, "-c", KILLED_WRITER, path, kind], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert (draft.folder / ".tmp-payload").exists()
    draft_in(tmp_path)
    assert not (draft.folder / ".tmp-payload").exists()


def test_a_full_disk_is_a_step_error_that_names_the_path(tmp_path: Path) -> None:
    def full(draft: Path) -> None:
        draft.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StepError, match=r"rollouts\.parquet: cannot be written: No space left") as caught:
        write_durably(tmp_path / "rollouts.parquet", full)
    assert "repeat the command" in caught.value.hint
    assert not (tmp_path / "rollouts.parquet").exists()


def test_a_real_file_limit_while_saving_tensors_is_a_step_error(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from kdpipe.training.optimizer import write_trainer

    tensors = {"weight": torch.zeros(50_000)}
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, old[1]))
    try:
        with pytest.raises(StepError, match=r"trainer: cannot be written: .*File too large") as caught:
            write_durably(
                tmp_path / "trainer", lambda folder: write_trainer(folder, tensors=tensors, state={})
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "ulimit -f" in caught.value.hint
    assert not (tmp_path / "trainer").exists()


def test_a_folder_that_cannot_be_made_is_a_step_error(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where a folder should be")
    with pytest.raises(StepError, match="store"):
        write_bytes(tmp_path / "store" / "rollout" / "x", b"")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EIO, "mend the disk"),
        (errno.EROFS, "--workspace"),
        (errno.EACCES, "the right to it"),
        (errno.EDQUOT, "quota"),
    ],
)
def test_each_fault_of_the_machine_comes_with_what_to_do(tmp_path: Path, number: int, advice: str) -> None:
    def refuse(_draft: Path) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(StepError, match=os.strerror(number)) as caught:
        write_durably(tmp_path / "x", refuse)
    assert advice in caught.value.hint


# ---------------------------------------------------------------------------------------- lines of JSON


def test_a_disk_that_takes_half_a_line_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "events.jsonl", os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:5]))
    with pytest.raises(StepError, match=r"events\.jsonl: cannot be written: No space left") as caught:
        append_line(path, {"event": "step done"})
    assert "free some space" in caught.value.hint
    monkeypatch.undo()
    append_line(path, {"event": "step done"})
    assert read_lines(path) == [{"event": "step done"}]


def test_a_torn_last_line_is_skipped_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append_line(path, {"n": 1})
    with path.open("a") as file:
        file.write('{"n": 2, "event": "part do')
    assert read_lines(path) == [{"n": 1}]
    append_line(path, {"n": 3})
    append_line(path, {"n": 4})
    assert read_lines(path) == [{"n": 1}, {"n": 3}, {"n": 4}]


def test_a_torn_line_may_end_inside_a_character(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append_line(path, {"n": 1})
    with path.open("ab") as file:
        file.write('{"text": "é'.encode()[:-1])
    assert read_lines(path) == [{"n": 1}]


def test_lines_of_a_missing_file_are_none(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "nothing") == []


def test_lines_appended_by_several_threads_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    def write(name: str) -> None:
        for number in range(50):
            append_line(path, {"who": name, "number": number, "text": "x" * 500})

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = read_lines(path)
    assert [row["number"] for row in rows if row["who"] == "a"] == list(range(50))
    assert [row["number"] for row in rows if row["who"] == "b"] == list(range(50))


# ------------------------------------------------------------------------------------------- manifests


def test_a_committed_entry_is_whole(tmp_path: Path) -> None:
    entry = commit(tmp_path)
    manifest = entry.manifest()
    assert manifest is not None
    assert [file.path for file in manifest.files] == [
        "metrics.jsonl",
        "model/config.json",
        "model/deep/weights",
        "rollouts.parquet",
    ]
    assert manifest.inputs == {"student": "d1"}
    assert manifest.dropped == ()
    assert all(file.sha256 == file_digest(entry.folder / file.path) for file in manifest.files)
    assert entry.problem(manifest) is None


def test_an_entry_without_a_manifest_is_not_there(tmp_path: Path) -> None:
    draft = draft_in(tmp_path)
    draft.write("rollouts.parquet", lambda path: path.write_bytes(b"rows") and None)
    assert Store(tmp_path).entry(make_step()).manifest() is None


def edited(**changes: Any) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[: len(text) // 2], "damaged manifest"),
        (lambda _: "", "damaged manifest"),
        (lambda _: "[]", "damaged manifest"),
        (lambda _: "null", "damaged manifest"),
        (edited(self_sha256="0" * 64), "its own sha256"),
        (edited(payload_digest="0" * 64), "its own sha256"),
        (edited(inputs={}), "its own sha256"),
    ],
    ids=["cut", "emptied", "a list", "null", "wrong self digest", "wrong payload digest", "inputs removed"],
)
def test_a_damaged_manifest_is_an_artifact_error_that_names_the_force(
    tmp_path: Path, damage: Callable[[str], str], reason: str
) -> None:
    entry = commit(tmp_path)
    path = entry.folder / "manifest.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ArtifactError, match=reason) as caught:
        entry.manifest()
    assert str(path) in caught.value.message
    assert "--force rollout@1" in caught.value.hint
    assert caught.value.exit_code == 5


def test_a_manifest_that_is_not_text_is_an_artifact_error(tmp_path: Path) -> None:
    entry = commit(tmp_path)
    (entry.folder / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError) as caught:
        entry.manifest()
    assert "--force rollout@1" in caught.value.hint


def test_a_manifest_of_another_step_is_an_artifact_error(tmp_path: Path) -> None:
    entry = commit(tmp_path)
    other = Entry(entry.folder, "rollout@1", FINGERPRINT[:16] + "0" * 48)
    with pytest.raises(ArtifactError, match="another step") as caught:
        other.manifest()
    assert "--force rollout@1" in caught.value.hint


def test_a_manifest_of_a_foreign_format_is_not_to_be_forced(tmp_path: Path) -> None:
    entry = commit(tmp_path)
    path = entry.folder / "manifest.json"
    path.write_text(edited(format=99)(path.read_text()))
    with pytest.raises(ArtifactError, match="format 99") as caught:
        entry.manifest()
    assert "--workspace" in caught.value.hint


# --------------------------------------------------------------------------------------- payload files


def test_missing_and_resized_files_are_problems(tmp_path: Path) -> None:
    entry = commit(tmp_path)
    manifest = entry.manifest()
    assert manifest is not None
    path = entry.folder / "rollouts.parquet"
    path.write_bytes(b"rows and more")
    assert "13 bytes, its manifest says 4" in str(entry.problem(manifest))
    path.unlink()
    assert "is missing" in str(entry.problem(manifest))


def test_opening_checks_the_sha256_of_what_is_opened_and_of_nothing_else(tmp_path: Path) -> None:
    entry = commit(tmp_path)
    (entry.folder / "model" / "deep" / "weights").write_bytes(b"7654321")
    manifest = entry.manifest()
    assert manifest is not None
    assert entry.problem(manifest) is None, "the size is the same"
    assert entry.opened("rollouts.parquet") == entry.folder
    with pytest.raises(ArtifactError, match=r"model/deep/weights: sha256") as caught:
        entry.opened("model")
    assert "--force rollout@1" in caught.value.hint


def test_opening_a_file_that_went_away_is_an_artifact_error(tmp_path: Path) -> None:
    entry = commit(tmp_path)
    (entry.folder / "rollouts.parquet").unlink()
    with pytest.raises(ArtifactError, match="cannot be read") as caught:
        entry.opened("rollouts.parquet")
    assert "--force rollout@1" in caught.value.hint


def test_dropping_frees_and_records_and_changes_no_digest(tmp_path: Path) -> None:
    entry = commit(tmp_path)
    before = entry.manifest()
    assert before is not None
    assert entry.drop("model") == 9
    after = entry.manifest()
    assert after is not None
    assert after.dropped == ("model/config.json", "model/deep/weights")
    assert (after.payload_digest, after.files) == (before.payload_digest, before.files)
    assert entry.problem(after) is None
    assert not (entry.folder / "model").exists()
    assert entry.drop("model") == 0, "a second time frees nothing"


def test_a_drop_killed_before_the_removal_is_finished_by_tidy(tmp_path: Path) -> None:
    entry = commit(tmp_path)
    copy = (entry.folder / "model" / "config.json").read_bytes()
    entry.drop("model")
    (entry.folder / "model").mkdir()
    (entry.folder / "model" / "config.json").write_bytes(copy)
    manifest = entry.manifest()
    assert manifest is not None
    tidy(entry, manifest)
    assert not (entry.folder / "model" / "config.json").exists()
    assert (entry.folder / "rollouts.parquet").exists()


def test_the_payload_digest_depends_on_the_payload_only(tmp_path: Path) -> None:
    def digest(name: str, **changes: Any) -> str:
        manifest = commit(tmp_path / name, **changes).manifest()
        assert manifest is not None
        return manifest.payload_digest

    first = digest("a")
    assert digest("b", metric=2.0, started=1e9) == first
    assert digest("c", rows=b"rowz") != first


def test_discarding_leaves_nothing_but_the_lock(tmp_path: Path) -> None:
    entry = commit(tmp_path)
    with entry.locked(lambda: None):
        entry.discard()
        assert names_in(entry.folder) <= {".lock"}
    assert entry.manifest() is None


# ------------------------------------------------------------------------------- parts and checkpoints


def test_a_finished_part_is_not_made_again(tmp_path: Path) -> None:
    notes = Notes()
    first = draft_in(tmp_path, notes).part(0, lambda path: path.write_bytes(b"zero") and None)
    draft = draft_in(tmp_path, notes)
    assert draft.part(0, lambda _: pytest.fail("made again")) == first
    draft.part(1, lambda path: path.write_bytes(b"one") and None)
    assert first.read_bytes() == b"zero"
    assert notes == [(kind, {"part": part}) for part in (0, 1) for kind in ("part started", "part done")]


def test_a_part_that_fails_is_made_again(tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("engine")

    with pytest.raises(RuntimeError):
        draft_in(tmp_path).part(0, fails)
    path = draft_in(tmp_path).part(0, lambda path: path.write_bytes(b"whole") and None)
    assert path.read_bytes() == b"whole"


def test_checkpoints_carry_metrics_and_older_ones_go(tmp_path: Path) -> None:
    draft = draft_in(tmp_path)
    assert draft.checkpoint() is None
    for step in (2, 4):
        draft.metric("train/loss", float(step), optimizer_step=step)
        draft.write_checkpoint(step, lambda folder: (folder / "state").write_text("s") and None)
    draft.metric("train/loss", 5.0, optimizer_step=5)  # after the checkpoint: lost with the kill
    assert names_in(draft.folder / "checkpoints") == {"step-000004"}

    resumed = draft_in(tmp_path)
    found = resumed.checkpoint()
    assert found is not None
    assert (found[0], (found[1] / "state").read_text()) == (4, "s")
    resumed.metric("train/loss", 5.5, optimizer_step=5)
    resumed.write("completions.parquet", lambda path: path.write_bytes(b"") and None)
    resumed.commit(inputs={}, provenance={})
    rows = read_lines(resumed.folder / "metrics.jsonl")
    assert [(row["optimizer_step"], row["value"]) for row in rows] == [(2, 2.0), (4, 4.0), (5, 5.5)]
    assert not (resumed.folder / "checkpoints").exists()


def test_commit_removes_parts_and_tidy_what_a_kill_left(tmp_path: Path) -> None:
    draft = draft_in(tmp_path)
    draft.part(0, lambda path: path.write_bytes(b"x") and None)
    entry = commit(tmp_path)
    assert not (entry.folder / "parts").exists()
    for leftover in ("parts/part-00000.parquet", "checkpoints/step-000001/x", "model/.tmp-y", ".tmp-z"):
        (entry.folder / leftover).parent.mkdir(parents=True, exist_ok=True)
        (entry.folder / leftover).write_text("")
    manifest = entry.manifest()
    assert manifest is not None
    tidy(entry, manifest)
    assert names_in(entry.folder) - {".lock"} == {
        "fingerprint.json",
        "manifest.json",
        "metrics.jsonl",
        "model",
        "rollouts.parquet",
    }
    assert entry.problem(manifest) is None


@pytest.mark.parametrize("name", ["../x", "/x", "model/../../x", "", ".."])
def test_a_payload_name_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    draft = draft_in(tmp_path)
    with pytest.raises(KdpipeError, match="leads out"):
        draft.write(name, lambda path: path.write_text("escaped") and None)
    with pytest.raises(KdpipeError, match="leads out"):
        draft.write_json(name, {})


# ---------------------------------------------------------------------------------------------- locks


HOLDER = """
import sys
from pathlib import Path
from kdpipe.store.artifacts import Entry
from kdpipe.store.locks import run_lock
folder = Path(sys.argv[2])
lock = run_lock(folder) if sys.argv[1] == "run" else Entry(folder, "rollout@1", "0").locked(lambda: None)
with lock:
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(kind: str, folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, kind, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny-12345678"
    holder = hold("run", folder)
    try:
        assert is_running(folder)
        with (
            pytest.raises(LockError, match=rf"tiny-12345678.*process {holder.pid} on ") as caught,
            run_lock(folder),
        ):
            pytest.fail("both hold it")
        assert caught.value.exit_code == 3
    finally:
        holder.kill()
        holder.communicate()
    assert not is_running(folder)
    with run_lock(folder):  # the lock went with its process, though holder.json stayed
        assert is_running(folder)


def test_whether_a_run_is_going_on_is_seen_without_the_right_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "tiny-12345678"
    holder, real = hold("run", folder), os.open

    def read_only(path: Any, flags: int, *rest: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *rest)

    try:
        monkeypatch.setattr(os, "open", read_only)
        assert is_running(folder)
        monkeypatch.undo()
    finally:
        holder.kill()
        holder.communicate()
    monkeypatch.setattr(os, "open", read_only)
    assert not is_running(folder)


def test_an_entry_that_another_process_makes_is_waited_for(tmp_path: Path) -> None:
    entry = Entry(tmp_path / "store" / "rollout" / "ab12", "rollout@1", "0")
    holder = hold("entry", entry.folder)
    told: list[bool] = []

    def waiting() -> None:
        told.append(True)
        assert holder.stdin is not None
        holder.stdin.close()  # only now does the other let go

    with entry.locked(waiting):
        assert told == [True]
    holder.wait()
    with entry.locked(lambda: pytest.fail("nobody holds it")):
        pass


def test_json_is_written_with_sorted_keys_and_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"b": 1, "a": 2})
    write_json(tmp_path / "b", {"a": 2, "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "c", {"x": float("nan")})


def test_what_another_process_holds_is_left_to_it_to_tidy(tmp_path: Path) -> None:
    """A run that finds a step done while another one's commit still removes its parts keeps its hands off."""
    entry = commit(tmp_path)
    manifest = entry.manifest()
    assert manifest is not None
    part = entry.part(0).path
    part.parent.mkdir()
    part.write_bytes(b"rows")
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()",
            str(entry.folder / ".lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    tidy_if_free(entry, manifest)
    assert part.exists()
    holder.communicate(b"\n")
    tidy_if_free(entry, manifest)
    assert not part.parent.exists()


def test_parts_of_an_attempt_that_began_anew_are_not_left_over(tmp_path: Path) -> None:
    entry = commit(tmp_path)
    manifest = entry.manifest()
    assert manifest is not None
    entry.discard()
    part = entry.part(0).path
    part.parent.mkdir(parents=True)
    part.write_bytes(b"rows")
    tidy_if_free(entry, manifest)
    assert part.exists()
