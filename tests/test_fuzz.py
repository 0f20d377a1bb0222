"""Whatever a recipe, a data file, a completion, a server or a file of the store holds: an answer, or an error of ours.

A few dozen examples of each; `pytest -m slow tests/test_fuzz.py`, or KDPIPE_FUZZ_EXAMPLES=3000, draws
more; with KDPIPE_FUZZ_RANDOM=1, others each time.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
import time
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kdpipe.data.graders.number import (
    extract_expected,
    flexible_answer,
    grade_number,
    parse_number,
    strict_answer,
)
from kdpipe.data.tasks import gsm8k, jsonl
from kdpipe.engines.protocol import Sampling, Scoring
from kdpipe.engines.server.http import HttpClient
from kdpipe.engines.server.replies import MoreIdsNeeded, read_completion, read_scores, served_model
from kdpipe.engines.server.signature import require_same
from kdpipe.errors import ArtifactError, DataError, EngineError, KdpipeError
from kdpipe.pipeline.project import open_project
from kdpipe.pipeline.status import inspect
from kdpipe.recipe.file import load_recipe, shipped
from kdpipe.recipe.models import SftOptimizer
from kdpipe.recipe.runtime import ServerRuntime
from kdpipe.recipe.task import Gsm8kTask, JsonlTask
from kdpipe.store.artifacts import Store
from kdpipe.store.durable import read_lines
from kdpipe.store.manifest import Manifest, StoredFile
from kdpipe.store.sealed import seal, seal_value, unseal_value
from kdpipe.store.step import Step
from kdpipe.training.local import LocalTrainer
from kdpipe.training.optimizer import write_trainer
from tests.nasty_texts import texts
from tests.tiny_models import ROWS, tiny_model
from tests.worlds import tiny_recipe

EXAMPLES, RANDOM = "KDPIPE_FUZZ_EXAMPLES", "KDPIPE_FUZZ_RANDOM"
fuzzed = settings(
    max_examples=int(os.environ.get(EXAMPLES, "50")),
    deadline=None,
    database=None,
    derandomize=RANDOM not in os.environ,  # the gate draws the same examples each time
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, -(10**400)]),
    st.floats(allow_nan=True, allow_infinity=True),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, texts())
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to everything inside a document."""
    found = [at]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*at, key))
    return found


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """The document with one to three things in it replaced, removed, or added."""
    value = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(JUNK)
            continue
        node = value
        for key in path[:-1]:
            node = node[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "add", "twice"])):
            case "replace":
                node[path[-1]] = draw(JUNK)
            case "remove":
                del node[path[-1]]
            case "add" if isinstance(node, dict):
                node[draw(st.text(max_size=6))] = draw(JUNK)
            case "add":
                node.insert(path[-1], draw(JUNK))
            case "twice" if isinstance(node, list):
                node.insert(path[-1], copy.deepcopy(node[path[-1]]))
    return value


# -------------------------------------------------------------------------------------------- recipes

RECIPES = [yaml.safe_load(path.read_text()) for path in shipped()] + [tiny_recipe()]
TEXTS = [path.read_text() for path in shipped()]


@st.composite
def cut_text(draw: st.DrawFn, sources: list[str]) -> str:
    """A text with a piece removed, doubled, or replaced by something nasty."""
    text = draw(st.sampled_from(sources))
    start = draw(st.integers(0, len(text)))
    end = draw(st.integers(start, min(len(text), start + 60)))
    middle = draw(
        st.one_of(
            st.just(""),
            texts(),
            st.just(text[start:end] * 2),
            st.sampled_from(list("{}[]:,-#&*!|>'\"%@`\n\t")),
        )
    )
    return text[:start] + middle + text[end:]


def open_recipe(folder: Path, text: str, *overrides: str) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    with contextlib.suppress(KdpipeError):
        open_project(load_recipe(path, overrides), folder / "out")


@fuzzed
@given(document=st.sampled_from(RECIPES).flatmap(mutated))
def test_any_recipe_document_is_read_or_refused(document: Any, tmp_path: Path) -> None:
    with contextlib.suppress(yaml.YAMLError, ValueError):  # of the writer: what YAML cannot say
        open_recipe(tmp_path, yaml.safe_dump(document, allow_unicode=True))
    open_recipe(tmp_path, json.dumps(document))  # nearly YAML, and not where it says NaN


