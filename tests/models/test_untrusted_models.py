"""Model folders from elsewhere: what is malicious in one is refused with a sentence, or does nothing.

Each trick is played on the student, on a teacher, and in the store. A payload that ran would leave a file behind.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kdpipe.data.rows import Problem
from kdpipe.data.tasks.arithmetic import words
from kdpipe.errors import ArtifactError, ModelError, PreflightError
from kdpipe.models.folder import open_model, read_architecture, read_head, scratch_model, write_model
from kdpipe.models.model_folder import MAX_DEPTH, MAX_SETTINGS_BYTES, require_own_files
from kdpipe.models.prompting import PromptStyle, render_prompt
from kdpipe.models.template import MAX_TEMPLATE_LINES
from kdpipe.models.tokenizer import arithmetic_tokenizer, num_ids_in_use, open_tokenizer
from kdpipe.pipeline.identities import Sources
from kdpipe.recipe.models import Scratch
from tests.worlds import load_tiny, payload_digests, run_near

CPU = torch.device("cpu")
Trick = Callable[[Path, Path], None]
"""Puts something into a good model folder (first) that would leave the file (second) if it ran."""


class Payload:
    """An object whose unpickling makes a file."""

    def __init__(self, owned: Path) -> None:
        self.owned = owned

    def __reduce__(self) -> Any:
        return Path.touch, (self.owned,)


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def remote_code(model: Path, owned: Path) -> None:
    code = f"from pathlib import Path\nPath({str(owned)!r}).touch()\nclass A: pass\nB = C = A\n"
    (model / "evil.py").write_text(code)


def only_pickles(model: Path, owned: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(owned)))


def remote_model(model: Path, owned: Path) -> None:
    remote_code(model, owned)
    edit(
        model / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B"},
    )


def adapter_of_another(model: Path, owned: Path) -> None:
    other = owned.parent / "other"
    other.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(other), "task_type": "CAUSAL_LM"}
    (model / "adapter_config.json").write_text(json.dumps(config))
    (model / "adapter_model.bin").write_bytes(pickle.dumps(Payload(owned)))


def index_to(name: str) -> Trick:
    def play(model: Path, owned: Path) -> None:
        outside = owned.parent / "outside.safetensors"
        (model / "model.safetensors").rename(outside)
        place = str(outside) if name == "absolute" else name
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": place}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        shutil.copy(outside, model / "decoy.safetensors")

    return play


def link_out(name: str) -> Trick:
    def play(model: Path, owned: Path) -> None:
        outside = owned.parent / f"outside-{name}"
        (model / name).rename(outside)
        (model / name).symlink_to(outside)

    return play


def link_to_device(model: Path, _owned: Path) -> None:
    (model / "added_tokens.json").symlink_to("/dev/zero")


def pipe(model: Path, _owned: Path) -> None:
    os.mkfifo(model / "special_tokens_map.json")


def huge_config(model: Path, _owned: Path) -> None:
    with (model / "config.json").open("r+b") as file:
        file.truncate(1 << 30)  # a hole: nothing is written


def deep_config(depth: int) -> Trick:
    def play(model: Path, _owned: Path) -> None:
        text = (model / "config.json").read_text().rstrip()
        (model / "config.json").write_text(text[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}")

    return play


def header(data: bytes) -> Trick:
    def play(model: Path, _owned: Path) -> None:
        (model / "model.safetensors").write_bytes(data)

    return play


def named_weights(model: Path, _owned: Path) -> None:
    edit(model / "config.json", transformers_weights="../outside.safetensors")


REFUSED: dict[str, tuple[Trick, str]] = {
    "only pickles": (only_pickles, "pickles"),
    "remote code": (remote_model, "trust_remote_code"),
    "an adapter of another model": (adapter_of_another, "adapter_config.json"),
    "an index that leads up": (index_to("../outside.safetensors"), "names the file '../outside"),
    "an index with a whole path": (index_to("absolute"), "expected one in its folder"),
    "an index with a null": (index_to("a\0b"), "names the file"),
    "weights linked from elsewhere": (link_out("model.safetensors"), "link that leads out"),
    "a tokenizer linked from elsewhere": (link_out("tokenizer.json"), "link that leads out"),
    "settings linked from elsewhere": (link_out("config.json"), "link that leads out"),
    "a link to a device": (link_to_device, "leads out"),
    "a pipe": (pipe, "no plain file"),
    "settings of a gigabyte": (huge_config, f"at most {MAX_SETTINGS_BYTES}"),
    "settings nested without end": (deep_config(100_000), "nested"),
    "settings nested deeply": (deep_config(MAX_DEPTH + 1), f"more than {MAX_DEPTH} levels"),
    "a header that says it is huge": (header(struct.pack("<Q", 1 << 62) + b"{}"), "cannot be opened"),
    "a header of 100 MB that is not there": (header(struct.pack("<Q", 99_999_999) + b"{}"), "cannot be"),
    "a header that is no JSON": (header(struct.pack("<Q", 8) + b"\x80\x04\x95abcde"), "cannot be opened"),
    "tensors beyond the end": (
        header(
            struct.pack("<Q", 71)
            + b'{"lm_head.weight":{"dtype":"F32","shape":[9,9],"data_offsets":[0,324]}}'[:71]
        ),
        "cannot be opened",
    ),
    "weights by another name elsewhere": (named_weights, "names the file '../outside"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without anything wrong."""
    folder = tmp_path_factory.mktemp("good") / "model"
    folder.mkdir()
    sizes = Scratch(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1)
    tokenizer = arithmetic_tokenizer(words())
    network = scratch_model(sizes, num_ids=num_ids_in_use(tokenizer), eos_id=1, pad_id=0, seed=3)
    write_model(network, tokenizer, folder, dtype=torch.float32)
    return folder


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.fixture
def owned(tmp_path: Path) -> Iterator[Path]:
    """The file that a payload would make."""
    path = tmp_path / "owned"
    yield path
    assert not path.exists()


