"""A teacher behind a server through whole runs: its scores, its moves, its failures, and what its key gets into."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kdpipe.data.tasks.arithmetic import words
from kdpipe.engines.hf.engine import HfEngine
from kdpipe.errors import EngineError, ModelError, PreflightError, RecipeError
from kdpipe.models.cache import ModelCache
from kdpipe.models.folder import scratch_model, write_model
from kdpipe.models.source import ModelSource
from kdpipe.models.tokenizer import arithmetic_tokenizer, num_ids_in_use
from kdpipe.recipe.models import Scratch
from kdpipe.recipe.runtime import Runtime
from tests.fakes import FakeEngine
from tests.serving import MODEL, Reply, Served, Twist, serve
from tests.worlds import Watcher, events_of, leftovers, load_tiny, payload_digests, run_near

KEY = "sk-canary-9876543210"
TOP5 = {"kd": {"term": "jsd", "beta": 1.0, "support": {"teacher_top_k": 5}}}
NUM_IDS = num_ids_in_use(arithmetic_tokenizer(words()))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random teacher with the task's tokenizer."""
    folder = tmp_path_factory.mktemp("served") / "model"
    folder.mkdir()
    sizes = Scratch(
        hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, init_std=0.3
    )
    network = scratch_model(sizes, num_ids=NUM_IDS, eos_id=1, pad_id=0, seed=3)
    write_model(network, arithmetic_tokenizer(words()), folder, dtype=torch.float32)
    return folder


@pytest.fixture
def served(model: Path) -> Iterator[Served]:
    engine = HfEngine(
        ModelCache(torch.device("cpu")), Runtime(sample_tokens=4096, score_tokens=4096, head_chunk_tokens=512)
    )
    engine.load(ModelSource(model, "teacher", dtype="float32"))
    with serve(engine, rows=NUM_IDS, context=256) as found:
        yield found