@fuzzed
@given(text=cut_text(TEXTS))
@example(text="a: " + "[" * 10_000)
@example(text="? " * 5000)
@example(text="a: !!python/object/apply:os.system ['touch owned']")
@example(text="a: &a [*a, *a]")
@example(text="\ufeffname: x")
@example(text="name: \ud800")
@example(text="seed: 0o" + "7" * 10_000)
@example(text="seed: " + "9" * 10_000)
@example(text="rounds: 1e999")
@example(text="a: 2024-99-99")
@example(text="a: 0x" + "f" * 5000)
def test_any_recipe_text_is_read_or_refused(text: str, tmp_path: Path) -> None:
    open_recipe(tmp_path, text)


FIELDS = [".".join(map(str, path)) for recipe in RECIPES for path in places(recipe) if path]


@fuzzed
@given(
    overrides=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(FIELDS), st.one_of(texts(), JUNK.map(json.dumps))).map("=".join),
            texts(),
            st.tuples(texts(), texts()).map("=".join),
        ),
        min_size=1,
        max_size=3,
    )
)
@example(overrides=["teachers.999999999=1"])
@example(overrides=["teachers.-1.name=x"])
@example(overrides=["rounds.x.y=1"])
@example(overrides=["=".join(["a" * 100_000, "1"])])
@example(overrides=["seed=" + "[" * 5000])
def test_any_override_is_taken_or_refused(overrides: list[str], tmp_path: Path) -> None:
    text = yaml.safe_dump(tiny_recipe())
    open_recipe(tmp_path, text, *overrides)


# ----------------------------------------------------------------------------------------------- data

GOOD_ROW = {"id": "a", "question": "How many?", "answer": "two and two\n#### 4", "kind": "x", "n": 3}
LINES = st.one_of(
    mutated(GOOD_ROW).map(lambda row: json.dumps(row).encode()),
    mutated(GOOD_ROW).map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.binary(max_size=40),
    cut_text([json.dumps(GOOD_ROW)]).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.just(json.dumps(GOOD_ROW).encode()),
)


@fuzzed
@given(
    rows=st.lists(LINES, max_size=5),
    names=st.tuples(*[st.sampled_from(["question", "answer", "id", "n", "kind", "none"])] * 3),
)
@example(rows=[b'{"question": "x", "answer": "#### 4", "id": 1e400}'], names=("question", "answer", "id"))
@example(rows=[b'{"question": "x", "answer": 1' + b"0" * 5000 + b"}"], names=("question", "answer", "id"))
@example(rows=[b"[" * 100_000], names=("question", "answer", "id"))
@example(rows=[json.dumps(GOOD_ROW).encode()] * 2, names=("question", "answer", "id"))
@example(rows=[b'{"question": "x", "answer": "9' + b"9" * 6000 + b'"}'], names=("question", "answer", "kind"))
def test_any_data_row_is_read_or_refused(
    rows: list[bytes], names: tuple[str, str, str], tmp_path: Path
) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(rows))
    question, answer, identity = names
    with contextlib.suppress(DataError):
        gsm8k.read_problems(Gsm8kTask(kind="gsm8k", data="."), tmp_path, None, str)
    task = JsonlTask(
        kind="jsonl",
        train="train.jsonl",
        test="test.jsonl",
        question_field=question,
        answer_field=answer,
        id_field=None if identity == "none" else identity,
    )
    with contextlib.suppress(DataError):
        train, _ = jsonl.read_problems(task, tmp_path, None, str)
        for problem in train:
            problem.question.encode()
            json.dumps({**problem.fields, "id": problem.prompt_id}, allow_nan=False)
            grade_number("#### 4", problem.expected, reader="strict")


# -------------------------------------------------------------------------------------------- answers

ANSWERS = st.one_of(
    texts(),
    st.text("0123456789.,-$# \n٣４²/%eE+", max_size=60),
    st.tuples(texts(), st.sampled_from(["#### ", "####", "$", "-", ".", ","]), texts()).map("".join),
)


