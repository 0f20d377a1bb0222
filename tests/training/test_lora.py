"""LoRA students: what is trained, kept, shared in memory and exported, against peft's and transformers' own reading."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

import kdpipe.models.cache
import kdpipe.models.logprobs
import kdpipe.pipeline.housekeeping
import kdpipe.pipeline.requirements
from kdpipe.data.tasks.arithmetic import words
from kdpipe.engines.hf.decoding import LlamaDecoder, is_llama_like
from kdpipe.engines.hf.engine import HfEngine
from kdpipe.engines.protocol import SampleRequest, Sampling
from kdpipe.errors import ArtifactError, Interrupted, ModelError, RecipeError, StepError
from kdpipe.models.adapters import (
    LEAST_OF_ALL,
    Reach,
    Targets,
    factors_of,
    is_adapted,
    is_lora,
    merge_adapter,
    reach,
    read_adapter,
    start_adapter,
    switch_adapter,
    targets_of,
    write_adapter,
)
from kdpipe.models.batching import make_batch
from kdpipe.models.cache import ModelCache
from kdpipe.models.folder import head_digest, open_model, reach_of, read_head, write_model
from kdpipe.models.logprobs import Head, body_of, head_of, hidden_states, token_logprobs
from kdpipe.models.source import AdapterSource, ModelSource
from kdpipe.models.tokenizer import arithmetic_tokenizer, num_ids_in_use
from kdpipe.pipeline.housekeeping import export
from kdpipe.pipeline.project import Project, open_project
from kdpipe.recipe.models import Lora, Optimizer
from kdpipe.recipe.runtime import Runtime
from kdpipe.training.local import LocalTrainer
from kdpipe.training.optimizer import read_trainer
from kdpipe.training.protocol import Trainer
from tests.tiny_models import COMMON, CONFIGS, FAST, FLOAT32_NATS, ROWS, tiny_model, tiny_tokenizer
from tests.worlds import NearServer, NearWorker, Watcher, load_tiny, payload_digests, run_near

CPU = torch.device("cpu")
LORA = Lora(rank=3, alpha=6)
ADAPTER_FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
CHANGES: dict[str, Any] = {
    "rounds": 2,
    "student__lora": {"rank": 4, "alpha": 8},
    "teachers": [{"name": "shown", "self": "initial", "prompt": "{question}\n{solution}\n{question}\n"}],
    "train__optimizer": {"learning_rate": 0.03},
    "runtime__keep": {"weights": 1, "optimizer": 1},
}


# --------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two rounds in one warm process; student and teacher are one network in memory."""
    folder = tmp_path_factory.mktemp("lora")
    return run_near(load_tiny(folder, **CHANGES), folder / "out")


@pytest.fixture
def forgetful() -> Iterator[None]:
    NearWorker.forgetful = True
    yield
    NearWorker.forgetful = False


def entry(project: Project, step_id: str) -> Path:
    return project.store.entry(project.plan.step(step_id)).folder


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def logprobs_of(model: Any, prompt: list[int], completion: list[int]) -> list[float]:
    """By one unbatched forward pass."""
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
    return [float(logprobs[len(prompt) - 1 + t, token]) for t, token in enumerate(completion)]


def student_0(project: Project) -> Any:
    folder = entry(project, "sft:student@0") / "model"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def test_a_trained_student_is_its_adapter_and_the_optimizer_of_that(finished: Project) -> None:
    folder = entry(finished, "train@2")
    assert {path.name for path in (folder / "model").iterdir()} == ADAPTER_FILES
    adapter = load_file(folder / "model" / "adapter_model.safetensors")
    layers = 7  # of the one block: four of attention, three of the MLP
    assert len(adapter) == 2 * layers
    tensors, _ = read_trainer(folder / "trainer")
    assert len(tensors) == 2 * len(adapter)
    assert all(".lora_" in name and name.startswith("exp_avg") for name in tensors)
    assert all(weight.dtype == torch.float32 for weight in (*adapter.values(), *tensors.values()))
    assert sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors")) < 8000


def test_the_adapter_says_nothing_of_where_it_was_made(finished: Project) -> None:
    config = (entry(finished, "train@2") / "model" / "adapter_config.json").read_text()
    assert json.loads(config)["base_model_name_or_path"] is None
    for path in entry(finished, "train@2").rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            assert str(finished.workspace.parent).encode() not in path.read_bytes(), path.name


def test_self_initial_scores_are_student_0s_while_the_adapter_is_somewhere_else(finished: Project) -> None:
    plain = student_0(finished)
    moved = PeftModel.from_pretrained(student_0(finished), entry(finished, "train@2") / "model")
    distances = []
    for rollout, score in zip(
        rows(entry(finished, "rollout@2") / "rollouts.parquet"),
        rows(entry(finished, "teacher-score@2") / "scores.parquet"),
        strict=True,
    ):
        prompt, completion = score["teacher_prompt_token_ids"], rollout["completion_token_ids"]
        assert score["teacher_logprobs"] == pytest.approx(
            logprobs_of(plain, prompt, completion), abs=FLOAT32_NATS
        )
        elsewhere = logprobs_of(moved, prompt, completion)
        distances += [abs(a - b) for a, b in zip(score["teacher_logprobs"], elsewhere, strict=True)]
    assert max(distances) > 0.05


