"""Garbage collection beside runs that link what it lists, and commands beside one another, at moments that vary."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.trials.trial import DONE, HELD, REFUSED, Outcome, Trial, all_of, goes_on, is_done

REPEATS = 15
BESIDE = {
    "gc --delete and a run": ("gc --delete", "run recipe.yaml", "rm -r kdpipe-out/runs"),
    "a run and gc --delete": ("run recipe.yaml", "gc --delete", "rm -r kdpipe-out/runs"),
    "two runs of one recipe": ("run recipe.yaml", "run recipe.yaml", "rm -r kdpipe-out"),
    "a run and an export": ("run recipe.yaml", "export recipe.yaml out", "rm -r kdpipe-out/runs"),
    "gc --delete twice": ("gc --delete", "gc --delete", "rm -r kdpipe-out/runs"),
}
"""Name -> the two commands, the first in the background, and what is done before."""


def trials() -> Iterator[Trial]:
    for name, (first, second, before) in BESIDE.items():
        for number in range(REPEATS):
            yield Trial(
                "gc and runs",
                f"{name}, {number}",
                f"{before}; {entries(number)}; (kdpipe {first} && touch first-done) & "
                f"sleep {0.04 * number:.2f}; kdpipe {second}; code=$?; wait; exit $code",
                frozenset({DONE, HELD}) | REFUSED,
                may_write=("out", "first-done"),
                check=all_of(what_says_so_is_done(first, second), goes_on),
            )


def entries(number: int) -> str:
    """Garbage beside what the run links, so that gc takes a while; more of it, the later the second one comes."""
    return f"for i in $(seq {40 * number}); do mkdir -p kdpipe-out/store/rollout/{'f' * 58}$(printf %06d $i); done"


def what_says_so_is_done(first: str, second: str) -> Callable[[Outcome], str | None]:
    """A `run` of the two that ended with 0 has every step done, whatever the other did."""

    def check(outcome: Outcome) -> str | None:
        first_done = (outcome.folder / "first-done").exists() and first.startswith("run")
        second_done = outcome.code == DONE and second.startswith("run")
        return is_done(outcome) if first_done or second_done else None

    return check