@fuzzed
@given(text=ANSWERS, expected=ANSWERS)
def test_any_text_has_an_answer_or_none(text: str, expected: str) -> None:
    for found in (strict_answer(text), flexible_answer(text), extract_expected(text)):
        assert found is None or found in text
    number = parse_number(expected)
    if number is None:
        with pytest.raises(ValueError, match="expected a number"):
            grade_number(text, expected, reader="flexible")
        return
    for headline in ("strict", "flexible"):
        graded = grade_number(text, expected, reader=headline)
        answer = graded.answer_strict if headline == "strict" else graded.answer_flexible
        assert graded.correct == (answer is not None and parse_number(answer) == number)


# -------------------------------------------------------------------------------------------- servers

IDS = [5, 3, 7, 2]
SCORED = {
    "model": "m",
    "choices": [
        {
            "prompt_token_ids": IDS,
            "token_ids": [4, 1],
            "finish_reason": "stop",
            "logprobs": {"tokens": ["token_id:4", "token_id:1"], "token_logprobs": [-0.5, -1.5]},
            "prompt_logprobs": [
                None,
                *(
                    {
                        str(token): {"logprob": -1.0, "rank": 2},
                        "0": {"logprob": -0.6, "rank": 1},
                        "9": {"logprob": -3.0, "rank": 3},
                    }
                    for token in IDS[1:]
                ),
            ],
        }
    ],
    "data": [{"id": "m", "max_model_len": 64}],
}
SAMPLING = Sampling(temperature=1.0, max_new_tokens=2, end_ids=(1,), num_ids=10)


def changed(value: Any, key: str, new: Any) -> Any:
    """The document with `new` wherever that key stands."""
    if isinstance(value, dict):
        return {name: new if name == key else changed(item, key, new) for name, item in value.items()}
    return [changed(item, key, new) for item in value] if isinstance(value, list) else value


def read_all(answer: dict[str, Any]) -> None:
    with contextlib.suppress(EngineError):
        served_model(answer, "m", where="x")
    with contextlib.suppress(EngineError):
        completion = read_completion(answer, IDS, SAMPLING, names={"m"}, where="x")
        assert all(value <= 0 for value in completion.logprobs)
    for top_k in (0, 2, 3):
        with contextlib.suppress(EngineError, MoreIdsNeeded):
            scores = read_scores(
                answer, IDS, Scoring(1.0, 10, top_k), start=1, asked=top_k, names={"m"}, where="x"
            )
            assert torch.from_numpy(scores.logprobs).isfinite().all()
            assert (scores.logprobs <= 0).all()


@fuzzed
@given(answer=mutated(SCORED))
@example(answer=SCORED)
@example(answer=changed(SCORED, "logprob", 10**400))
@example(answer=changed(SCORED, "logprob", -(10**400)))
@example(answer=changed(SCORED, "logprob", float("nan")))
@example(answer=changed(SCORED, "rank", 10**400))
@example(answer=changed(SCORED, "token_logprobs", [10**400, -1.0]))
@example(answer=changed(SCORED, "max_model_len", 10**400))
def test_any_reply_is_read_or_refused(answer: Any) -> None:
    if isinstance(answer, dict):
        read_all(answer)


BODIES = st.one_of(
    mutated(SCORED).map(lambda value: json.dumps(value).encode()),
    cut_text([json.dumps(SCORED)]).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=64),
    st.sampled_from(
        [b"", b"{", b"[" * 100_000, b'{"a":' * 50_000, b"null", b"1" * 9000, b"NaN", b"\xff\xfe{"]
    ),
)


