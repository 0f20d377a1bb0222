"""The teachers of a recipe: four kinds, distinguished by where a teacher's scores come from."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Discriminator, Field, JsonValue, Tag, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from kdpipe.recipe.models import Scratch, Sft
from kdpipe.recipe.section import NAME, DtypeName, Positive, PromptStyleName, Section

PROMPT_PIECE = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")
"""What a teacher's prompt holds beside plain text: a literal brace, or the name of a field of the record."""

FieldValue = Annotated[str, Field(min_length=1)] | int | float
Routes = Annotated[
    dict[str, FieldValue | Annotated[list[FieldValue], Field(min_length=1)]], Field(min_length=1)
]


class Server(Section):
    """A model behind HTTP.

    Fingerprints hold `model`, `revision` and the content of the tokenizer; where the server is does not count.
    """

    urls: Annotated[list[str], Field(min_length=1)]
    """Base URLs of servers that hold the same weights."""
    model: Annotated[str, Field(min_length=1)]
    """The name under which they serve it."""
    tokenizer: Annotated[str, Field(min_length=1)]
    """Hub id or local folder of its tokenizer, to compare vocabularies."""
    revision: str | None = None
    """Branch, tag or commit of the tokenizer on the hub."""
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable that holds the key; the key itself is never written."""

    allow_http: bool = False
    """Whether prompts, completions and the key may go to another machine unencrypted."""

    def faults(self) -> Iterator[str]:
        for number, url in enumerate(self.urls):
            if trouble := _trouble_of(url):  # the URL itself is not repeated: it may hold a password
                yield f"urls.{number} {trouble}; write it as https://host:8000/v1"
            if not self.allow_http and urlsplit(url).scheme == "http" and not _is_this_machine(url):
                yield (
                    f"urls.{number} is plain http to another machine: the key and all texts can be read and changed "
                    "on their way; use https, or say allow_http: true"
                )


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or bool(re.fullmatch(r"127(\.\d{1,3}){3}", host))


def _trouble_of(url: str) -> str | None:
    """Why this is no base URL that a path can be put behind; None when it is one."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known or not url.isprintable() or " " in url:
        return "is no http or https URL with a host"
    if "@" in parts.netloc:
        return "holds a user or password: name the variable of the key in api_key_env"
    if "?" in url or "#" in url or ";" in url:
        return "holds a query or fragment"
    return None


class TeacherFields(Section):
    """What every kind of teacher has."""

    name: Annotated[str, Field(pattern=NAME)] = "teacher"
    """What its steps, tables and messages call it."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run; commands ask for --trust, once in a workspace."""
    template: dict[str, JsonValue] = {}
    """Arguments of the chat template, such as enable_thinking; empty are the student's."""
    prompt: str | None = None
    """The teacher's own prompt, with {question} and, privileged, {solution} or any other field of the record;
    null is the student's."""
    prompt_style: PromptStyleName = "student"
    """student reads the student's prompt, ids and all; chat and plain are its own: its chat template, or bare text."""
    temperature: Positive | None = None
    """Temperature at which it scores; null is the rollout temperature."""
    only: Routes | None = None
    """Teaches only the problems whose record has these values; without it all teachers score every completion."""
    weight: Positive | None = None
    """Its share of the mixture, where several score every completion."""

    def faults(self) -> Iterator[str]:
        if self.name == "student":
            yield "a teacher cannot be called 'student'"
        if self.prompt is not None and "question" not in self.prompt_fields:
            yield "prompt must contain {question}"

    @property
    def prompt_fields(self) -> tuple[str, ...]:
        """The names that the teacher's own prompt is filled in with, in the order of the text."""
        names = (match[1] for match in PROMPT_PIECE.finditer(self.prompt or ""))
        return tuple(dict.fromkeys(name for name in names if name))

    @property
    def is_privileged(self) -> bool:
        """Whether it is shown more of the record than the question."""
        return bool({*self.prompt_fields} - {"question"})


class OwnTeacher(TeacherFields):
    """What a teacher has whose weights are its own, and here."""

    dtype: DtypeName = "auto"
    """Numbers that it computes in; auto is float32 where bfloat16 would be emulated."""
    quantization: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")] | None = None
    """The method, by vLLM's name, by which that engine stores the weights in fewer bits."""
    sft: Sft | None = None
    """Cold start before round 1, on the reference solutions of the problems that it teaches."""


class ModelTeacher(OwnTeacher):
    """A teacher from a hub id or a local folder, with an optional cold start."""

    model: str
    """Hub id or local folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null is pinned by the first run."""

    @property
    def has_cold_start(self) -> bool:
        """Whether an sft step makes its weights."""
        return self.sft is not None