@pytest.mark.parametrize(("number", "made_by"), [(1, None), (2, "train@1")])
def test_a_round_samples_from_student_0_with_the_adapter_of_the_round_before(
    finished: Project, number: int, made_by: str | None, tmp_path: Path, forgetful: None
) -> None:
    model = student_0(finished)
    if made_by is not None:  # its weights were dropped since, and are trained again alike
        shutil.copytree(finished.workspace.parent, tmp_path / "copy", symlinks=True)
        loaded = load_tiny(tmp_path / "copy", **CHANGES, runtime__keep__weights=2)
        watcher = Watcher()
        project = run_near(
            loaded, tmp_path / "copy" / "out", watcher=watcher, force=("evaluate:student@1",), rounds=1
        )
        assert watcher.performed == [made_by, "evaluate:student@1"]
        model = PeftModel.from_pretrained(model, entry(project, made_by) / "model")
    for rollout in rows(entry(finished, f"rollout@{number}") / "rollouts.parquet"):
        expected = logprobs_of(model, rollout["prompt_token_ids"], rollout["completion_token_ids"])
        assert rollout["sampler_logprobs"] == pytest.approx(expected, abs=FLOAT32_NATS)


@pytest.mark.parametrize(("round_number", "copies"), [(1, 1), (2, 0)])
def test_a_train_step_asks_for_no_more_space_than_an_adapter_takes(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, round_number: int, copies: int
) -> None:
    """Round 1 for one copy of the model, as no adapter is there to judge by, later rounds for five adapters."""
    shutil.copytree(finished.workspace.parent, tmp_path / "copy", symlinks=True)
    model = entry(finished, "sft:student@0") / "model" / "model.safetensors"
    monkeypatch.setattr(kdpipe.pipeline.requirements, "FREE_BYTES_FLOOR", 0)
    adapter = entry(finished, "train@2") / "model" / "adapter_model.safetensors"
    need = model.stat().st_size if copies else 5 * adapter.stat().st_size
    loaded = load_tiny(tmp_path / "copy", **CHANGES, runtime__keep__weights=2)
    force = (f"train@{round_number}",)
    for free, fits in ((need - 1, False), (need, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _path, free=free: SimpleNamespace(free=free))
        if fits:
            run_near(loaded, tmp_path / "copy" / "out", force=force, rounds=round_number)
        else:
            with pytest.raises(StepError, match=f"train@{round_number} may need"):
                run_near(loaded, tmp_path / "copy" / "out", force=force, rounds=round_number)


@pytest.mark.slow
def test_an_adapter_on_a_named_model_is_the_one_on_a_model_that_a_step_made(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(entry(finished, "sft:student@0") / "model", tmp_path / "model")
    changes = {
        **CHANGES,
        "student": {"model": "./model", "dtype": "float32", "lora": CHANGES["student__lora"]},
    }
    del changes["student__lora"]
    project = run_near(load_tiny(tmp_path, **changes), tmp_path / "out")
    expected = payload_digests(finished.workspace)
    del expected["sft:student@0"]
    assert payload_digests(tmp_path / "out") == expected
    assert digests(export(project, tmp_path / "named", round_number=2).folder) == digests(
        export(finished, tmp_path / "made", round_number=2).folder
    )
    # Nor does the model's size count for free space, once an adapter is there to judge by.
    room = 5 * (entry(project, "train@2") / "model" / "adapter_model.safetensors").stat().st_size
    monkeypatch.setattr(kdpipe.pipeline.requirements, "FREE_BYTES_FLOOR", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room))
    run_near(load_tiny(tmp_path, **changes), tmp_path / "out", force=("train@2",))


def test_retention_drops_old_adapters_and_never_the_model_below(finished: Project) -> None:
    manifests = {
        name: finished.store.entry(finished.plan.step(name)).manifest()
        for name in ("sft:student@0", "train@1")
    }
    dropped = {name: {path.partition("/")[0] for path in m.dropped} for name, m in manifests.items() if m}
    assert dropped == {"sft:student@0": set(), "train@1": {"model", "trainer"}}


@pytest.mark.slow
def test_cold_steps_elsewhere_and_warm_ones_in_another_order_end_with_the_same_digests(
    finished: Project, tmp_path: Path, forgetful: None
) -> None:
    changes = {**CHANGES, "rounds": 3}
    run_near(load_tiny(tmp_path, **changes), tmp_path / "elsewhere")
    cold = payload_digests(tmp_path / "elsewhere")
    assert payload_digests(finished.workspace).items() < cold.items()
    # In one process: adapter 1 is trained again and evaluated, and training goes on with adapter 2.
    NearWorker.forgetful = False
    shutil.copytree(finished.workspace.parent, tmp_path / "copy", symlinks=True)
    watcher = Watcher()
    run_near(
        load_tiny(tmp_path / "copy", **changes),
        tmp_path / "copy" / "out",
        watcher=watcher,
        force=("evaluate:student@1",),
    )
    assert [step for step in watcher.performed if step.startswith("train")] == ["train@1", "train@3"]
    assert payload_digests(tmp_path / "copy" / "out") == cold


def test_a_signal_in_training_leaves_a_checkpoint_of_the_adapter_and_equal_digests(
    finished: Project, tmp_path: Path
) -> None:
    workspace, watcher = tmp_path / "out", Watcher()

    def on_event(step: str, event: dict[str, Any]) -> None:
        if step == "train@2" and event.get("unit") == "optimizer steps" and event["done"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    watcher.on_event = on_event
    loaded = load_tiny(tmp_path, **CHANGES)
    with pytest.raises(Interrupted):
        run_near(loaded, workspace, watcher=watcher)
    checkpoint = entry(open_project(loaded, workspace), "train@2") / "checkpoints" / "step-000001"
    assert {path.name for path in (checkpoint / "model").iterdir()} == ADAPTER_FILES
    watcher = Watcher()
    run_near(loaded, workspace, watcher=watcher)
    assert watcher.performed == ["train@2", "evaluate:student@2"]
    assert payload_digests(workspace) == payload_digests(finished.workspace)


@pytest.mark.slow
def test_a_narrow_model_stays_narrow_and_its_adapter_wide(tmp_path: Path, forgetful: None) -> None:
    little = {"reverse_kl_problems": 0, "problems": 2, "teacher": False, "every": 2}
    changes = {**CHANGES, "student__dtype": "bfloat16", "evaluate": little}
    cold = run_near(load_tiny(tmp_path, **changes), tmp_path / "cold")
    NearWorker.forgetful = False
    run_near(load_tiny(tmp_path, **changes), tmp_path / "warm")
    assert payload_digests(tmp_path / "cold") == payload_digests(tmp_path / "warm")
    folder = entry(cold, "train@2")
    assert {w.dtype for w in load_file(folder / "model/adapter_model.safetensors").values()} == {
        torch.float32
    }
    assert {
        w.dtype for w in load_file(entry(cold, "sft:student@0") / "model/model.safetensors").values()
    } == {torch.bfloat16}
    assert not [name for name in read_trainer(folder / "trainer")[0] if not name.startswith("exp_avg")]


def assert_scored_by(model: Any, project: Project) -> None:
    """Holds the scores of round 2 against a model's own log-probs."""
    for rollout, score in zip(
        rows(entry(project, "rollout@2") / "rollouts.parquet"),
        rows(entry(project, "teacher-score@2") / "scores.parquet"),
        strict=True,
    ):
        expected = logprobs_of(model, score["teacher_prompt_token_ids"], rollout["completion_token_ids"])
        assert score["teacher_logprobs"] == pytest.approx(expected, abs=FLOAT32_NATS)


def test_self_current_scores_are_those_of_the_adapter_that_sampled(tmp_path: Path) -> None:
    teacher = {**CHANGES["teachers"][0], "self": "current"}
    keep = {"weights": 2, "optimizer": 2}
    changes = {**CHANGES, "teachers": [teacher], "runtime__keep": keep}
    project = run_near(load_tiny(tmp_path, **changes), tmp_path / "out")
    model = PeftModel.from_pretrained(student_0(project), entry(project, "train@1") / "model")
    assert_scored_by(model, project)


def test_other_teachers_do_not_drop_the_network_that_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {
        "name": "other",
        "dtype": "float32",
        "scratch": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_layers": 1,
            "num_heads": 2,
            "num_kv_heads": 1,
        },
        "sft": {"steps": 2, "batch": 4},
    }
    changes = {**CHANGES, "teachers": [*CHANGES["teachers"], other]}
    run_near(load_tiny(tmp_path, **changes), tmp_path / "out", rounds=0)
    opened = list[Path]()

    def noted(folder: Path, **settings: Any) -> Any:
        opened.append(folder)
        return open_model(folder, **settings)

    monkeypatch.setattr(kdpipe.models.cache, "open_model", noted)
    project = run_near(load_tiny(tmp_path, **changes), tmp_path / "out")
    assert opened.count(entry(project, "sft:student@0") / "model") == 1
    assert entry(project, "sft:other@0") / "model" in opened


# ------------------------------------------------------------------------------- a cold start of the adapter


def test_a_warm_adapter_is_trained_by_the_cold_start_and_goes_on_from_there(
    finished: Project, tmp_path: Path
) -> None:
    """The named model stays as it is; by peft's own reading each student is that model with its step's adapter."""
    shutil.copytree(entry(finished, "sft:student@0") / "model", tmp_path / "model")
    before = digests(tmp_path / "model")
    start = {"steps": 3, "batch": 4, "optimizer": {"learning_rate": 0.05}}
    lora = {**CHANGES["student__lora"], "warmup": True}
    changes = {name: value for name, value in CHANGES.items() if name != "student__lora"}
    changes["student"] = {"model": "./model", "dtype": "float32", "sft": start, "lora": lora}
    changes["runtime__keep"] = {"weights": 2, "optimizer": 2}
    project = run_near(load_tiny(tmp_path, **changes), tmp_path / "out")
    assert digests(tmp_path / "model") == before
    warm = entry(project, "sft:student@0") / "model"
    assert {path.name for path in warm.iterdir()} == ADAPTER_FILES

    def student(adapter: Path) -> Any:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
        return PeftModel.from_pretrained(base, adapter)

    adapters = {1: warm, 2: entry(project, "train@1") / "model"}
    for number, adapter in adapters.items():
        model = student(adapter)
        for rollout in rows(entry(project, f"rollout@{number}") / "rollouts.parquet"):
            expected = logprobs_of(model, rollout["prompt_token_ids"], rollout["completion_token_ids"])
            assert rollout["sampler_logprobs"] == pytest.approx(expected, abs=FLOAT32_NATS)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in adapters.values())
    assert all(first[name].any() for name in first)
    moved = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert 0 < moved < 0.2  # train went on from there, and did not begin again
    # self: initial is student 0, with the adapter of the cold start.
    model = student(warm)
    assert_scored_by(model, project)
    # And exported, student 0 is both in one.
    merged = AutoModelForCausalLM.from_pretrained(
        export(project, tmp_path / "merged", round_number=0).folder, dtype=torch.float64
    )
    ids = torch.arange(3, 33)[None]
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_cold_start_of_the_adapter_ends_alike_after_a_signal_and_in_cold_processes(
    finished: Project, tmp_path: Path, forgetful: None
) -> None:
    shutil.copytree(entry(finished, "sft:student@0") / "model", tmp_path / "model")
    changes = {name: value for name, value in CHANGES.items() if name != "student__lora"}
    lora = {**CHANGES["student__lora"], "warmup": True}
    start = {"steps": 4, "batch": 4}
    changes["student"] = {"model": "./model", "dtype": "float32", "sft": start, "lora": lora}
    loaded = load_tiny(tmp_path, **changes)
    run_near(loaded, tmp_path / "cold")
    NearWorker.forgetful = False
    watcher = Watcher()

    def on_event(step: str, event: dict[str, Any]) -> None:
        if step == "sft:student@0" and event.get("unit") == "optimizer steps" and event["done"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    watcher.on_event = on_event
    with pytest.raises(Interrupted):
        run_near(loaded, tmp_path / "warm", watcher=watcher)
    run_near(loaded, tmp_path / "warm")
    assert payload_digests(tmp_path / "warm") == payload_digests(tmp_path / "cold")


# -------------------------------------------------------------------------------------------- export


@pytest.fixture(autouse=True)
def export_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are written in this process."""
    monkeypatch.setattr(kdpipe.pipeline.housekeeping, "Worker", NearServer)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_export_is_measured_against_what_was_trained(
    finished: Project, tmp_path: Path, dtype: Any
) -> None:
    """By distributions of peft's own model and of transformers' reading of the export."""
    done = export(finished, tmp_path / "merged", round_number=None, dtype=dtype)
    assert done.written is not None
    assert done.written.distance is not None
    base = entry(finished, "sft:student@0") / "model"
    below = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    moved = PeftModel.from_pretrained(student_0(finished), entry(finished, "train@2") / "model")
    exported = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float64)
    kls: dict[str, list[torch.Tensor]] = {"written": [], "back": [], "start": []}
    firsts = {row["prompt_id"]: row for row in rows(entry(finished, "rollout@2") / "rollouts.parquet")}
    for row in firsts.values():
        prompt, completion = row["prompt_token_ids"], row["completion_token_ids"]
        with torch.no_grad():
            p, q, s = (
                model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                for model in (moved, exported, below)
            )
        for name, one, other in (("written", p, q), ("back", q, p), ("start", p, s)):
            kls[name].append((one.exp() * (one - other)).sum(-1))
    found = done.written.distance
    assert found.tokens == len(torch.cat(kls["start"]))
    for name, values in kls.items():
        expected = float(torch.cat(values).mean())
        assert getattr(found, name) == pytest.approx(expected, rel=1e-3, abs=1e-9), name
    assert found.start is not None
    assert found.start > 1e-4
    assert (found.written > 1e-9) == (dtype == "bfloat16")
    kept = load_file(done.folder / "model.safetensors")
    assert {weight.dtype for weight in kept.values()} == {getattr(torch, dtype or "float32")}


def test_an_export_that_changes_no_weight_is_the_files_themselves(finished: Project, tmp_path: Path) -> None:
    done = export(finished, tmp_path / "first", round_number=0, dtype="float32")
    assert done.written is None
    done = export(finished, tmp_path / "narrow", round_number=0, dtype="float16", measure=False)
    assert done.written is not None
    assert (done.written.dtype, done.written.distance) == ("float16", None)
    with pytest.raises(RecipeError, match="an adapter is float32"):
        export(finished, tmp_path / "adapter", round_number=2, adapter=True, dtype="bfloat16")


def test_a_merged_export_is_a_plain_model_equal_to_the_adapter_on_its_base(
    finished: Project, tmp_path: Path
) -> None:
    done = export(finished, tmp_path / "merged", round_number=None)
    folder = done.folder
    assert done.round == 2
    assert not [path for path in folder.iterdir() if "adapter" in path.name]
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = export(finished, tmp_path / "adapter", round_number=2, adapter=True).folder
    base = AutoModelForCausalLM.from_pretrained(
        entry(finished, "sft:student@0") / "model", dtype=torch.float32
    )
    ids = torch.arange(3, 33)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        expected = PeftModel.from_pretrained(base, adapter)(input_ids=ids).logits
        found = merged(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=FLOAT32_NATS, rtol=0)
    assert (found - before).abs().max() > 0.05
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer("Tom has 7")["input_ids"]
        == AutoTokenizer.from_pretrained(adapter)("Tom has 7")["input_ids"]
    )


def test_an_exported_student_0_is_the_model_below(finished: Project, tmp_path: Path) -> None:
    folder = export(finished, tmp_path / "first", round_number=0).folder
    original = entry(finished, "sft:student@0") / "model"
    assert digests(folder) == digests(original)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


# --------------------------------------------------------------------------------- one network in memory


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, ModelSource]:
    """A model, and two adapters on it."""
    model = tiny_model("llama")
    write_model(model, tiny_tokenizer(), tmp_path / "base")
    found = {"base": ModelSource(tmp_path / "base", "b", dtype="float32")}
    for number in (1, 2):
        adapted(model, seed=number)
        write_adapter(model, tmp_path / f"{number}")
        adapter = AdapterSource(tmp_path / f"{number}", f"a{number}")
        found[f"{number}"] = ModelSource(tmp_path / "base", "b", dtype="float32", adapter=adapter)
    return found


def adapted(model: Any, *, seed: int = 0) -> Any:
    """The model with an adapter that changes what it computes."""
    start_adapter(model, LORA, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(2, 12)[None]).logits
    return found


def test_the_cache_has_one_network_for_a_model_and_the_adapters_on_it(
    sources: dict[str, ModelSource],
) -> None:
    cache = ModelCache(CPU)
    assert not cache.holds(sources["1"])
    network = cache.get(sources["1"])
    with_first = logits(network)
    assert cache.holds(sources["1"])
    assert cache.holds(sources["base"])
    pointers = {name: weight.data_ptr() for name, weight in network.named_parameters()}
    assert cache.get(sources["base"]) is network
    assert torch.equal(
        logits(network), logits(open_model(sources["base"].folder, dtype=torch.float32, device=CPU))
    )
    assert cache.get(sources["2"]) is network
    assert not cache.holds(sources["1"])
    assert not torch.equal(logits(network), with_first)
    assert torch.equal(logits(cache.get(sources["1"])), with_first)
    assert {name: weight.data_ptr() for name, weight in network.named_parameters()} == pointers


def test_a_trained_adapter_survives_that_an_older_one_is_asked_for(
    sources: dict[str, ModelSource], tmp_path: Path
) -> None:
    cache = ModelCache(CPU)
    network = cache.lend(sources["1"])
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight.add_(0.01)
    assert not cache.holds(sources["1"]), "what is in memory is no longer what is on disk"
    assert cache.holds(sources["base"])
    write_adapter(network, tmp_path / "3")
    third = ModelSource(tmp_path / "base", "b", dtype="float32", adapter=AdapterSource(tmp_path / "3", "a3"))
    cache.publish("a3", network)
    trained = logits(network)
    cache.get(sources["1"])
    assert torch.equal(logits(cache.get(third)), trained)


def test_a_trainer_withdraws_its_adapter_before_it_changes_it_and_the_model_below_stays(
    sources: dict[str, ModelSource],
) -> None:
    cache = ModelCache(CPU)
    trainer = lora_trainer(cache.lend(sources["1"]))
    assert not cache.holds(sources["1"]), "whoever borrows it may change it"
    trainer.publish("a1", cache)
    assert cache.holds(sources["1"])
    trainer.begin()
    assert not cache.holds(sources["1"])
    assert cache.holds(sources["base"])


def test_switching_the_adapter_off_keeps_its_weights_from_training_until_it_is_on_again() -> None:
    model = adapted(tiny_model("llama"))
    wanted = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert wanted
    assert all(".lora_" in name for name in wanted)
    switch_adapter(model, on=False)
    assert not any(weight.requires_grad for weight in model.parameters())
    switch_adapter(model, on=True)
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == wanted


# --------------------------------------------------------------------------------------------- engine


def sample(model: Any) -> list[tuple[list[int], list[int], list[float]]]:
    cache = ModelCache(CPU)
    cache._models["a", torch.float32] = kdpipe.models.cache._Held(model)
    source = ModelSource(Path("/not/read"), "a", dtype="float32")
    if is_adapted(model) and any(weight.requires_grad for weight in model.parameters()):
        cache.publish("on", model)
        source = ModelSource(source.folder, "a", dtype="float32", adapter=AdapterSource(source.folder, "on"))
    engine = HfEngine(cache, Runtime(sample_tokens=400, score_tokens=60, head_chunk_tokens=5))
    engine.load(source)
    prompts = [[2], [3, 4, 5], [6] * 17, [5, 4, 3, 2, 11, 10]]
    settings = Sampling(temperature=1.0, max_new_tokens=10, end_ids=(1,), num_ids=ROWS)
    requests = [SampleRequest(prompt, (10 * i, 10 * i + 1)) for i, prompt in enumerate(prompts)]
    drawn = engine.sample(requests, settings, progress=lambda _: None)
    return [
        (prompt, found.token_ids, found.logprobs)
        for prompt, completions in zip(prompts, drawn, strict=True)
        for found in completions
    ]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("llama", "qwen3") else pytest.mark.slow)
        for name in CONFIGS
        if name != "gpt2"
    ],
)
def test_sampled_logprobs_are_those_of_a_plain_forward_with_the_adapter_on_and_off(name: str) -> None:
    plain = tiny_model(name)
    model = adapted(copy.deepcopy(plain))
    assert is_llama_like(model) == (name in FAST)
    with_adapter = sample(model)
    for prompt, ids, logprobs in with_adapter:
        assert logprobs == pytest.approx(
            logprobs_of(copy.deepcopy(model).double(), prompt, ids), abs=FLOAT32_NATS
        )
    switch_adapter(model, on=False)
    assert sample(model) == sample(plain) != with_adapter


def headed(model: Any) -> Any:
    """The model with an adapter on its output head too, that changes what it computes."""
    start_adapter(model, Lora(rank=3, alpha=6, targets=["lm_head", "q_proj"]), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


def test_loss_and_gradient_of_an_adapted_head_are_those_of_a_plain_forward_of_the_merged_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kdpipe.models.logprobs, "_MIN_CHUNK_LOGITS", 1)  # so that chunks are computed again
    plain, model = tiny_model("llama").double(), headed(tiny_model("llama")).double()
    prompt, completion = [2, 3, 4], [7, 8, 9, 10, 1]
    batch = make_batch([prompt], [completion], device=CPU)
    head = head_of(model, num_ids=ROWS)
    found, _ = token_logprobs(hidden_states(model, batch), head, batch.target_ids_N, temperature=0.7, chunk=2)
    found.sum().backward()
    low = {name: layer for name, layer in model.named_modules() if is_lora(layer)}
    for name, layer in low.items():
        plain.get_submodule(name).weight.data += layer.get_delta_weight("default").detach()
    logits = plain(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1, :ROWS]
    wanted = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    wanted.sum().backward()
    assert len(low) == 3
    for name, layer in low.items():
        gradient, a, b = plain.get_submodule(name).weight.grad, *factors_of(layer)[:2]
        torch.testing.assert_close(b.grad, 2 * gradient @ a.T, rtol=0, atol=1e-12)
        torch.testing.assert_close(a.grad, 2 * b.T @ gradient, rtol=0, atol=1e-12)


def test_an_adapted_head_is_sampled_with_switched_off_read_and_merged(tmp_path: Path) -> None:
    plain, model = tiny_model("llama"), headed(tiny_model("llama"))
    for prompt, ids, logprobs in sample(model):
        wanted = logprobs_of(copy.deepcopy(model).double(), prompt, ids)
        assert logprobs == pytest.approx(wanted, abs=FLOAT32_NATS)
    write_adapter(model, tmp_path / "adapter")
    plain.save_pretrained(str(tmp_path / "plain"))
    settings: Any = {"num_ids": ROWS - 2, "dtype": torch.float32, "device": CPU}
    read = read_head(tmp_path / "plain", **settings, adapter=tmp_path / "adapter")
    assert head_digest(read) == head_digest(head_of(model, num_ids=ROWS - 2))
    assert head_digest(read) != head_digest(read_head(tmp_path / "plain", **settings))
    merged = copy.deepcopy(plain)
    merge_adapter(merged, tmp_path / "adapter")
    ids = torch.tensor([[2, 3, 4, 5]])
    torch.testing.assert_close(merged(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not torch.equal(merged.lm_head.weight, plain.lm_head.weight)
    switch_adapter(model, on=False)
    assert head_of(model, num_ids=ROWS).low_rank is None
    assert sample(model) == sample(plain)


# ------------------------------------------------------------------------------------------- training


def lora_trainer(model: Any, *, compute: torch.dtype = torch.float32, checkpointing: bool = False) -> Trainer:
    settings = Optimizer(learning_rate=1e-2)
    return LocalTrainer(
        model, settings, num_ids=ROWS, horizon=4, compute=compute, gradient_checkpointing=checkpointing
    )


def gradients(trainer: Trainer, *, casts: bool = False) -> dict[str, torch.Tensor]:
    """Those of a batch; the forward pass is under autocast if `casts`."""
    trainer.begin()
    batch = make_batch([[2, 3], [4, 5, 6]], [[7, 8, 9, 1], [3, 1]], device=CPU)

    def loss(hidden_NH: torch.Tensor, head: Head) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logprobs_N, _ = token_logprobs(hidden_NH, head, batch.target_ids_N, temperature=1.0, chunk=64)
        assert torch.is_autocast_enabled("cpu") == casts
        return -logprobs_N.mean(), {}

    trainer.accumulate(batch, loss)
    return {name: w.grad.clone() for name, w in trainer.weights().items() if w.grad is not None}


@pytest.mark.parametrize("name", FAST)
def test_the_fast_decoder_adds_the_adapter_at_its_scale(name: str) -> None:
    """Decoders are chosen once for all adapters of a model, and a fresh adapter adds nothing."""
    model = adapted(tiny_model(name))
    ids = torch.tensor([[3, 4, 5, 6]])
    decoder = LlamaDecoder(model, max_new_tokens=2)
    with torch.inference_mode():
        first = decoder.prefill([ids[0, :3].tolist()], [1], max_tokens=9)
        second = decoder.step(ids[0, 3:])
        wanted_BTH = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(first[:, 0], wanted_BTH[0, 2], rtol=0, atol=1e-4)
    torch.testing.assert_close(second[:, 0], wanted_BTH[0, 3], rtol=0, atol=1e-4)


def test_recomputing_in_the_backward_pass_gives_the_same_gradients_to_the_adapter_only() -> None:
    model = adapted(tiny_model("llama"))
    plain = gradients(lora_trainer(copy.deepcopy(model)))
    recomputed = gradients(lora_trainer(model, checkpointing=True))
    assert plain.keys() == recomputed.keys()
    assert all(".lora_" in name and gradient.abs().max() > 0 for name, gradient in plain.items())
    assert len(plain) == 2 * 7 * 2
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


def test_an_optimizer_step_leaves_the_model_below_bit_for_bit(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    adapted(model)
    trainer = lora_trainer(model)
    gradients(trainer)
    with_adapter = logits(model)
    trainer.apply()
    trainer.end()
    assert not torch.equal(logits(model), with_adapter)
    trainer.write_state(tmp_path)
    assert all(".lora_" in name for name in read_trainer(tmp_path)[0])
    switch_adapter(model, on=False)
    assert torch.equal(logits(model), logits(before))


def test_frozen_narrow_weights_compute_in_their_own_dtype_as_the_sampler_does() -> None:
    narrow = adapted(tiny_model("llama").bfloat16())
    assert {weight.dtype for weight in narrow.parameters() if weight.requires_grad} == {torch.float32}
    for model, casts in ((narrow, False), (tiny_model("llama"), True)):
        gradients(lora_trainer(model, compute=torch.bfloat16), casts=casts)


def test_what_an_adapter_adds_is_alpha_over_rank_times_b_a_trained_merged_and_read(tmp_path: Path) -> None:
    trained, merged, read, plain = (tiny_model("llama") for _ in range(4))
    start_adapter(trained, Lora(rank=2, alpha=6, targets=["q_proj", "down_proj"]), seed=0)
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if ".lora_B." in name:
                weight.copy_(0.1 * torch.ones(weight.shape).cumsum(0))
    write_adapter(trained, tmp_path)
    merge_adapter(merged, tmp_path)
    read_adapter(read, tmp_path)
    parts = load_file(tmp_path / "adapter_model.safetensors")
    for name in {name.partition(".lora_")[0] for name in parts}:
        added = parts[f"{name}.lora_B.weight"] @ parts[f"{name}.lora_A.weight"] * 6 / 2
        path = name.removeprefix("base_model.model.")
        found = merged.get_submodule(path).weight - plain.get_submodule(path).weight
        torch.testing.assert_close(found, added, rtol=0, atol=1e-6)
        assert added.abs().max() > 1e-2
    torch.testing.assert_close(logits(trained), logits(merged), rtol=0, atol=1e-3)
    torch.testing.assert_close(logits(read), logits(merged), rtol=0, atol=1e-3)


def test_a_fresh_adapter_changes_nothing_and_comes_from_its_seed_alone() -> None:
    model = tiny_model("qwen2")
    plain = logits(model)
    state = torch.random.get_rng_state()
    start_adapter(model, LORA, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(logits(model), plain)
    first = {name: weight.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    adapted(model, seed=6)
    other = dict(model.named_parameters())
    assert all(not torch.equal(weight, other[name]) for name, weight in first.items())
    torch.manual_seed(99)
    start_adapter(model, LORA, seed=5)
    assert all(torch.equal(weight, other[name]) for name, weight in first.items())


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("llama-tied-biased", ["lm_head"], "'lm_head' names lm_head, which is the output head, tied to"),
        ("llama-tied-biased", ["q_proj", "embed_tokens"], r"names model\.embed_tokens, which is Embedding"),
        ("qwen3", ["q_norm"], "which is Qwen3RMSNorm, expected linear layers"),
        ("llama", ["q_proj", "w_proj"], "no layer called 'w_proj'"),
        ("gpt2", "all-linear", "has no linear layers"),
    ],
)
def test_targets_that_cannot_have_an_adapter_are_refused(name: str, targets: Any, message: str) -> None:
    model = tiny_model(name)
    with pytest.raises(ModelError, match=message):
        start_adapter(model, Lora(targets=targets), seed=0)
    assert not is_adapted(model)


@pytest.mark.parametrize("kind", ["scratch", "model"])
def test_targets_are_looked_at_before_anything_is_trained_or_sampled(
    finished: Project, tmp_path: Path, kind: str
) -> None:
    changes: dict[str, Any] = {**CHANGES, "student__lora": {"targets": ["c_attn"]}}
    if kind == "model":
        named = {"model": str(entry(finished, "sft:student@0") / "model"), "dtype": "float32"}
        changes |= {"student": {**named, "lora": changes.pop("student__lora")}}
    with pytest.raises(ModelError, match="no layer called 'c_attn'"):
        run_near(load_tiny(tmp_path, **changes), tmp_path / "out")
    assert payload_digests(tmp_path / "out") == {}


def test_targets_are_the_named_layers_and_no_others() -> None:
    model = tiny_model("llama")
    start_adapter(model, Lora(targets=["v_proj", "q_proj"]), seed=0)
    names = {
        name.split(".lora_")[0].rpartition(".")[2] for name, w in model.named_parameters() if w.requires_grad
    }
    assert names == {"q_proj", "v_proj"}
    assert "lm_head" not in targets_of(tiny_model("llama"), Lora()).layers


def test_an_adapter_that_is_damaged_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_adapter(adapted(tiny_model("llama")), tmp_path)
    other = tiny_model("llama")
    start_adapter(other, Lora(rank=2, alpha=6), seed=0)
    with pytest.raises(ArtifactError, match="of other layers or another rank"):
        read_adapter(other, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="of other layers"):
        read_adapter(tiny_model("llama"), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_adapter(tiny_model("llama"), tmp_path)


def test_what_targets_reach_is_counted_in_weights_and_layers() -> None:
    model = tiny_model("llama")  # matrices of a layer: 24 x 24 twice, 24 x 12 twice, 24 x 40 three times
    of_layer = 2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40
    assert str(reach(model, targets_of(model, Lora()))) == (
        "100% of the weights between embeddings and head, in 2 of 2 layers"
    )
    assert reach(model, Targets(["q_proj", "v_proj"], [])) == Reach((24 * 24 + 24 * 12) / of_layer, 2, 2)
    model.model.layers[1].self_attn.q_special = model.model.layers[1].self_attn.q_proj
    del model.model.layers[1].self_attn.q_proj
    assert reach(model, Targets(["q_special"], [])) == Reach(24 * 24 / (2 * of_layer), 1, 2)


def mixture(experts: int, **changes: Any) -> Any:
    sizes = {"num_experts": experts, "num_experts_per_tok": 1, "moe_intermediate_size": 40, **changes}
    config = Qwen3MoeConfig(**{**COMMON, "head_dim": 8, **sizes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def test_all_linear_layers_are_refused_where_they_are_little_of_the_model(tmp_path: Path) -> None:
    model = mixture(8)
    with pytest.raises(ModelError, match=r"are \d+% of the weights .* in 2 of 2 layers: .*experts") as caught:
        targets_of(model, Lora())
    assert "target_parameters: [mlp.experts.down_proj, mlp.experts.gate_up_proj]" in caught.value.hint
    assert caught.value.hint.endswith("targets: [k_proj, o_proj, q_proj, v_proj]")
    named = Lora(targets=["k_proj", "o_proj", "q_proj", "v_proj"])
    assert targets_of(model, named).layers == named.targets
    model.save_pretrained(tmp_path)
    found = reach_of(tmp_path, named)
    assert found.weights < LEAST_OF_ALL
    with pytest.raises(ModelError, match="leave out most of the model"):
        reach_of(tmp_path, Lora())


EXPERTS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 8},
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
    "mixtral": ("mixtral", {"num_local_experts": 3}, ["gate_up_proj", "experts.down_proj"]),
    "gpt_oss": (  # its experts are (in, out), with biases
        "gpt_oss",
        {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
        ["experts.gate_up_proj", "experts.down_proj"],
    ),
}


@pytest.mark.parametrize(
    "kind", [name if name == "qwen3_moe" else pytest.param(name, marks=pytest.mark.slow) for name in EXPERTS]
)
def test_an_adapter_on_experts_is_pefts_and_merged_it_is_the_same_model(kind: str, tmp_path: Path) -> None:
    """Files, forward, gradient and merged weights against peft's own model of the written adapter."""
    family, sizes, parameters = EXPERTS[kind]
    config = AutoConfig.for_model(family, **{**COMMON, **sizes})

    def base() -> Any:
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    lora = Lora(rank=2, alpha=4, target_parameters=parameters)
    model = base()
    assert targets_of(model, lora).parameters == sorted(parameters)
    assert reach(model, targets_of(model, lora)).weights > 0.9
    start_adapter(model, lora, seed=3)
    ids = torch.arange(3, 15)[None]
    plain = base()(ids).logits
    torch.testing.assert_close(model(ids).logits, plain, atol=1e-6, rtol=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    write_adapter(model, tmp_path)

    peft = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    found, expected = model(ids).logits, peft(input_ids=ids).logits
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)
    for logits in (found, expected):
        logits.log_softmax(-1)[..., 7].sum().backward()
    theirs = {name.replace(".default", ""): weight.grad for name, weight in peft.named_parameters()}
    ours = {
        f"base_model.model.{name.replace('.default', '')}": weight.grad
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    assert (
        len([name for name in ours if ".experts." in name]) == 8
    )  # two of each of two tensors of two layers
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=5e-5, rtol=1e-4)

    merged = base()
    merge_adapter(merged, tmp_path)
    assert not is_adapted(merged)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in base().named_parameters()}
    torch.testing.assert_close(merged(ids).logits, expected, atol=5e-5, rtol=1e-4)
    other = base()
    read_adapter(other, tmp_path)
    torch.testing.assert_close(other(ids).logits, expected, atol=5e-5, rtol=1e-4)
    switch_adapter(other, on=False)
    assert torch.equal(other(ids).logits, plain)
    write_adapter(other, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path)


