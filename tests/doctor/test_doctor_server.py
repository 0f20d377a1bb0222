"""The doctor and a teacher behind a server: what is in the bytes on the wire is caught by its probe."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdpipe.engines.hf.engine import HfEngine
from kdpipe.models.cache import ModelCache
from kdpipe.models.source import ModelSource
from kdpipe.recipe.runtime import Runtime
from tests import clinic
from tests.clinic import Findings, examined, load_world, verdicts, write_world
from tests.serving import MODEL, Reply, Served, serve

TOP5 = {"kd": {"term": "jsd", "beta": 1.0, "support": {"teacher_top_k": 5}}}
ELSEWHERE = {"null test", "own prompt", "own weights", "hidden states"}
"""Probes that need the weights, or the settings, of what runs on the server."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with the teacher's tokenizer in a folder of its own."""
    folder = write_world(tmp_path_factory.mktemp("served"))
    shutil.copytree(folder / "teacher", folder / "tokens", ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    with clinic.one_thread():
        torch.set_num_threads(1)
        cache = ModelCache(torch.device("cpu"))
        engine = HfEngine(cache, Runtime(sample_tokens=4096, score_tokens=4096, head_chunk_tokens=512))
        engine.load(ModelSource(folder / "teacher", "teacher", dtype="float32"))
        with serve(engine, rows=clinic.NUM_IDS, context=clinic.CONTEXT) as found:
            yield found


def asked(served: Served, folder: Path) -> Findings:
    server = {"urls": [served.url], "model": MODEL, "tokenizer": "./tokens"}
    teachers = [{"server": server, "temperature": 1.0}]
    quick = {"retries": 0, "timeout_seconds": 5.0, "concurrency": 2, "max_failures": 1}
    return examined(
        load_world(
            folder, teachers=teachers, train__objective=TOP5, runtime__server=quick, runtime__threads=1
        )
    )


def rows_of(reply: Reply) -> list[tuple[dict[str, Any], str]]:
    """Each token's entries of a scoring reply, with the key of its own."""
    [choice] = reply.body["choices"]
    found = choice.get("prompt_logprobs") or [None]
    return [(row, str(token)) for row, token in zip(found[1:], choice["prompt_token_ids"][1:], strict=False)]


def late(_number: int, reply: Reply) -> Reply:
    """Every entry is that of the token before; the ids stay where they were."""
    rows = rows_of(reply)
    entries = [row[token] for row, token in rows]
    for (row, token), entry in zip(rows[1:], entries[:-1], strict=True):
        row[token] = entry
    return reply


def constant(_number: int, reply: Reply) -> Reply:
    for row, _ in rows_of(reply):
        for entry in row.values():
            entry["logprob"] = -2.995732
    return reply


def without_top_k(_number: int, reply: Reply) -> Reply:
    for row, token in rows_of(reply):
        for key in [key for key in row if key != token]:
            del row[key]
    return reply


def other_ids(_number: int, reply: Reply) -> Reply:
    [choice] = reply.body["choices"]
    choice["prompt_token_ids"] = [*choice["prompt_token_ids"][:-1], 3]
    return reply


def drifting(number: int, reply: Reply) -> Reply:
    for row, _ in rows_of(reply):
        for entry in row.values():
            entry["logprob"] -= 0.5 * number
    return reply


def test_a_healthy_server_passes_what_can_be_asked_of_it(served: Served, folder: Path) -> None:
    findings = asked(served, folder)
    ailing = {probe: verdict for probe, verdict in verdicts(findings).items() if verdict != "ok"}
    assert ailing == dict.fromkeys({*ELSEWHERE, "prompt"}, "skipped"), findings
    assert findings["load", "teacher"]["said"] == "engine server"
    assert "does not load the student's" in findings["null test", "teacher"]["said"]
    assert set(verdicts(findings, about="student").values()) == {"ok"}


@pytest.mark.parametrize(
    ("twist", "probe", "said"),
    [
        (late, "shift", "scores come late"),
        (constant, "not constant", "which is -ln 20: the weights are lost"),
        pytest.param(
            *(without_top_k, "top-k", "of the 5 most probable ids it gives ranks [1]"), marks=pytest.mark.slow
        ),
        (other_ids, "shift", "read other ids than it was sent"),
        (drifting, "same twice", "4 requests again"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_fault_in_the_bytes_is_caught_by_its_probe(
    twist: Callable[[int, Reply], Reply], probe: str, said: str, served: Served, folder: Path
) -> None:
    served.twist = twist
    finding = asked(served, folder)[probe, "teacher"]
    assert finding["verdict"] == "FAILED", finding
    assert said in finding["said"]


def test_a_server_that_serves_another_model_is_caught_by_load(served: Served, folder: Path) -> None:
    served.names = ("other-14b",)
    finding = asked(served, folder)["load", "teacher"]
    assert finding["verdict"] == "FAILED"
    assert f"serves other-14b, not '{MODEL}'" in finding["said"]


def test_a_server_that_is_not_there_is_a_finding_of_load(served: Served, folder: Path) -> None:
    finding = asked(replace(served, url="http://127.0.0.1:9/v1"), folder)["load", "teacher"]
    assert finding["verdict"] == "FAILED"
    assert "127.0.0.1:9" in finding["said"]
