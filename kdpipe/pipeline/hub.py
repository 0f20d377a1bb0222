"""Commits of the hub's repositories, and their files in the hub's cache.

The only module that talks to the hub. What the hub or the network refuses is one sentence with what to do. The
token is the client's own (HF_TOKEN), and is in no message; addresses are told without
their queries, which may be signed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from huggingface_hub import HfApi, constants, get_token, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils.tqdm import tqdm

from kdpipe.engines.server.http import retry_after
from kdpipe.errors import KdpipeError, PreflightError, RecipeError, StepError, is_machine_fault, refusal
from kdpipe.pipeline.signals import Stop, signals

Kind = Literal["model", "dataset"]
Tell = Callable[[str], None]
Found = TypeVar("Found")
RETRIES = 4
"""How often the hub is asked again where it is asked too much."""
LINE_SECONDS = 10.0
"""How often a download says how far it is where stderr is no terminal, which shows a bar."""
KEPT = "repeat the command later: files that are whole are kept; or name a local folder instead"
_ANOTHER = "make a token at https://huggingface.co/settings/tokens and set HF_TOKEN to it"


class Repository(NamedTuple):
    """A repository of the hub at a revision: a branch, a tag or a commit; None is its main branch."""

    kind: Kind
    name: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" + (f" at {self.revision}" if self.revision else "")

    @property
    def page(self) -> str:
        return f"{_address()}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"


def resolve(asked: Repository, tell: Tell) -> tuple[str, str]:
    """The repository's name of today and the commit that its revision means.

    Where the hub is away: what it meant when the cache got it.
    """
    api, name, away = HfApi(), asked.name, None
    with _explained(asked), signals() as stop:
        wait = functools.partial(_wait, asked, tell=tell, stop=stop)
        try:
            name = _let_in(
                lambda: api.repo_info(asked.name, revision=asked.revision, repo_type=asked.kind), wait
            ).id
        except (OfflineModeIsEnabled, HTTPError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            away = error
        # Asked once more, unless it is a commit: this keeps the answer in the cache, and takes it from there where the
        # hub is away.
        commit = _let_in(
            lambda: api.resolve_revision(name, revision=asked.revision, repo_type=asked.kind), wait
        ).resolved
    if away is not None and commit != asked.revision:
        tell(f"{asked}: {_reason(away)}; taken at commit {commit}, which the cache has")
    if name != asked.name:
        tell(
            f"{asked}: the hub calls it {name} now, and that is what is pinned: write this name in the recipe"
        )
    return name, commit


def _let_in(ask: Callable[[], Found], wait: Callable[[float], None]) -> Found:
    """What the hub answers; where it is asked too much (429), after the time that it asks to wait.

    The client does so itself of files.
    """
    for attempt in range(RETRIES):
        try:
            return ask()
        except HfHubHTTPError as error:
            if error.response.status_code != 429:
                raise
            wait(retry_after(error.response.headers.get("Retry-After")) or 2.0**attempt)
    return ask()


def _wait(asked: Repository, seconds: float, *, tell: Tell, stop: Stop) -> None:
    tell(f"{asked}: the hub is asked too much (429), and asked again in {seconds:.0f} seconds")
    end = time.monotonic() + seconds
    while (rest := end - time.monotonic()) > 0:
        stop.check(f"the wait for {asked}")
        time.sleep(min(rest, 0.2))


def download(wanted: Repository, patterns: list[str], tell: Tell) -> Path:
    """The folder with the files of a commit that match; fetches what the cache does not have."""
    with _explained(wanted), _told(tell), signals() as stop:
        return _snapshot(wanted, patterns, tqdm_class=_bar(wanted, tell, stop))


def cached_folder(wanted: Repository, patterns: list[str]) -> Path | None:
    """The folder with the files of a commit that match, if the cache has them all."""
    try:
        return _snapshot(wanted, patterns, local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def _snapshot(wanted: Repository, patterns: list[str], **more: Any) -> Path:
    return Path(
        snapshot_download(
            wanted.name,
            revision=wanted.revision,
            repo_type=wanted.kind,
            allow_patterns=patterns,
            # Other forms of the same weights: a runtime's folder, Mistral's own file.
            ignore_patterns=["*/*.safetensors", "consolidated*.safetensors"],
            **more,
        )
    )


def cached_file(name: str, file: str, commit: str) -> Path | None:
    """A file of a model in the hub's cache."""
    found = try_to_load_from_cache(name, file, revision=commit)
    return Path(found) if isinstance(found, str) else None


@contextlib.contextmanager
def _explained(asked: Repository) -> Iterator[None]:
    try:
        yield
    except (
        HTTPError,
        RevisionResolutionError,
        OSError,
        ValueError,
        ImportError,
    ) as error:  # of a proxy's library
        hides = isinstance(error, LocalEntryNotFoundError | RevisionResolutionError)
        raise _refusal(asked, error.__cause__ or error if hides else error) from error


