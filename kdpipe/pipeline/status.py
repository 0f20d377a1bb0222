"""The state of each step: done, or not and why. Reads manifests; opens no artifact."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from kdpipe.errors import ArtifactError
from kdpipe.pipeline.plan import Plan
from kdpipe.pipeline.runs import RunFolder, all_runs, run_folder
from kdpipe.recipe.schema import Recipe
from kdpipe.store.artifacts import CHECKPOINT, Store
from kdpipe.store.step import Step

Verdict = Literal["done", "stale", "to do", "damaged"]
MAX_REASONS = 3


class State(NamedTuple):
    """What is known of a step; `hint` says what to do where it is damaged, if that is not to force it."""

    step: Step
    verdict: Verdict
    why: str = ""
    digest: str | None = None
    dropped: frozenset[str] = frozenset()
    hint: str = ""

    @property
    def done(self) -> bool:
        """Whether the step need not run."""
        return self.verdict == "done"


def inspect(store: Store, step: Step, digests: Mapping[str, str | None]) -> State:
    """The state of one step, given the payload digests that its inputs have now."""
    entry = store.entry(step)
    try:
        manifest = entry.manifest()
    except ArtifactError as error:
        return State(step, "damaged", error.message, hint=error.hint)
    if manifest is None:
        return State(step, "to do")
    if problem := entry.problem(manifest):
        return State(step, "damaged", problem, manifest.payload_digest)
    dropped = frozenset(path.partition("/")[0] for path in manifest.dropped)
    done = State(step, "done", "", manifest.payload_digest, dropped)
    for role, source in step.inputs.items():
        now = digests.get(source.step_id)
        if now is None:
            return done._replace(verdict="to do", why=f"needs {source.step_id}, which is not there")
        if manifest.inputs.get(str(role)) != now:
            return done._replace(verdict="stale", why=f"{source.step_id} was made again and differs")
    return done


def states_of(plan: Plan, store: Store) -> list[State]:
    """The state of every step; of those not done without the reason, which only earlier runs know."""
    digests: dict[str, str | None] = {}
    states = []
    for step in plan.steps:
        state = inspect(store, step, digests)
        digests[step.id] = state.digest if state.done else None
        states.append(state)
    return states


def survey(plan: Plan, store: Store, recipe: Recipe) -> list[State]:
    """The state of every step, with the reason where it is not done."""
    own = run_folder(store.workspace, recipe)
    others = [run for run in all_runs(store.workspace) if run.name.rpartition("-")[0] == recipe.name]
    runs = [own, *(run for run in others if run.path != own.path)] if own.path.is_dir() else others
    return [
        _explained(state, runs, store) if state.verdict == "to do" and not state.why else state
        for state in states_of(plan, store)
    ]


def _explained(state: State, runs: list[RunFolder], store: Store) -> State:
    step = state.step
    names = [piece.path.name for piece in store.entry(step).pieces()]
    checkpoints = [name for name in names if name.startswith(CHECKPOINT)]
    if parts := len(names) - len(checkpoints):
        return State(step, "to do", f"goes on after {parts} finished parts")
    if checkpoints:
        number = int(checkpoints[-1].removeprefix(CHECKPOINT))
        return State(step, "to do", f"goes on from optimizer step {number}")
    for earlier in filter(None, (run.linked_document(step) for run in runs)):
        if earlier.get("fingerprint") != step.fingerprint:
            return State(step, "stale", _difference(earlier, step))
    return state


def _difference(earlier: Mapping[str, Any], step: Step) -> str:
    """The difference of two fingerprint documents: format, or fields, or else inputs."""
    if (old_format := earlier.get("format")) != step.document["format"]:  # its fields have other names
        return f"format: {old_format} -> {step.document['format']} (made by another version of kdpipe)"
    old, new = dict(leaves(earlier.get("fields", {}))), dict(leaves(step.document["fields"]))
    reasons = [
        f"{name}: {_short(old.get(name))} -> {_short(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if earlier.get("seed") != step.document["seed"]:
        reasons.append(f"seed: {earlier.get('seed')} -> {step.document['seed']}")
    if not reasons:
        old_inputs, new_inputs = earlier.get("inputs", {}), step.document["inputs"]
        assert isinstance(new_inputs, dict)
        changed = [role for role in step.inputs if old_inputs.get(str(role)) != new_inputs.get(str(role))]
        reasons = [f"{step.inputs[role].step_id} changes" for role in changed]
    more = f" (+{len(reasons) - MAX_REASONS} more)" if len(reasons) > MAX_REASONS else ""
    return "; ".join(reasons[:MAX_REASONS]) + more


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a document that hold no others by name, each under its dotted name."""
    items = value
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = dict(enumerate(value))
    if isinstance(items, dict) and items:
        for key, item in items.items():
            yield from leaves(item, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _short(value: Any) -> str:
    with contextlib.suppress(TypeError, ValueError):
        value = json.dumps(value)
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
