"""Identities of models and data: local files by digest, hub repositories by commit.

`identities` needs no network: a hub name that was never pinned is "unresolved" until the first `run` fetches it and
writes its commit to `pins.json`, with the new name of a repository that was renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import JsonValue

from kdpipe.data.tasks import data_files, hub_data
from kdpipe.errors import ArtifactError, DataError, ModelError, RecipeError, StepError
from kdpipe.pipeline.plan import UNRESOLVED, Identities
from kdpipe.recipe.file import LoadedRecipe
from kdpipe.recipe.place import place_of
from kdpipe.recipe.roles import STUDENT
from kdpipe.recipe.schema import ModelTeacher, ServedTeacher, Student
from kdpipe.recipe.task import PythonGrader, QuestionTask
from kdpipe.store.durable import file_digest, write_json
from kdpipe.store.sealed import seal_value, unseal_value
from kdpipe.store.step import Fields, canonical

TEXT_SUFFIXES = {".json", ".model", ".txt", ".jinja", ".py"}
MODEL_SUFFIXES = TEXT_SUFFIXES | {".safetensors"}
Kind = Literal["model", "tokenizer", "dataset"]
PINS = "memory of hub pins"
DIGESTS = "memory of file digests"


@dataclass(slots=True)
class Sources:
    """Finds the models and data of one recipe, with the workspace's memory of digests and pins."""

    loaded: LoadedRecipe
    workspace: Path
    _digests: dict[str, JsonValue] = field(default_factory=dict)
    _pins: dict[str, JsonValue] = field(default_factory=dict)
    _changed: bool = False

    def __post_init__(self) -> None:
        try:
            self._digests = _read(self.workspace / "digests.json", kind=DIGESTS)
        except ArtifactError:  # it only saves reading files again
            self._digests = {}
        self._pins = _read(self.workspace / "pins.json", kind=PINS)

    def identities(self) -> Identities:
        """What the recipe's models and data are; raises RecipeError or DataError when a local one is missing."""
        models = {role: self._model(named) for role, named in self._named().items()}
        task = self.loaded.recipe.task
        data: dict[str, Fields]
        if hub := hub_data(task, self.loaded.folder):
            identity = self._hub_identity("dataset", hub.name, hub.revision)
            data = {"train": identity, "test": identity}
        else:
            files = data_files(task, self.loaded.folder)
            data = {split: {"digest": self._digest(path)} for split, path in files.items()}
        grader = self._grader()
        if isinstance(task, QuestionTask) and task.drop_overlong:
            fits = self._fitted(models)
            data = {split: {**fields, "fits": fits} for split, fields in data.items()}
        if self._changed:
            with contextlib.suppress(StepError):  # it only saves reading again; plan need not write
                write_json(self.workspace / "digests.json", seal_value(DIGESTS, self._digests))
            self._changed = False
        return Identities(models=models, data=data, grader=grader)

    def _grader(self) -> Fields | None:
        """What a user's code that grades is; raises RecipeError unless the file has the function."""
        grader = self.loaded.recipe.task.grader
        if not isinstance(grader, PythonGrader):
            return None
        from kdpipe.data.graders.judge import require_function

        path = place_of(grader.file, self.loaded.folder)
        require_function(path, grader.function)
        return {"digest": self._digest(path)}

    def look(self) -> dict[str, str]:
        """What each named model is, by role: its folder's model type, or that it is on the hub.

        Raises RecipeError where a local folder is none of a model, or a user's grader is not there. Of models it reads
        configs alone.
        """
        found = {}
        for role, named in self._named().items():
            folder = _local_folder(named.name, self.loaded.folder)
            if folder is None:
                found[role] = f"{named.name} on the hub, not looked at"
                continue
            _model_files(folder, named)
            kind = "the tokenizer" if named.served is not None else _model_type(folder)
            found[role] = f"{kind} in {folder}"
        self._grader()
        return found

    def _fitted(self, models: Mapping[str, Fields]) -> Fields:
        """What decides which problems are left out, as some model does not hold them."""
        recipe = self.loaded.recipe
        here = [teacher for teacher in recipe.teachers if not isinstance(teacher, ServedTeacher)]
        sections = (recipe.student, recipe.rollout, recipe.evaluate, *here)
        read: JsonValue = [section.model_dump(mode="json", by_alias=True) for section in sections]
        return {"models": dict(models), "sections": read}

    def fetch(
        self, tell: Callable[[str], None] = lambda _text: None, *, without_weights: bool = False
    ) -> dict[str, Path]:
        """Folders of every model by role, and of hub data as "data"; downloads and pins what is not here.

        `tell` is told what a person should know of it, and how far it is. Without weights, configs and tokenizers are
        fetched alone.
        """
        folders: dict[str, Path] = {}
        for role, named in self._named().items():
            local = _local_folder(named.name, self.loaded.folder)
            kind: Kind = "model" if named.served is None else "tokenizer"
            is_whole = kind == "model" and not without_weights
            patterns = [f"*{suffix}" for suffix in (MODEL_SUFFIXES if is_whole else TEXT_SUFFIXES)]
            folders[role] = local or self._download(kind, named.name, named.revision, patterns, tell)
        if hub := hub_data(self.loaded.recipe.task, self.loaded.folder):
            folders["data"] = self._download("dataset", hub.name, hub.revision, hub.patterns, tell)
        return folders

    def cached_data(self) -> Path | None:
        """The folder of the recipe's hub data if a run has fetched it to this machine; downloads nothing."""
        hub = hub_data(self.loaded.recipe.task, self.loaded.folder)
        commit = None if hub is None else self._pinned("dataset", hub.name, hub.revision)
        if hub is None or commit is None:
            return None
        _require_endpoint()
        from kdpipe.pipeline.hub import Repository, cached_folder

        return cached_folder(
            Repository("dataset", self._name_today("dataset", hub.name), commit), hub.patterns
        )

    def tokenizer_file(self, role: str) -> Path | None:
        """The tokenizer.json of a named model if it is on this machine; downloads nothing."""
        if (named := self._named().get(role)) is None:
            return None
        if (folder := _local_folder(named.name, self.loaded.folder)) is not None:
            path = folder / "tokenizer.json"
            return path if path.is_file() else None
        commit = self._pinned("model", named.name, named.revision)
        if commit is None:
            return None
        _require_endpoint()
        from kdpipe.pipeline.hub import cached_file

        return cached_file(self._name_today("model", named.name), "tokenizer.json", commit)

    def _named(self) -> dict[str, _Named]:
        """What the recipe's models name, by role; without those that a step or the student makes."""
        recipe, found = self.loaded.recipe, dict[str, _Named]()
        for role, model in ((STUDENT, recipe.student), *((one.name, one) for one in recipe.teachers)):
            match model:
                case ServedTeacher(server=server):
                    found[role] = _Named(server.tokenizer, server.revision, server.model)
                case ModelTeacher(model=name) | Student(model=str(name)):
                    found[role] = _Named(name, model.revision)
        return found

    def _model(self, named: _Named) -> Fields:
        """What a model is; of a served one its name there, and what the tokenizer beside it is."""
        served: Fields = {} if named.served is None else {"served": named.served}
        folder = _local_folder(named.name, self.loaded.folder)
        if folder is None:
            return served | self._hub_identity("model", named.name, named.revision)
        parts: JsonValue = [[path.name, self._digest(path)] for path in _model_files(folder, named)]
        digest = hashlib.sha256(canonical(parts)).hexdigest()
        return {**served, "digest": digest, **({"revision": named.revision} if served else {})}

    def _hub_identity(self, kind: Kind, name: str, revision: str | None) -> Fields:
        hub = _hub_name(kind, self._name_today(kind, name))
        return {"hub": hub, "revision": self._pinned(kind, name, revision) or UNRESOLVED}

    def _name_today(self, kind: Kind, name: str) -> str:
        """The name that a repository had when it was pinned."""
        return str(self._pins.get(_hub_name(kind, name), name))

    def _pinned(self, kind: Kind, name: str, revision: str | None) -> str | None:
        """The commit that `revision` is or was pinned to."""
        if re.fullmatch(r"[0-9a-f]{40}", revision or ""):
            return revision
        pin = self._pins.get(_pin_key(kind, name, revision))
        return pin if isinstance(pin, str) else None

    def _digest(self, path: Path) -> str:
        try:
            stat = path.stat()
            stamp: list[JsonValue] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
            known = self._digests.get(str(path))
            if isinstance(known, list) and known[:3] == stamp:
                return str(known[3])
            digest = file_digest(path)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read: {error.strerror}", hint="fix the path in the recipe"
            ) from error
        self._digests[str(path)] = [*stamp, digest]
        self._changed = True
        return digest

    def _download(
        self,
        kind: Kind,
        name: str,
        revision: str | None,
        patterns: list[str],
        tell: Callable[[str], None],
    ) -> Path:
        _require_endpoint()
        from kdpipe.pipeline.hub import Repository, download, resolve

        repo_kind: Literal["model", "dataset"] = "dataset" if kind == "dataset" else "model"
        key = _pin_key(kind, name, revision)
        if key not in self._pins:
            today, commit = resolve(Repository(repo_kind, name, revision), tell)
            new: dict[str, JsonValue] = {key: commit}
            if today != name:
                new[_hub_name(kind, name)] = today
            path = self.workspace / "pins.json"
            self._pins = new | _read(path, kind=PINS)  # another run may have pinned meanwhile
            self.workspace.mkdir(parents=True, exist_ok=True)
            write_json(path, seal_value(PINS, self._pins))
        pinned = Repository(repo_kind, self._name_today(kind, name), str(self._pins[key]))
        folder = download(pinned, patterns, tell)
        if "*.safetensors" in patterns and not any(folder.glob("*.safetensors")):
            raise ModelError(
                f"model {name}: the hub has no *.safetensors of it, and pickles (*.bin) are not opened",
                hint="look for another revision of it: the hub converts many, as a pull request (revision: refs/pr/1)",
            )
        return folder