@fuzzed
@given(
    data=BODIES,
    status=st.sampled_from([200, 200, 200, 204, 302, 400, 401, 404, 429, 500, 503]),
    after=st.one_of(
        st.none(),
        texts(),
        st.sampled_from(["9" * 400, "1e9", "nan", "Wed, 31 Feb 2099 99:99:99 GMT", "²", "-5"]),
    ),
)
def test_any_body_of_a_reply_is_read_or_refused(data: bytes, status: int, after: str | None) -> None:
    client = HttpClient(
        ["http://127.0.0.1:9"],
        ServerRuntime(timeout_seconds=1.0, retries=1, max_failures=2),
        sleep=lambda _seconds: None,
    )
    headers = Message()
    if after is not None:
        headers["Retry-After"] = after
    client._exchange = lambda *_arguments, **_settings: (status, headers, data)  # type: ignore[method-assign,assignment,return-value]

    def read(answer: dict[str, Any], _url: str) -> None:
        read_all(answer)

    with contextlib.suppress(EngineError):
        client.post("/completions", {}, read, max_bytes=1 << 16, halt=client.begin())
    with contextlib.suppress(EngineError):
        client.each("/models", None, read, max_bytes=1 << 16)
    client.close()


# -------------------------------------------------------------------------------------- the store's files

STEP = Step("rollout@1", "rollout", 1, "", 7, {}, {"stage": "rollout", "fields": {}, "inputs": {}}, "f" * 64)


def signed(document: Any) -> Any:
    """The document with the digest of itself, as one that was not damaged but forged."""
    if not isinstance(document, dict):
        return document
    body = {name: value for name, value in document.items() if name != "self_sha256"}
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        return seal(body)
    return document


def manifest_document() -> Any:
    files = (StoredFile("model/config.json", 2, "0" * 64), StoredFile("rollouts.parquet", 5, "1" * 64))
    provenance = {"step": "rollout@1", "finished": 1.5}
    return Manifest(
        "f" * 64, files, {"student": "d" * 64}, "e" * 64, ("model/config.json",), provenance
    ).to_json()


@fuzzed
@given(
    document=mutated(manifest_document()),
    forged=st.booleans(),
    raw=st.one_of(st.none(), st.binary(max_size=40)),
)
@example(document={**manifest_document(), "dropped": ["../../../outside"]}, forged=True, raw=None)
@example(document={**manifest_document(), "dropped": ["/outside"]}, forged=True, raw=None)
@example(document={**manifest_document(), "dropped": [""]}, forged=True, raw=None)
@example(
    document={**manifest_document(), "files": [{"path": "../x", "bytes": 1, "sha256": "0"}]},
    forged=True,
    raw=None,
)
@example(document=None, forged=False, raw=b"[" * 100_000)
def test_any_manifest_is_read_or_damaged(
    document: Any, forged: bool, raw: bytes | None, tmp_path: Path
) -> None:
    store = Store(tmp_path / "out")
    entry = store.entry(STEP)
    entry.folder.mkdir(parents=True, exist_ok=True)
    outside = tmp_path / "outside"
    outside.write_text("precious")
    data = json.dumps(signed(document) if forged else document).encode() if raw is None else raw
    (entry.folder / "manifest.json").write_bytes(data)
    state = inspect(store, STEP, {})
    assert state.verdict in ("done", "damaged", "to do", "stale")
    with contextlib.suppress(ArtifactError):
        manifest = entry.manifest()
        assert manifest is not None
        entry.problem(manifest)
        for path in (*manifest.dropped, *(file.path for file in manifest.files)):
            assert (entry.folder / path).resolve().is_relative_to(entry.folder.resolve())
        with contextlib.suppress(ArtifactError):
            entry.opened("model", "rollouts.parquet")
    assert outside.read_text() == "precious"