@pytest.fixture
def tokenizer(model: Path, tmp_path: Path) -> Path:
    """The teacher's tokenizer alone, as where its weights are elsewhere."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def changes(*urls: str, server: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    section = {"urls": list(urls), "model": MODEL, "tokenizer": "./tokenizer", **(server or {})}
    return {"rounds": 2, "teachers": [{"server": section}], **more}


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def plain(model: LlamaForCausalLM, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log-probs [n, V] at each completion token, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1, :NUM_IDS].log_softmax(-1)


@pytest.mark.slow
@pytest.mark.usefixtures("tokenizer")
def test_a_run_is_taught_by_a_server_and_goes_on_elsewhere_when_it_moves(
    served: Served, model: Path, tmp_path: Path
) -> None:
    more = {"train": {"objective": TOP5, "minibatches": 2}, "runtime__preflight": True}
    project = run_near(load_tiny(tmp_path, **changes(served.url, **more)), tmp_path / "out")
    wide = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    for number in (1, 2):
        folder = project.run.path / f"round-{number:03d}"
        pairs = zip(
            rows(folder / "rollout" / "rollouts.parquet"),
            rows(folder / "teacher-score" / "scores.parquet"),
            strict=True,
        )
        for rollout, score in pairs:
            ids = rollout["completion_token_ids"]
            logprobs = plain(wide, rollout["prompt_token_ids"], ids)
            expected = [float(logprobs[t, token]) for t, token in enumerate(ids)]
            assert score["teacher_logprobs"] == pytest.approx(expected, abs=1e-4)
            best = logprobs.topk(5)
            assert score["topk_ids"] == best.indices.tolist()
            for values, wanted in zip(score["topk_logprobs"], best.values.tolist(), strict=True):
                assert values == pytest.approx(wanted, abs=1e-4)
    summary = json.loads((project.run.path / "round-000/evaluate-teacher/summary.json").read_text())
    assert summary["model"] == "teacher"
    kl = json.loads((project.run.path / "round-002/evaluate-student/summary.json").read_text())
    assert kl["reverse_kl_nats"] > 0

    before, asked = payload_digests(tmp_path / "out"), len(served.bodies)
    moved = changes("http://127.0.0.1:9/v1", server={"api_key_env": "NOT_SET_AND_NOT_NEEDED"}, **more)
    watcher = Watcher()
    again = run_near(load_tiny(tmp_path, **moved), tmp_path / "out", watcher=watcher)
    assert again.run.path == project.run.path
    assert watcher.performed == []
    assert payload_digests(tmp_path / "out") == before
    assert len(served.bodies) == asked


def few_logprobs(served: Served) -> Twist:
    said = {"error": {"message": "Requested prompt logprobs of 5, which is greater than max allowed: 4"}}
    return lambda number, reply: (
        Reply(said, 400) if (served.bodies[number].get("prompt_logprobs") or 0) > 4 else reply
    )


def short_requests(served: Served) -> Twist:
    return lambda number, reply: Reply(b"", 413) if len(served.bodies[number]["prompt"]) > 24 else reply


def otherwise_after(field: str) -> Callable[[Served], Twist]:
    """A server whose scores are others once it was asked for something else."""

    def make(served: Served) -> Twist:
        def twist(number: int, reply: Reply) -> Reply:
            if any(body.get(field) for body in served.bodies[:number]):
                for row in reply.body["choices"][0].get("prompt_logprobs", [None])[1:]:
                    for entry in row.values():
                        entry["logprob"] -= 2.0
            return reply

        return twist

    return make


def no_sampled_ids(_served: Served) -> Twist:
    def twist(_number: int, reply: Reply) -> Reply:
        reply.body["choices"][0].pop("token_ids")
        return reply

    return twist


LACKS: dict[str, tuple[Callable[[Served], Twist], str]] = {
    "logprobs": (few_logprobs, r"HTTP 400: Requested prompt logprobs of 5.*--max-logprobs 64"),
    "long requests": (short_requests, r"context \(teacher\): .*HTTP 413"),
    "memory of a top k": (otherwise_after("prompt_logprobs"), r"same twice \(teacher\)"),
    "memory of a sample": (otherwise_after("seed"), r"same twice \(teacher\)"),
    "ids of samples": (no_sampled_ids, "no token_ids in its reply"),
    "JSON": (lambda _: lambda _n, _r: Reply(b"<html>Sign in"), "no JSON: <html>Sign in"),
}


@pytest.mark.usefixtures("tokenizer")
@pytest.mark.parametrize("lack", LACKS)
def test_a_server_that_lacks_what_the_recipe_needs_is_told_before_the_first_step(
    lack: str, served: Served, tmp_path: Path
) -> None:
    make, said = LACKS[lack]
    served.twist = make(served)
    more = changes(served.url, train={"objective": TOP5}, runtime__preflight=True)
    with pytest.raises(PreflightError, match=said):
        run_near(load_tiny(tmp_path, **more), tmp_path / "out")
    assert not list((tmp_path / "out").glob("store/*/*"))
    assert len(served.bodies) < 16


@pytest.mark.usefixtures("tokenizer")
def test_a_server_that_dies_in_the_middle_costs_only_the_part_that_it_was_at(
    served: Served, tmp_path: Path
) -> None:
    more = {"evaluate": {"teacher": False, "reverse_kl_problems": 0}, "rounds": 1}
    patience = {"runtime__server": {"retries": 0, "concurrency": 1, "max_failures": 1}}
    loaded = load_tiny(tmp_path, **changes(served.url, **more, **patience))
    served.twist = lambda number, reply: reply if number < 8 else Reply(b"", 500)
    with pytest.raises(EngineError, match="HTTP 500") as caught:
        run_near(loaded, tmp_path / "out")
    assert "repeat the command" in caught.value.hint
    served.twist = lambda _number, reply: reply
    project = run_near(loaded, tmp_path / "out")
    # 16 completions in parts of 4: two parts were finished by 8 requests, and the ninth failed.
    assert len(served.bodies) == 9 + 8
    assert leftovers(tmp_path / "out") == []
    scores = rows(project.run.path / "round-001/teacher-score/scores.parquet")
    assert len(scores) == 16
    elsewhere = tmp_path / "elsewhere"
    unbroken = run_near(loaded, elsewhere)
    assert rows(unbroken.run.path / "round-001/teacher-score/scores.parquet") == scores


@pytest.mark.usefixtures("tokenizer")
def test_a_key_gets_into_nothing_that_is_written(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.key = KEY
    more = changes(served.url, server={"api_key_env": "CANARY"}, rounds=1)
    loaded = load_tiny(tmp_path, **more)
    monkeypatch.delenv("CANARY", raising=False)
    with pytest.raises(PreflightError, match="CANARY, which is to hold the key of its server, is not set"):
        run_near(loaded, tmp_path / "out")
    assert not list((tmp_path / "out").glob("store/*/*"))
    monkeypatch.setenv("CANARY", KEY)
    run_near(loaded, tmp_path / "out")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert events_of(tmp_path / "out")


@pytest.mark.usefixtures("tokenizer")
def test_other_weights_under_a_known_name_are_refused_and_taken_under_a_new_one(
    served: Served, tmp_path: Path
) -> None:
    light = {"evaluate": {"teacher": False, "reverse_kl_problems": 0}}
    run_near(load_tiny(tmp_path, **changes(served.url, **light, rounds=1)), tmp_path / "out")
    known = json.loads((tmp_path / "out" / "servers.json").read_text())["value"]
    assert len(known) == 1
    other = FakeEngine(num_rows=NUM_IDS, max_positions=256)
    other.load(ModelSource(tmp_path, "other"))
    served.engine = other
    with pytest.raises(PreflightError, match="teacher 'teacher': its server has other weights") as caught:
        run_near(load_tiny(tmp_path, **changes(served.url, **light)), tmp_path / "out")
    assert "revision" in caught.value.hint
    assert json.loads((tmp_path / "out" / "servers.json").read_text())["value"] == known
    renamed = changes(served.url, server={"revision": "second"}, **light)
    run_near(load_tiny(tmp_path, **renamed), tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / "servers.json").read_text())["value"]) == 2


@pytest.mark.usefixtures("tokenizer")
def test_servers_and_own_models_teach_side_by_side(served: Served, tmp_path: Path) -> None:
    section = changes(served.url)["teachers"][0]
    teachers = [{"name": "far", **section}, {"name": "near", "self": "initial"}]
    loaded = load_tiny(tmp_path, **changes(served.url, rounds=1, evaluate={"reverse_kl_problems": 2}))
    loaded = load_tiny(tmp_path, rounds=1, evaluate={"reverse_kl_problems": 2}, teachers=teachers)
    project = run_near(loaded, tmp_path / "out")
    for name in ("far", "near"):
        assert len(rows(project.run.path / f"round-001/teacher-score-{name}/scores.parquet")) == 16


@pytest.mark.usefixtures("tokenizer")
def test_a_server_writes_the_text_that_the_student_learns(served: Served, tmp_path: Path) -> None:
    text = {"steps": 4, "batch": 8, "problems": 8, "text": "teacher", "samples": 2}
    rollout = {"prompts": 8, "on_policy_fraction": 0.5, "off_policy_text": "teacher", "max_new_tokens": 12}
    light = {"evaluate": {"teacher": False, "reverse_kl_problems": 0}, "train__minibatches": 2}
    loaded = load_tiny(tmp_path, **changes(served.url, rounds=1, student__sft=text, rollout=rollout, **light))
    project = run_near(loaded, tmp_path / "out")
    sampled = [body for body in served.bodies if "logprobs" in body]
    assert len(sampled) == 8 * 2 + 4
    assert len({body["seed"] for body in sampled}) == len(sampled)
    written = rows(project.run.path / "round-001/rollout-teacher/rollouts.parquet")
    assert [row["source"] for row in written] == ["teacher"] * 4


@pytest.mark.usefixtures("tokenizer")
def test_a_server_with_too_short_a_context_is_told_before_anything_is_trained(
    served: Served, tmp_path: Path
) -> None:
    served.context = 16
    with pytest.raises(ModelError, match="do not fit the server's context of 16"):
        run_near(load_tiny(tmp_path, **changes(served.url)), tmp_path / "out")
    with pytest.raises(PreflightError, match=r"of the servers: .* do not fit the server's context of 16"):
        run_near(load_tiny(tmp_path, **changes(served.url, runtime__preflight=True)), tmp_path / "new")
    assert not list((tmp_path / "new").glob("store/*/*"))


def test_what_the_tokenizer_holds_counts_and_weights_beside_it_do_not(model: Path, tmp_path: Path) -> None:
    from kdpipe.pipeline.identities import Sources

    def identity(name: str, **server: Any) -> Any:
        loaded = load_tiny(tmp_path, **changes("http://127.0.0.1:9/v1", server={"tokenizer": name, **server}))
        return Sources(loaded, tmp_path / "out").identities().models["teacher"]

    for name in ("whole", "bare", "other"):
        (tmp_path / name).mkdir()
        for path in model.iterdir():
            if name == "whole" or path.suffix != ".safetensors":
                (tmp_path / name / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "other" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("}", ', "more": 1}', 1))
    assert identity("./whole") == identity("./bare") != identity("./other")
    assert identity("./bare", model="another") != identity("./bare")
    assert identity("./bare", revision="v2") != identity("./bare")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="empty: no tokenizer"):
        identity("./empty")