def _refusal(asked: Repository, error: BaseException) -> KdpipeError:
    """What is said of an error that the client has raised."""
    kind: type[KdpipeError] = StepError
    said, hint = f"cannot be fetched: {_reason(error)}", KEPT
    match error:
        case GatedRepoError():
            kind, said = PreflightError, "only those whom its authors let in may read it"
            hint = f"ask for access at {asked.page}, {_ANOTHER}"
            if get_token():
                hint = f"ask for access at {asked.page}, with the account of the token in HF_TOKEN"
        case RepositoryNotFoundError():
            kind, said = RecipeError, f"the hub has no {asked.kind} of that name, or it is private"
            hint = f"check {asked.page}; what is private is seen with a token in HF_TOKEN; or name a local folder"
        case RevisionNotFoundError():
            kind, said = RecipeError, "the hub has it, but not that revision"
            hint = f"{asked.page} lists branches and tags; without a revision the main branch is pinned"
        case HFValidationError():
            kind, said = RecipeError, f"not a hub id: {_reason(error)}"
            hint = "write the id as the hub shows it (owner/name), or name a local folder"
        case OfflineModeIsEnabled():
            said = f"{_reason(error)}, and the cache has not all of it ({constants.HF_HUB_CACHE})"
            hint = (
                "fetch it where there is a network, by the same command and HF_HOME, or name a local folder"
            )
        case HfHubHTTPError(response=response) if response.status_code == 401:
            kind, said = PreflightError, "the hub does not know the token in HF_TOKEN"
            hint = f"{_ANOTHER}, or unset it: what is public needs none"
        case HfHubHTTPError(response=response):
            if wait := response.headers.get("Retry-After"):
                hint = f"it asks to wait {wait} seconds; {KEPT}"
        case OSError() if is_machine_fault(error) or error.filename:
            told = refusal(error, constants.HF_HUB_CACHE)
            told.hint += "; HF_HOME names another place for the hub's files"
            return told
        case JSONDecodeError() | UnicodeDecodeError():
            said = f"what answers at {asked.page} is not the hub"
            hint = "is a login page or a proxy between, and is HF_ENDPOINT right if it is set?"
    return kind(f"{asked}: {said}", hint=hint)


def _reason(error: BaseException) -> str:
    """Why the hub did not help, in a few words."""
    match error:
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set"
        case HfHubHTTPError(response=response):
            return (
                f"the hub answers {response.status_code} ({error.server_message or response.reason_phrase})"
            )
    said = next(iter(_unsigned(str(error)).strip().splitlines()), type(error).__name__)
    return f"no whole answer from {_address()} ({said})" if isinstance(error, HTTPError) else said


def _address() -> str:
    """Where the hub is, without a password."""
    return re.sub(r"//[^/@]*@", "//", constants.ENDPOINT)


def _unsigned(text: str) -> str:
    """The text without what lets somebody in: the queries of its addresses, and a token."""
    return re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", re.sub(r"Bearer \S+", "Bearer ...", text))


@contextlib.contextmanager
def _told(tell: Tell) -> Iterator[None]:
    """Passes on what the client logs meanwhile: that it tries again, or resumes."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell("hub: " + " ".join(_unsigned(record.getMessage()).split()))

    library, handler = logging.getLogger("huggingface_hub"), Handler()
    before = library.handlers
    library.handlers = [handler]
    try:
        yield
    finally:
        library.handlers = before


def _bar(wanted: Repository, tell: Tell, stop: Stop) -> type[tqdm]:
    """The client's bar of all bytes that are to be fetched; without a terminal a line now and then.

    Each piece of a file passes here, in the thread that fetches it, which ends once a signal has asked for it.
    """
    what, said = f"{wanted.kind} {wanted.name}", [0.0]

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.is_whole = kwargs.get("name") == "huggingface_hub.snapshot_download"
            self.is_shown = self.is_whole and sys.stderr.isatty()
            # The delay keeps it away until there is something to fetch.
            changes = {"disable": not self.is_shown, "desc": what, "bar_format": None, "delay": 1e-6}
            super().__init__(*args, **kwargs | changes)  # type: ignore[no-untyped-call]

        def set_description(self, *_args: Any, **_kwargs: Any) -> None: ...

        def set_postfix_str(self, *_args: Any, **_kwargs: Any) -> None: ...

        def update(self, n: float | None = 1) -> bool:
            stop.check(f"the download of {what}")
            if self.is_shown or not self.is_whole:
                return bool(super().update(n))
            self.n += n or 0
            if not said[0]:
                said[0] = time.monotonic()
                tell(f"{what}: fetched into {constants.HF_HUB_CACHE}")
            elif time.monotonic() - said[0] >= LINE_SECONDS:
                said[0] = time.monotonic()
                tell(f"{what}: {_size(self.n)} of {_size(self.total or 0)} fetched")
            return False

    return Bar


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
