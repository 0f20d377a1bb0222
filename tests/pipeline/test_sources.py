"""Where models and data come from: local digests, and the hub, which is never asked here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HTTPError

from kdpipe.errors import DataError, EngineError
from kdpipe.pipeline.identities import Sources
from kdpipe.recipe.file import load_recipe

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RECIPE = """
name: hub
rounds: 1
task: {kind: gsm8k}
student: {model: someone/student}
teachers: [{model: someone/teacher, revision: v2}]
"""


class Hub:
    """Stands in for the hub: answers every name with one commit, and remembers what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, Any]] = []
        self.patterns: dict[str, list[str]] = {}

    def repo_info(self, name: str, *, revision: str | None, repo_type: str) -> SimpleNamespace:
        self.asked.append((name, revision))
        return SimpleNamespace(sha=COMMIT)

    def snapshot_download(
        self, name: str, *, revision: str, repo_type: str, allow_patterns: list[str]
    ) -> str:
        assert revision == COMMIT
        self.patterns[name] = allow_patterns
        return str(self.folder / repo_type)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def sources(folder: Path) -> Sources:
    (folder / "recipe.yaml").write_text(RECIPE)
    return Sources(load_recipe(folder / "recipe.yaml"), folder / "out")


def test_a_hub_name_is_unresolved_until_a_fetch_pins_it(tmp_path: Path, hub: Hub) -> None:
    before = sources(tmp_path).identities()
    assert before.models["student"] == {"hub": "someone/student", "revision": "unresolved"}
    assert before.unresolved() == ["datasets/openai/gsm8k", "someone/student", "someone/teacher"]
    assert hub.asked == []
    folders = sources(tmp_path).fetch()
    assert folders["student"] == tmp_path / "cache" / "model"
    assert folders["data"] == tmp_path / "cache" / "dataset"
    after = sources(tmp_path).identities()
    assert after.models["student"] == {"hub": "someone/student", "revision": COMMIT}
    assert after.unresolved() == []
    assert after.data["train"] == {"hub": "datasets/openai/gsm8k", "revision": COMMIT}
    assert ("someone/teacher", "v2") in hub.asked
    assert json.loads((tmp_path / "out" / "pins.json").read_text())["value"]["someone/teacher@v2"] == COMMIT


def test_of_a_teacher_behind_a_server_the_tokenizer_is_fetched_and_pinned_without_weights(
    tmp_path: Path, hub: Hub
) -> None:
    server = "{urls: ['https://a/v1'], model: big, tokenizer: someone/teacher, revision: v2}"
    text = RECIPE.replace("{model: someone/teacher, revision: v2}", f"{{server: {server}}}")
    (tmp_path / "recipe.yaml").write_text(text)
    found = Sources(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "out")
    before = found.identities()
    assert before.models["teacher"] == {"served": "big", "hub": "someone/teacher", "revision": "unresolved"}
    assert "someone/teacher" in before.unresolved()
    assert found.fetch()["teacher"] == tmp_path / "cache" / "model"
    assert ("someone/teacher", "v2") in hub.asked
    assert "*.safetensors" in hub.patterns["someone/student"]
    assert "*.safetensors" not in hub.patterns["someone/teacher"]
    assert "*.json" in hub.patterns["someone/teacher"]
    after = Sources(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "out").identities()
    assert after.models["teacher"] == {"served": "big", "hub": "someone/teacher", "revision": COMMIT}


def test_a_pinned_name_is_not_asked_again(tmp_path: Path, hub: Hub) -> None:
    sources(tmp_path).fetch()
    hub.asked.clear()
    sources(tmp_path).fetch()
    assert hub.asked == []


def test_a_hub_that_does_not_answer_is_one_clear_error(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise HTTPError("Name or service not known")

    monkeypatch.setattr(hub, "repo_info", refuse)
    with pytest.raises(
        EngineError, match=r"model someone/student: cannot be fetched .* Name or service"
    ) as found:
        sources(tmp_path).fetch()
    assert "local folder" in found.value.hint
    assert found.value.exit_code == 4


def test_data_that_cannot_be_fetched_is_a_data_error(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, **_kwargs: Any) -> Any:
        if "gsm8k" in name:
            raise HTTPError("404")
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(hub, "repo_info", refuse)
    with pytest.raises(DataError, match="dataset openai/gsm8k: cannot be fetched"):
        sources(tmp_path).fetch()


def test_a_local_models_digest_follows_its_bytes_and_not_its_name(tmp_path: Path) -> None:
    def identity(name: str, weights: bytes) -> Any:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "README.md").write_text(name)
        text = RECIPE.replace("someone/student", f"./{name}").replace("someone/teacher, revision: v2", "./a")
        (tmp_path / "recipe.yaml").write_text(text)
        return Sources(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "out").identities().models["student"]

    first = identity("a", b"one")
    assert identity("b", b"one") == first
    assert identity("b", b"two") != first
