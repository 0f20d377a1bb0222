"""An error on its way from a worker to its parent."""

from __future__ import annotations

from dataclasses import dataclass

from kdpipe.errors import EngineError, Interrupted, KdpipeError, StepError


@dataclass(frozen=True, slots=True)
class Failure:
    """An error on its way to another process: the name of its class, its message and hint."""

    kind: str
    message: str
    hint: str = ""
    request: int | None = None

    def error(self, log: object) -> KdpipeError:
        """The error again; one that is not of kdpipe.errors is a bug, whose story stands in `log`."""
        kind = _kinds(KdpipeError).get(self.kind)
        if kind is None or kind is Interrupted:
            return StepError(
                f"{self.kind}: {self.message} (the whole story is in {log})",
                hint="this is a bug in kdpipe; finished pieces are kept, and repeating the command continues",
            )
        if issubclass(kind, EngineError):
            return kind(self.message, hint=self.hint, request=self.request)
        return kind(self.message, hint=self.hint)


def failure_of(error: BaseException) -> Failure:
    """The failure that stands for an error; a class from elsewhere travels as its nearest known one."""
    known = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == KdpipeError.__module__]
    kind = known[0] if known else type(error).__name__
    if isinstance(error, EngineError):
        return Failure(kind, error.what, error.hint, error.request)
    return Failure(kind, str(error), error.hint if isinstance(error, KdpipeError) else "")


def _kinds(base: type[KdpipeError]) -> dict[str, type[KdpipeError]]:
    """The classes of kdpipe.errors by name, from `base` down."""
    found = {base.__name__: base} if base.__module__ == KdpipeError.__module__ else {}
    for kind in base.__subclasses__():
        found |= _kinds(kind)
    return found