class _Named(NamedTuple):
    """A repository or folder named by a model's section; `served` is the model's name on its server."""

    name: str
    revision: str | None
    served: str | None = None


def _model_files(folder: Path, named: _Named) -> list[Path]:
    """The files of a local model that make it what it is; raises RecipeError where one is missing."""
    suffixes = MODEL_SUFFIXES if named.served is None else TEXT_SUFFIXES
    files = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
    if named.served is not None and not any(path.name.startswith("tokenizer") for path in files):
        raise RecipeError(
            f"{folder}: no tokenizer: tokenizer.json is missing",
            hint="name the folder or hub id of the model that the server runs in teachers[].server.tokenizer",
        )
    if named.served is None and not any(path.name == "config.json" for path in files):
        raise RecipeError(
            f"{folder}: not a model folder: config.json is missing",
            hint="name a folder that transformers' save_pretrained wrote",
        )
    from kdpipe.models.model_folder import require_own_files

    require_own_files(folder)
    return files


def _model_type(folder: Path) -> str:
    path = folder / "config.json"
    config = json.loads(path.read_bytes())
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise RecipeError(
            f"{path}: no model_type in it", hint="name a folder that transformers' save_pretrained wrote"
        )
    return str(config["model_type"])


def _require_endpoint() -> None:
    """Raises RecipeError where HF_ENDPOINT is no address: the client would fail on its import."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:
        urlsplit(endpoint)
    except ValueError as error:
        raise RecipeError(f"HF_ENDPOINT is no address: {error}", hint="correct it, or unset it") from None


def _local_folder(name: str, folder: Path) -> Path | None:
    """The local folder that `name` means, or None for a hub id."""
    path = place_of(name, folder).resolve()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RecipeError(
            f"{path}: no such model folder",
            hint="fix student.model, teachers[].model or teachers[].server.tokenizer in the recipe",
        )
    return None


def _hub_name(kind: Kind, name: str) -> str:
    return f"datasets/{name}" if kind == "dataset" else name


def _pin_key(kind: Kind, name: str, revision: str | None) -> str:
    return f"{_hub_name(kind, name)}@{revision or 'main'}"


def _read(path: Path, *, kind: str) -> dict[str, JsonValue]:
    """What the workspace remembers in `path`; raises ArtifactError when that is damaged."""
    try:
        value = unseal_value(path, path.read_bytes(), kind=kind)
    except FileNotFoundError:
        return {}
    except ArtifactError as error:
        raise ArtifactError(
            error.message,
            hint="put back a copy of it; without one remove it, and the next run pins hub names anew: to what they "
            "mean by then",
        ) from None
    return value if isinstance(value, dict) else {}