class ScratchTeacher(OwnTeacher):
    """A teacher made from random weights and its cold start, for tasks with their own tokenizer."""

    scratch: Scratch
    """A Llama model made from the seed, for tasks that bring their tokenizer."""
    has_cold_start: ClassVar = True


class SelfTeacher(TeacherFields):
    """The student itself as teacher.

    `initial` is the student before round 1, `current` the one that sampled the round, `ema` the average of the
    students so far.
    """

    self_: Annotated[Literal["initial", "current", "ema"], Field(alias="self")]
    """The student before round 1, the one that sampled the round, or the average of the students so far."""
    decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """With self: ema, the share of the average before that each round keeps; the rest is the new student."""
    dtype: DtypeName = "auto"
    """Numbers that it computes in; auto is the student's dtype."""
    quantization: ClassVar[None] = None
    sft: ClassVar[None] = None
    has_cold_start: ClassVar = False

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if (self.decay is not None) != (self.self_ == "ema"):
            yield "decay goes with self: ema, which needs it"


class ServedTeacher(TeacherFields):
    """A teacher behind a server, which computes in its own dtype and is not trained here."""

    server: Server
    """Where the server is, the name of the model there, and its tokenizer."""
    dtype: ClassVar[DtypeName] = "auto"
    quantization: ClassVar[None] = None
    sft: ClassVar[None] = None
    has_cold_start: ClassVar = False


KINDS: Mapping[str, type[TeacherFields]] = {
    "model": ModelTeacher,
    "scratch": ScratchTeacher,
    "self": SelfTeacher,
    "server": ServedTeacher,
}
"""The kinds by the one field that only they have, and must have."""
WHAT = {
    "model": "is a model",
    "scratch": "is made from scratch",
    "self": "is the student itself",
    "server": "is behind a server, which decides that itself",
}
"""What a teacher of each kind is, in messages."""
ABSENT: Mapping[str, JsonValue] = {
    info.alias or name: None if info.is_required() else info.default
    for kind in KINDS.values()
    for name, info in kind.model_fields.items()
}
"""Every field of any kind, with the value that says nothing."""


def _of_one_kind(value: Any) -> Any:
    """A teacher's mapping without the fields of other kinds; raises where one of them says something."""
    if not isinstance(value, dict):
        return value
    found = [key for key in KINDS if value.get(key) is not None]
    if len(found) != 1:
        _raise_wrong(value, {} if found else _near_kinds(value))
        both = f"; this teacher has {' and '.join(found)}" if found else ""
        raise ValueError(f"give exactly one of: {', '.join(KINDS)}{both}")
    own = {info.alias or name for name, info in KINDS[found[0]].model_fields.items()}
    foreign = [key for key in value if key in ABSENT and key not in own]
    wrong = [key for key in foreign if value[key] != ABSENT[key]]
    what = f"this teacher {WHAT[found[0]]}"
    _raise_wrong(value, {key: f"{_owners(key)}; {what}: remove it" for key in wrong})
    return {key: item for key, item in value.items() if key not in foreign}


def _owners(field: str) -> str:
    """Which kinds have a field, as `goes with model or scratch`."""
    *most, last = [key for key, kind in KINDS.items() if field in kind.model_fields]
    return f"goes with {', '.join(most)}{' or ' if most else ''}{last}"


def _near_kinds(value: dict[str, object]) -> dict[str, str]:
    """What is wrong with unknown keys that are nearly the field of a kind."""
    import difflib  # for this error alone

    near = {key: difflib.get_close_matches(key, KINDS, n=1, cutoff=0.5) for key in value if key not in ABSENT}
    return {key: f"unknown key; did you mean {names[0]!r}?" for key, names in near.items() if names}


def _raise_wrong(value: dict[str, object], messages: dict[str, str]) -> None:
    """Raises an error for each field that has a message."""
    details = [
        InitErrorDetails(type=PydanticCustomError("teacher_field", text), loc=(key,), input=value[key])
        for key, text in messages.items()
    ]
    if details:
        raise ValidationError.from_exception_data("Teacher", details)


def _kind_of(value: Any) -> str:
    """The name of the class that a teacher is read as."""
    own = [kind.__name__ for key, kind in KINDS.items() if isinstance(value, dict) and key in value]
    return own[0] if own else type(value).__name__


Teacher = Annotated[
    Annotated[ModelTeacher, Tag("ModelTeacher")]
    | Annotated[ScratchTeacher, Tag("ScratchTeacher")]
    | Annotated[SelfTeacher, Tag("SelfTeacher")]
    | Annotated[ServedTeacher, Tag("ServedTeacher")],
    Discriminator(
        _kind_of,
        custom_error_type="teacher",
        custom_error_message="a teacher is a mapping, as in - {self: initial}",
    ),
    BeforeValidator(_of_one_kind),
]