def open_all(folder: Path) -> None:
    open_tokenizer(folder, trust_remote_code=False)
    open_model(folder, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("trick", sorted(REFUSED))
def test_a_malicious_folder_is_refused_wherever_it_is_opened(trick: str, model: Path, owned: Path) -> None:
    open_all(model)
    play, why = REFUSED[trick]
    play(model, owned)
    with pytest.raises(ModelError, match=why) as caught:
        open_all(model)
    assert caught.value.exit_code == 4
    for opens in (
        read_architecture,
        lambda folder: read_head(folder, num_ids=3, dtype=torch.float32, device=CPU),
    ):
        try:
            opens(model)
        except ModelError:
            continue
        # Nothing is read of the weights there but their shapes, or the rows that are asked for.
        assert "header" in trick or "beyond" in trick


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("trick", sorted(REFUSED))
def test_a_run_with_a_malicious_folder_ends_before_it_makes_anything(
    trick: str, role: str, model: Path, owned: Path, tmp_path: Path
) -> None:
    play, why = REFUSED[trick]
    play(model, owned)
    evil: dict[str, Any] = {"model": "./model", "dtype": "float32"}
    changes: dict[str, Any] = {"student": evil, "teachers": [{"self": "initial"}]}
    if role == "teacher":
        changes = {"student__sft": None, "teachers": [evil]}
    loaded = load_tiny(tmp_path, rounds=1, evaluate={"reverse_kl_problems": 0}, **changes)
    with pytest.raises(ModelError, match=why):
        run_near(loaded, tmp_path / "out")
    assert not list((tmp_path / "out").glob("store/*/*/model/*")) or role == "teacher"
    for manifest in (tmp_path / "out").glob("store/*/*/manifest.json"):  # of a student from nothing
        assert json.loads(manifest.read_text())["provenance"]["step"] in (
            "sft:student@0",
            "evaluate:student@0",
        )


def pickles_beside(model: Path, owned: Path) -> None:
    for name in ("pytorch_model.bin", "model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth"):
        (model / name).write_bytes(pickle.dumps(Payload(owned)))


def remote_code_of_a_known_model(model: Path, owned: Path) -> None:
    remote_code(model, owned)
    edit(model / "config.json", auto_map={"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B"})
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.A", "evil.B"]})
    (model / "custom_generate").mkdir()
    shutil.copy(model / "evil.py", model / "custom_generate" / "generate.py")
    shutil.copy(model / "evil.py", model / "sitecustomize.py")


def remote_tokenizer(model: Path, owned: Path) -> None:
    remote_code(model, owned)
    edit(
        model / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": ["evil.A", None]},
    )


@pytest.mark.parametrize("play", [pickles_beside, remote_code_of_a_known_model], ids=lambda p: p.__name__)
def test_what_is_not_asked_for_is_not_opened(play: Trick, model: Path, good: Path, owned: Path) -> None:
    play(model, owned)
    opened = open_model(model, dtype=torch.float32, device=CPU)
    expected = open_model(good, dtype=torch.float32, device=CPU)
    assert type(opened) is type(expected)
    for (name, weight), (other, wanted) in zip(
        opened.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(weight, wanted)
    tokenizer = open_tokenizer(model, trust_remote_code=False)
    assert tokenizer.get_vocab() == open_tokenizer(good, trust_remote_code=False).get_vocab()


def test_a_tokenizer_with_code_of_its_own_is_refused(model: Path, owned: Path) -> None:
    remote_tokenizer(model, owned)
    with pytest.raises(ModelError, match="trust_remote_code"):
        open_tokenizer(model, trust_remote_code=False)


def test_files_are_looked_at_before_any_is_read_for_its_digest(
    model: Path, owned: Path, tmp_path: Path
) -> None:
    link_to_device(model, owned)  # reading it would not end
    loaded = load_tiny(tmp_path, student={"model": "./model"}, teachers=[{"self": "initial"}])
    with pytest.raises(ModelError, match="leads out"):
        Sources(loaded, tmp_path / "out").identities()
    server = {"urls": ["http://127.0.0.1:9/v1"], "model": "m", "tokenizer": "./model"}
    loaded = load_tiny(tmp_path, teachers=[{"server": server}])
    with pytest.raises(ModelError, match="leads out"):
        Sources(loaded, tmp_path / "out").identities()


def test_a_snapshot_of_the_hub_s_cache_may_link_to_its_own_blobs_and_to_no_others(
    good: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "c0ffee", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(good.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    open_all(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(good / "config.json")
    with pytest.raises(ModelError, match="leads out"):
        require_own_files(snapshot)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"version": "1.0"}',
        '{"model": {"type": "BPE", "vocab": 5}}',
        '{"added_tokens": 5, "model": null}',
        '{"added_tokens": [{"id": -1}], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}',
        '{"model": ' + "[" * 5000 + "]" * 5000 + "}",
        "\0" * 100,
    ],
)
def test_a_broken_tokenizer_is_told_as_one(model: Path, text: str) -> None:
    (model / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match="tokenizer cannot be opened"):
        open_tokenizer(model, trust_remote_code=False)


# ------------------------------------------------------------------------------------- chat templates

TEMPLATES = {
    "attributes of a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a method": "{{ cycler.__init__.__globals__.os.system('touch OWNED') }}",
    "globals of a function": "{{ lipsum.__globals__['os'].system('touch OWNED') }}",
    "the environment": "{{ self._TemplateReference__context.environment }}",
    "through a filter": "{{ (messages|attr('__class__')).mro() }}",
    "a namespace": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "change the messages": "{{ messages.append(1) }}",
    "read a file": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch OWNED') }}",
    "a range that is too large": "{% for i in range(10**9) %}{% endfor %}",
    "ranges in ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "two calls of itself": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "division by zero": "{{ 1 / 0 }}",
    "an index that is not there": "{{ [][0].x.y }}",
    "syntax": "{% for %}",
    "an exception of its own": "{{ raise_exception('no') }}",
}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_chat_template_reaches_nothing_and_ends(name: str, model: Path, owned: Path) -> None:
    tokenizer = open_tokenizer(model, trust_remote_code=False)
    tokenizer.chat_template = TEMPLATES[name].replace("OWNED", str(owned))
    style = PromptStyle("chat", "", 0, (), {})
    with pytest.raises(PreflightError, match="its chat template") as caught:
        render_prompt(tokenizer, style, Problem("x/0", "How many?", "4", "#### 4", {}))
    assert caught.value.exit_code == 4


def test_lines_of_templates_are_counted_each_time_anew_and_tracing_is_left_as_it_was(model: Path) -> None:
    import sys

    tokenizer = open_tokenizer(model, trust_remote_code=False)
    turns = MAX_TEMPLATE_LINES // 20
    tokenizer.chat_template = (
        f"{{% for i in range({min(turns, 99_999)}) %}}{{% endfor %}}4 {{{{ messages[0].content }}}}"
    )
    style = PromptStyle("chat", "", 0, (), {})
    before = sys.gettrace()
    for _ in range(21):
        assert render_prompt(tokenizer, style, Problem("x/0", "How many?", "4", "#### 4", {}))
    assert sys.gettrace() is before


# -------------------------------------------------------------------------------------- in the store


def beside(name: str) -> Trick:
    def play(model: Path, owned: Path) -> None:
        (model / name).write_bytes(pickle.dumps(Payload(owned)))

    return play


STORED: dict[str, Trick] = {
    **{name: play for name, (play, _) in REFUSED.items() if name != "an adapter of another model"},
    "an adapter of another model": adapter_of_another,
    "pickles beside": pickles_beside,
    "a chat template beside": beside("chat_template.jinja"),
    "an index beside": beside("model.safetensors.index.json"),
    "code for a known model": remote_code_of_a_known_model,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    changes = {"teachers": [{"self": "initial"}], "rounds": 1, "evaluate": {"reverse_kl_problems": 0}}
    run_near(load_tiny(folder, **changes), folder / "out")
    return folder


TWO_ROUNDS = {"teachers": [{"self": "initial"}], "rounds": 2, "evaluate": {"reverse_kl_problems": 0}}


@pytest.mark.parametrize(
    "trick",
    [
        # A manifest names the files of an entry: any other file and any other bytes are one case.
        pytest.param(name, marks=() if number % 3 == 0 else pytest.mark.slow)
        for number, name in enumerate(sorted(STORED))
    ],
)
def test_a_store_entry_that_was_tampered_with_is_damaged(
    trick: str, finished: Path, owned: Path, tmp_path: Path
) -> None:
    world = Path(shutil.copytree(finished, tmp_path / "world", symlinks=True))
    [place] = (world / "out").glob("store/train/*/model")
    STORED[trick](place, owned)
    with pytest.raises(ArtifactError) as caught:
        run_near(load_tiny(world, **TWO_ROUNDS), world / "out")
    assert "--force train@1" in caught.value.hint


def test_what_was_tampered_with_is_rebuilt_as_it_was(finished: Path, owned: Path, tmp_path: Path) -> None:
    digests = []
    for trick in (None, "a chat template beside"):
        world = Path(shutil.copytree(finished, tmp_path / str(trick), symlinks=True))
        if trick is not None:
            [place] = (world / "out").glob("store/train/*/model")
            STORED[trick](place, owned)
        run_near(load_tiny(world, **TWO_ROUNDS), world / "out", force=("train@1",) if trick else ())
        digests.append(payload_digests(world / "out"))
    assert digests[0] == digests[1]
