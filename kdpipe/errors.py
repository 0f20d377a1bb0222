"""The errors that kdpipe raises on purpose; each knows its exit code.

A message says where, what was found and what was expected; `hint` says what to do about it. Anything
that is not a `KdpipeError` is a bug in kdpipe, and the command line says so.
"""

from __future__ import annotations

import errno
import re

_ELSEWHERE = "name another place with --workspace"
_ADVICE = {
    errno.ENOSPC: "free some space (kdpipe gc shows what can go)",
    errno.EDQUOT: "free some space of your quota (kdpipe gc shows what can go)",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EROFS: f"mount it writable, or {_ELSEWHERE}",
    errno.EACCES: f"give the user that runs kdpipe the right to it, or {_ELSEWHERE}",
    errno.EPERM: f"give the user that runs kdpipe the right to it, or {_ELSEWHERE}",
    errno.EIO: "mend the disk, or move the workspace to another",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the machine's limit of open files",
    errno.ENOMEM: "free some memory",
    errno.ENOLCK: f"start the lock service of this file system, or {_ELSEWHERE}",
    errno.ENOSYS: f"this file system cannot do that: {_ELSEWHERE}",
    errno.ENOTSUP: f"this file system cannot do that: {_ELSEWHERE}",
    errno.EBUSY: "another program uses it: end that",
}
"""What to do about a fault of the machine."""
_PLACES = {
    errno.ENOTDIR: "a part of this path is no folder; name another place",
    errno.EISDIR: "it is a folder; name a file",
    errno.EEXIST: "something else stands there; name another place",
    errno.ENOTEMPTY: "something else stands there; name another place",
    errno.ENAMETOOLONG: "name a shorter one",
    errno.ELOOP: "it leads to itself; remove that link, or name another place",
}
"""What to do about a path that the system does not take."""


class KdpipeError(Exception):
    """A failure that the user can act on."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class StepError(KdpipeError):
    """A step failed: its worker died, ran out of disk, or met numbers that are not finite."""


def is_machine_fault(error: OSError) -> bool:
    """Whether the machine is at fault (disk, rights, limits), and not kdpipe."""
    return error.errno in _ADVICE


def as_os_error(error: BaseException, place: str = "") -> OSError:
    """The OSError that a library written in Rust meant: it tells the number in its text alone."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    text = f"{place}: {error}" if place else str(error)
    return OSError(int(found[1]), text) if found else OSError(text)


def refusal(error: OSError, place: object = None) -> KdpipeError:
    """What the system refused and what to do: at a `place` of ours, or else of a path that was given."""
    what, number = error.strerror or str(error), error.errno or 0
    if error.args and isinstance(error.args[0], list):  # shutil's of a folder, one for each file
        what = f"{len(error.args[0])} files could not be copied: {error.args[0][0][-1]}"
    where = place or error.filename2 or error.filename
    if number in _PLACES and not place:
        return RecipeError(f"{where}: {what}", hint=_PLACES[number])
    if number == errno.ENOENT and where is None:
        return RecipeError("the folder that you are in was removed", hint="go to another with cd")
    written = "cannot be written: " if place else ""
    advice = (_ADVICE | _PLACES).get(number, "mend that")
    return StepError(
        f"{where}: {written}{what}" if where else what,
        hint=f"{advice}, then repeat the command: finished pieces are kept",
    )


class EngineError(KdpipeError):
    """An engine could not load a model, sample or score.

    `request` is the place, among those of the call, of the request that is at fault, None where all are; `what` is the
    message without it.
    """

    def __init__(self, message: str, *, hint: str = "", request: int | None = None) -> None:
        super().__init__(message if request is None else f"request {request}: {message}", hint=hint)
        self.what = message
        self.request = request


class ModelError(EngineError):
    """A model, its tokenizer or its context cannot do what the recipe asks; found before it runs."""

    exit_code = 4


class RecipeError(KdpipeError):
    """The recipe, or a value given on the command line, is wrong."""

    exit_code = 2


class DataError(KdpipeError):
    """A data file is missing, empty or malformed."""

    exit_code = 2


class LockError(KdpipeError):
    """Another process holds this run."""

    exit_code = 3


class PreflightError(KdpipeError):
    """The models, vocabularies or objective cannot work together; found before money is spent."""

    exit_code = 4


class ArtifactError(KdpipeError):
    """An artifact is damaged or of a foreign format."""

    exit_code = 5


class Interrupted(KdpipeError):
    """A signal stopped the run at a safe point."""

    def __init__(self, signal_number: int, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signal_number