@pytest.mark.slow
def test_experts_are_trained_by_a_run_and_sampled_as_peft_reads_them(tmp_path: Path) -> None:
    tokenizer = arithmetic_tokenizer(words())
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 8}
    config = Qwen3MoeConfig(**{**COMMON, **sizes, "vocab_size": num_ids_in_use(tokenizer)})
    config.eos_token_id, config.pad_token_id, config.max_position_embeddings = (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        256,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    write_model(model, tokenizer, tmp_path / "model")
    lora = {"rank": 2, "alpha": 4, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    changes = {name: value for name, value in CHANGES.items() if name != "student__lora"}
    changes["student"] = {"model": "./model", "dtype": "float32", "lora": lora}
    changes["runtime__keep"] = {"weights": 2, "optimizer": 2}
    changes["runtime__gradient_checkpointing"] = True
    project = run_near(load_tiny(tmp_path, **changes), tmp_path / "out")
    adapter = entry(project, "train@1") / "model"
    assert all(w.any() for name, w in load_file(adapter / "adapter_model.safetensors").items())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    student = PeftModel.from_pretrained(base, adapter)
    for rollout in rows(entry(project, "rollout@2") / "rollouts.parquet"):
        expected = logprobs_of(student, rollout["prompt_token_ids"], rollout["completion_token_ids"])
        assert rollout["sampler_logprobs"] == pytest.approx(expected, abs=5e-5)
    done = export(project, tmp_path / "merged", round_number=2)
    assert done.written is not None
    assert done.written.distance is not None
    assert done.written.distance.written < 1e-9 < 1e-5 < (done.written.distance.start or 0)


def test_experts_that_are_not_there_are_refused_with_those_that_are() -> None:
    with pytest.raises(ModelError, match=r"no experts called 'mlp\.up_proj'") as caught:
        start_adapter(mixture(8), Lora(target_parameters=["mlp.up_proj"]), seed=0)
    assert "its experts are mlp.experts.down_proj, mlp.experts.gate_up_proj" in caught.value.hint
    with pytest.raises(ModelError, match=r"no experts called 'q_proj\.weight'") as caught:
        start_adapter(tiny_model("llama"), Lora(target_parameters=["q_proj.weight"]), seed=0)
    assert "name its layers in targets" in caught.value.hint


class Told(Exception):
    """What a run said of its adapter, at which it ends."""


@pytest.mark.parametrize(
    ("targets", "said"),
    [("all-linear", r"note.*100% of .* in 1 of 1 layers"), (["gate_proj"], r"warning.* in 1 of 2 layers")],
)
def test_a_run_says_what_its_adapter_reaches(targets: Any, said: str, tmp_path: Path) -> None:
    def ends(_step: str, event: dict[str, Any]) -> None:
        if "adapters" in event.get("text", ""):
            raise Told(event["kind"], event["text"])

    watcher = Watcher()
    watcher.on_event = ends
    student: dict[str, Any] = {"student__lora": {"targets": targets}}
    if targets != "all-linear":
        sizes = {"vocab_size": num_ids_in_use(arithmetic_tokenizer(words())), "mlp_only_layers": [0]}
        write_model(mixture(4, **sizes), arithmetic_tokenizer(words()), tmp_path / "model")
        student = {"student": {"model": "./model", "dtype": "float32", "lora": {"targets": targets}}}
    with pytest.raises(Told, match=said):
        run_near(load_tiny(tmp_path, **{**CHANGES, **student}), tmp_path / "out", watcher=watcher)
