"""Where models and data come from: local digests, and the hub, met by its own client in a stand-in on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from kdpipe.errors import KdpipeError, ModelError, RecipeError, StepError
from kdpipe.pipeline import hub as client
from kdpipe.pipeline.identities import Sources
from kdpipe.recipe.file import load_recipe
from tests.hub import Hub, Refusal, hub_stand_in

RECIPE = """
name: hub
rounds: 1
task: {kind: gsm8k}
student: {model: someone/student}
teachers: [{model: someone/teacher, revision: v2}]
"""
WEIGHTS = b"w" * 1000
MODEL = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "original/params.pth": b"pickle",
    "onnx/model.safetensors": WEIGHTS,
    "consolidated.safetensors": WEIGHTS,
}
DATA = {"README.md": b"-", "main/train-00000-of-00001.parquet": b"t", "socratic/train.parquet": b"s"}
TOKEN = "hf_secretOfSomebody"
slow = pytest.mark.slow


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_stand_in() as hub:
        hub.enter(tmp_path / "home", monkeypatch)
        hub.add("models", "someone/student", MODEL)
        hub.add("models", "someone/teacher", MODEL, ref="v2")
        hub.add("datasets", "openai/gsm8k", DATA)
        yield hub


def sources(folder: Path, text: str = RECIPE, workspace: str = "out") -> Sources:
    (folder / "recipe.yaml").write_text(text)
    return Sources(load_recipe(folder / "recipe.yaml"), folder / workspace)


def commit_of(hub: Hub, name: str, ref: str = "main") -> str:
    return hub.repositories["models", name].refs[ref]


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_hub_name_is_unresolved_until_a_fetch_pins_it(tmp_path: Path, hub: Hub) -> None:
    before = sources(tmp_path).identities()
    assert before.models["student"] == {"hub": "someone/student", "revision": "unresolved"}
    assert before.unresolved() == ["datasets/openai/gsm8k", "someone/student", "someone/teacher"]
    assert hub.asked == []
    folders = sources(tmp_path).fetch()
    after = sources(tmp_path).identities()
    main, v2 = commit_of(hub, "someone/student"), commit_of(hub, "someone/teacher", "v2")
    assert after.models["student"] == {"hub": "someone/student", "revision": main}
    assert after.models["teacher"] == {"hub": "someone/teacher", "revision": v2}
    assert after.data["test"]["hub"] == "datasets/openai/gsm8k"
    assert (before.pinned(), after.unresolved()) == ({}, [])
    assert after.pinned()["someone/student"] == [main]
    assert list(after.pinned()) == ["datasets/openai/gsm8k", "someone/student", "someone/teacher"]
    assert json.loads((tmp_path / "out" / "pins.json").read_text())["value"]["someone/teacher@v2"] == v2
    assert files_of(folders["student"]) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert files_of(folders["data"]) == {"main/train-00000-of-00001.parquet"}
    found = sources(tmp_path).tokenizer_file("student")
    assert found == folders["student"] / "tokenizer.json"


def test_of_a_teacher_behind_a_server_the_tokenizer_is_fetched_and_pinned_without_weights(
    tmp_path: Path, hub: Hub
) -> None:
    server = "{urls: ['https://a/v1'], model: big, tokenizer: someone/teacher, revision: v2}"
    found = sources(
        tmp_path, RECIPE.replace("{model: someone/teacher, revision: v2}", f"{{server: {server}}}")
    )
    before = found.identities()
    assert before.models["teacher"] == {"served": "big", "hub": "someone/teacher", "revision": "unresolved"}
    assert "someone/teacher" in before.unresolved()
    assert files_of(found.fetch()["teacher"]) == {"config.json", "tokenizer.json"}
    pinned = {"served": "big", "hub": "someone/teacher", "revision": commit_of(hub, "someone/teacher", "v2")}
    assert found.identities().models["teacher"] == pinned


def test_a_pin_holds_when_its_branch_moves_and_is_not_asked_again(tmp_path: Path, hub: Hub) -> None:
    folders = sources(tmp_path).fetch()
    hub.add("models", "someone/student", MODEL | {"config.json": b"{ }"})
    hub.asked.clear()
    assert sources(tmp_path).fetch() == folders
    assert hub.asked == []
    new = sources(tmp_path, workspace="new").fetch()["student"]
    assert (new / "config.json").read_bytes() == b"{ }"


def test_a_commit_may_be_named_and_one_that_is_not_there_is_refused(tmp_path: Path, hub: Hub) -> None:
    old = commit_of(hub, "someone/student")
    hub.add("models", "someone/student", MODEL | {"config.json": b"{ }"})
    named = RECIPE.replace("student}", f"student, revision: {old}}}")
    assert sources(tmp_path, named).identities().models["student"]["revision"] == old
    assert (sources(tmp_path, named).fetch()["student"] / "config.json").read_bytes() == b"{}"
    told: list[str] = []
    with pytest.raises(KdpipeError, match="not that revision"):
        sources(tmp_path, named.replace(old, "f" * 40), "new").fetch(told.append)
    assert (told, (tmp_path / "new" / "pins.json").exists()) == ([], False)


def test_a_renamed_repository_is_said_and_pinned_by_its_new_name(tmp_path: Path, hub: Hub) -> None:
    hub.renamed["models", "someone/student"] = "new/name"
    hub.renamed["datasets", "openai/gsm8k"] = "new/data"
    hub.repositories["models", "new/name"] = hub.repositories.pop(("models", "someone/student"))
    hub.repositories["datasets", "new/data"] = hub.repositories.pop(("datasets", "openai/gsm8k"))
    told: list[str] = []
    folders = sources(tmp_path).fetch(told.append)
    assert [text for text in told if "the hub calls it" in text] == [
        f"{old}: the hub calls it {new} now, and that is what is pinned: write this name in the recipe"
        for old, new in (("model someone/student", "new/name"), ("dataset openai/gsm8k", "new/data"))
    ]
    pinned = sources(tmp_path).identities()
    assert (pinned.models["student"]["hub"], pinned.data["train"]["hub"]) == ("new/name", "datasets/new/data")
    renamed = sources(tmp_path, RECIPE.replace("someone/student", "new/name"))
    assert renamed.fetch(told.append)["student"] == folders["student"]
    assert renamed.identities().models["student"] == pinned.models["student"]
    hub.asked.clear()
    assert sources(tmp_path).fetch(told.append) == folders
    assert sources(tmp_path).tokenizer_file("student") == folders["student"] / "tokenizer.json"
    assert hub.asked == []


def test_a_model_of_pickles_alone_is_refused_and_its_conversion_is_taken(tmp_path: Path, hub: Hub) -> None:
    pickles = {name: content for name, content in MODEL.items() if "safetensors" not in name}
    hub.add("models", "someone/student", pickles)
    with pytest.raises(ModelError, match=r"someone/student: the hub has no \*\.safetensors of it") as found:
        sources(tmp_path).fetch()
    assert found.value.exit_code == 4
    assert "pytorch_model.bin" not in hub.fetched()
    commit = hub.add("models", "someone/student", MODEL, ref="refs/pr/1")
    converted = sources(tmp_path, RECIPE.replace("student}", "student, revision: refs/pr/1}"))
    assert converted.fetch()["student"].name == commit


def gate(hub: Hub) -> None:
    hub.repositories["models", "someone/student"].access = "gated"


def hide(hub: Hub) -> None:
    hub.repositories["models", "someone/student"].access = "private"


def remove(hub: Hub) -> None:
    del hub.repositories["models", "someone/student"]


def unlist(hub: Hub) -> None:
    del hub.repositories["models", "someone/student"].refs["main"]


def lose_data(hub: Hub) -> None:
    del hub.repositories["datasets", "openai/gsm8k"]


def busy(hub: Hub) -> None:
    hub.refusals["student"] = Refusal(429, {"Retry-After": "0"}, times=9)


def test_a_hub_that_is_asked_too_much_is_asked_again_after_the_time_that_it_says(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(client, "_wait", lambda _asked, seconds, **_more: waits.append(seconds))
    hub.refusals["student"] = Refusal(429, {"Retry-After": "7"}, times=3)
    hub.refusals["teacher"] = Refusal(429, times=3)
    sources(tmp_path).fetch()
    assert waits == [7, 7, 7, 1, 2, 4]
    waits.clear()
    hub.refusals["gsm8k"] = Refusal(429, {"Retry-After": "9"}, times=99)
    with pytest.raises(StepError, match="the hub answers 429"):
        sources(tmp_path, workspace="other").fetch()
    assert waits == [9] * client.RETRIES


def test_data_of_the_hub_are_at_hand_once_they_were_fetched_whole(tmp_path: Path, hub: Hub) -> None:
    assert sources(tmp_path).cached_data() is None
    folder = sources(tmp_path).fetch()["data"]
    hub.asked.clear()
    assert sources(tmp_path).cached_data() == folder
    assert hub.asked == []
    next(folder.rglob("*.parquet")).unlink()
    assert sources(tmp_path).cached_data() is None


def down(hub: Hub) -> None:
    hub.refusals["student"] = Refusal(503, {"Retry-After": "9"}, times=9)


def log_in(hub: Hub) -> None:
    hub.refusals["student"] = Refusal(200, {"Content-Type": "text/html"}, b"<html>Log in?", times=9)


@pytest.mark.parametrize(
    ("fails", "token", "code", "words"),
    [
        (
            gate,
            None,
            4,
            "only those whom its authors let in|ask for access at {url}/someone/student,|set HF_TOKEN",
        ),
        (
            gate,
            TOKEN,
            4,
            "ask for access at {url}/someone/student, with the account of the token in HF_TOKEN",
        ),
        pytest.param(
            hide, None, 2, "no model of that name, or it is private|a token in HF_TOKEN", marks=slow
        ),
        pytest.param(hide, TOKEN, 2, "no model of that name, or it is private", marks=slow),
        (remove, None, 2, "no model of that name|{url}/someone/student"),
        (unlist, None, 2, "has it, but not that revision|lists branches and tags"),
        pytest.param(
            lose_data,
            None,
            2,
            "dataset openai/gsm8k: the hub has no dataset|{url}/datasets/openai/gsm8k",
            marks=slow,
        ),
        (lambda _hub: None, "hf_unknown", 4, "does not know the token in HF_TOKEN|make a token"),
        pytest.param(busy, None, 1, "the hub answers 429|wait 0 seconds; repeat the command", marks=slow),
        (down, None, 1, "the hub answers 503|wait 9 seconds; repeat the command"),
        pytest.param(log_in, None, 1, "is not the hub|HF_ENDPOINT", marks=slow),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_with_what_to_do(
    fails: Callable[[Hub], None],
    token: str | None,
    code: int,
    words: str,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fails(hub)
    hub.tokens[TOKEN] = False
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    told: list[str] = []
    with pytest.raises(KdpipeError) as found:
        sources(tmp_path).fetch(told.append)
    error = found.value
    said = f"{error.message}\n{error.hint}"
    assert error.exit_code == code
    assert all(word.format(url=hub.url) in said for word in words.split("|")), said
    assert len(said.splitlines()) == 2
    assert "hf_" not in said + "".join(told)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        (
            "HTTP_PROXY",
            "socks5://somebody:secret@127.0.0.1:9",
            "model someone/student: cannot be fetched: .*SOCKS",
        ),
        ("HTTP_PROXY", "http://somebody:secret@127.0.0.1:9", "no whole answer from .*refused"),
        ("HF_TOKEN", "secret\u00e9", "cannot be fetched: .*ascii"),
        ("SSL_CERT_FILE", "/nosuch", "cannot be fetched: .*No such file"),
    ],
)
def test_an_environment_that_keeps_the_client_from_the_hub_is_a_sentence_without_its_secrets(
    variable: str, value: str, words: str, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(StepError, match=words) as found:
        sources(tmp_path).fetch()
    assert "secret" not in found.value.message + found.value.hint


def test_two_runs_that_pin_at_the_same_time_keep_each_other_s_pins(tmp_path: Path, hub: Hub) -> None:
    early, commit = sources(tmp_path), commit_of(hub, "someone/student")
    sources(tmp_path, RECIPE.replace("student}", f"student, revision: {commit}}}")).fetch()
    early.fetch()
    pins = json.loads((tmp_path / "out" / "pins.json").read_text())["value"]
    assert {f"someone/student@{commit}", "someone/student@main", "someone/teacher@v2"} < pins.keys()


def test_a_token_opens_what_is_gated_and_is_shown_to_the_hub_alone(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate(hub)
    hub.tokens[TOKEN] = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    told: list[str] = []
    assert "model.safetensors" in files_of(sources(tmp_path).fetch(told.append)["student"])
    assert {one.token for one in hub.asked if "/cdn/" in one.path} == {None}
    assert {one.token for one in hub.asked if "/resolve/" in one.path} == {TOKEN}
    assert TOKEN not in "".join(told)
    assert not [path for path in (tmp_path / "out").rglob("*") if TOKEN.encode() in path.read_bytes()]


def test_what_the_hub_has_no_longer_is_not_taken_from_the_cache_for_a_new_workspace(
    tmp_path: Path, hub: Hub
) -> None:
    folders = sources(tmp_path).fetch()
    unlist(hub)
    with pytest.raises(RecipeError, match="not that revision"):
        sources(tmp_path, workspace="new").fetch()
    assert sources(tmp_path).fetch() == folders


@pytest.mark.parametrize("name", ["some one/student", pytest.param("someone/-student", marks=slow)])
def test_a_name_that_cannot_be_a_hub_id_is_refused_without_asking(
    tmp_path: Path, hub: Hub, name: str
) -> None:
    with pytest.raises(RecipeError, match=f"model {name}: not a hub id: "):
        sources(tmp_path, RECIPE.replace("someone/student", f'"{name}"')).fetch()
    assert hub.asked == []


def go_offline(_hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)


def lose_network(_hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "ENDPOINT", "http://somebody:secret@127.0.0.1:9")


def bring_down(hub: Hub, _patch: pytest.MonkeyPatch) -> None:
    hub.refusals[""] = Refusal(502, times=99)


@pytest.mark.parametrize(
    ("away", "why"),
    [
        (go_offline, "HF_HUB_OFFLINE is set"),
        (lose_network, "no whole answer from"),
        (bring_down, "answers 502"),
    ],
)
def test_without_the_hub_the_cache_is_used_as_it_was_pinned_else_as_it_is(
    away: Callable[[Hub, pytest.MonkeyPatch], None],
    why: str,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        away(hub, patch)
        with pytest.raises(StepError, match=f"model someone/student: .*{why}") as found:
            sources(tmp_path).fetch()
        assert "secret" not in found.value.message + found.value.hint
        assert not (tmp_path / "out" / "pins.json").exists()
    hub.refusals.clear()
    folders = sources(tmp_path).fetch()
    away(hub, monkeypatch)
    told: list[str] = []
    assert sources(tmp_path).fetch(told.append) == folders
    assert told == []
    assert sources(tmp_path, workspace="new").fetch(told.append) == folders
    assert len(told) == 3
    assert told[0].startswith("model someone/student: ")
    assert why in told[0]
    assert "secret" not in told[0]
    assert folders["student"].name in told[0]


def test_a_part_of_a_model_in_the_cache_is_not_taken_for_it(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sources(tmp_path).fetch()["student"]
    (folder / "model.safetensors").unlink()
    go_offline(hub, monkeypatch)
    with pytest.raises(
        StepError, match=r"someone/student at .*: HF_HUB_OFFLINE is set, and the cache has not all"
    ):
        sources(tmp_path).fetch()


def test_how_far_a_download_is_is_said_in_lines_without_a_terminal(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(client, "LINE_SECONDS", 0.0)
    hub.add("models", "someone/student", {"config.json": b"{}", "model.safetensors": b"w" * 1_000_000})
    sources(tmp_path).fetch(told.append)
    assert told[0] == f"model someone/student: fetched into {tmp_path / 'home' / 'hub'}"
    assert "model someone/student: 1.0 MB of 1.0 MB fetched" in told
    again = list(told)
    sources(tmp_path).fetch(told.append)
    assert told == again


def test_a_local_models_digest_follows_its_bytes_and_not_its_name(tmp_path: Path) -> None:
    def identity(name: str, weights: bytes) -> Any:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "README.md").write_text(name)
        text = RECIPE.replace("someone/student", f"./{name}").replace("someone/teacher, revision: v2", "./a")
        return sources(tmp_path, text).identities().models["student"]

    first = identity("a", b"one")
    assert identity("b", b"one") == first
    assert identity("b", b"two") != first


def test_an_endpoint_that_is_no_address_is_told_before_the_client_sees_it_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://somebody:secret@[")
    with pytest.raises(RecipeError, match="HF_ENDPOINT is no address: Invalid IPv6 URL") as found:
        sources(tmp_path).fetch(lambda _: None)
    assert "secret" not in str(found.value)