@fuzzed
@given(
    data=st.one_of(
        st.binary(max_size=60),
        cut_text(['{"round": 1, "name": "a/b", "value": 0.5}\n' * 3]).map(
            lambda t: t.encode("utf-8", "surrogatepass")
        ),
    )
)
@example(data=b"[" * 100_000)
@example(data=b"5\nnull\n[]\n")
@example(data=b'{"a": 1' + b"0" * 9000 + b"}")
def test_any_lines_are_read_as_far_as_they_go(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(data)
    assert all(isinstance(row, dict) for row in read_lines(path))


@fuzzed
@given(
    state=mutated({"optimizer_step": 3, "learning_rate": 0.1}),
    raw=st.one_of(st.none(), st.binary(max_size=40)),
)
@example(state={"optimizer_step": -5}, raw=None)
@example(state={"optimizer_step": 10**400}, raw=None)
@example(state={}, raw=b"[" * 100_000)
def test_any_trainer_state_is_taken_or_damaged(state: Any, raw: bytes | None, tmp_path: Path) -> None:
    write_trainer(tmp_path / "trainer", tensors={"exp_avg.x": torch.zeros(2)}, state={})
    data = json.dumps(state).encode() if raw is None else raw
    (tmp_path / "trainer" / "trainer.json").write_bytes(data)
    with contextlib.suppress(ArtifactError):
        TRAINER.restore(tmp_path / "trainer")


TRAINER = LocalTrainer(tiny_model("llama"), SftOptimizer(), num_ids=ROWS, horizon=9)


@fuzzed
@given(document=mutated(seal_value("a note", {"a": 1})), forged=st.booleans())
@example(document=[], forged=False)
@example(document={**seal_value("a note", 1), "value": float("nan")}, forged=False)
def test_any_sealed_file_is_read_or_damaged(document: Any, forged: bool) -> None:
    data = json.dumps(signed(document) if forged else document).encode()
    with contextlib.suppress(ArtifactError):
        unseal_value(Path("x"), data, kind="a note")


@fuzzed
@given(
    data=st.one_of(
        st.binary(max_size=60), mutated({"digest": [-1.0, -2.0]}).map(lambda v: json.dumps(v).encode())
    )
)
@example(data=b"[" * 100_000)
def test_any_note_is_read_or_made_again(data: bytes, tmp_path: Path) -> None:
    """Notes that kdpipe makes again: nothing in them stops a command, nor a document of a former run."""
    workspace = tmp_path / "out"
    workspace.mkdir(exist_ok=True)
    for name in ("digests.json", "servers.json"):
        (workspace / name).write_bytes(data)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe()))
    (workspace / "pins.json").write_bytes(data)
    with contextlib.suppress(ArtifactError):  # which commit a name was pinned to cannot be made again
        open_project(load_recipe(path), workspace)
    (workspace / "pins.json").unlink()
    project = open_project(load_recipe(path), workspace)
    run = project.run.path
    with contextlib.suppress(KdpipeError):
        require_same(workspace, "digest", who="teacher", scores=[-1.0, -2.0])
    step = project.plan.steps[0]
    (run / f"round-{step.round:03d}" / step.link_name).mkdir(parents=True, exist_ok=True)
    for name in ("resolved.json", "mlflow.json", f"round-{step.round:03d}/{step.link_name}/fingerprint.json"):
        (run / name).write_bytes(data)
    (run / "events.jsonl").write_bytes(data)
    assert project.survey()
    from kdpipe.pipeline.retention import Retention
    from kdpipe.tracking.memory import read_memory
    from kdpipe.tracking.pending import pending

    assert Retention(project.run, workspace).droppable() == []
    assert pending(run) == 0
    read_memory(run)


SLOW_TO_MATCH = [
    "-",
    "$",
    ",",
    ".",
    "0",
    "#",
    "#### ",
    "#### -",
    "-$",
    "1,",
    "1.",
    "0.0",
    " ",
    "####\n",
    "9" * 50,
    "..",
]


@pytest.mark.parametrize("piece", SLOW_TO_MATCH)
@pytest.mark.parametrize(
    "end", ["", *(pytest.param(end, marks=pytest.mark.slow) for end in ("x", "#", "-", "\n####"))]
)
def test_time_to_find_an_answer_grows_with_the_length_only(piece: str, end: str) -> None:
    def seconds(size: int) -> float:
        text = piece * (size // len(piece)) + end
        best = 9.0
        for _ in range(3):
            before = time.process_time()
            strict_answer(text), flexible_answer(text), extract_expected(text), parse_number(text)
            best = min(best, time.process_time() - before)
        return best

    # Ten times the text takes ten times as long, and a hundred times as long where each place is tried from each.
    assert seconds(200_000) < 40 * max(seconds(20_000), 2e-4)


@pytest.mark.slow
def test_hundreds_of_examples_of_each_find_nothing() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "test_any",
    ]
    result = subprocess.run(
        command, check=False, env={**os.environ, EXAMPLES: "250"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-8000:]
    assert "passed" in result.stdout
