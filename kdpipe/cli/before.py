"""What is asked before a run: is the recipe valid, and which steps would it run?"""

import itertools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from kdpipe.cli.estimate import show_estimate
from kdpipe.cli.parameters import Given, on_recipe
from kdpipe.cli.terminal import Paint, Style, counted, painter
from kdpipe.results.visible_text import visible

SHOWN = 200
"""Characters of the first prompt that `check` shows."""

if TYPE_CHECKING:
    from kdpipe.pipeline.status import State
    from kdpipe.recipe.schema import Recipe, Teacher


@on_recipe
def check(given: Given) -> None:
    """Check a recipe, its local data and the configs of its models.

    Takes less than a second, and needs no network: what is on the hub is not looked at, but data that a run fetched.

    Example: kdpipe check recipes/quickstart.yaml
    """
    from dataclasses import asdict

    from kdpipe.data.tasks import hub_data
    from kdpipe.pipeline.identities import Sources
    from kdpipe.pipeline.requirements import left_out
    from kdpipe.pipeline.task_data import open_data
    from kdpipe.recipe.schema import resolved

    loaded = given.load()
    sources = Sources(loaded, given.place)
    models, cached = sources.look(), sources.cached_data()
    hub = None if cached else hub_data(loaded.recipe.task, loaded.folder)
    data = open_data(loaded.recipe, loaded.folder, cached) if hub is None else None
    lines = [f"{given.recipe}: good; {loaded.recipe.rounds} rounds"]
    if data is None:
        lines.append(f"data: {hub.name} on the hub, not looked at" if hub else "")
    else:
        first = " ".join(data.first_prompt.split())
        first = first if len(first) <= SHOWN else f"{first[:SHOWN]}..."
        lines.append(f"{data.train} train, {data.test} test problems; first prompt: {first}")
        lines += [data.form or "", data.references or ""]
        lines += [f"warning: {sentence}" for sentence in data.warnings()]
    lines += [f"{role}: {text}" for role, text in models.items()]
    lines += left_out(loaded.recipe)
    document = {
        "recipe": str(loaded.path),
        "data": data and asdict(data),
        "models": models,
        "resolved": resolved(loaded.recipe),
    }
    given.show(document, "\n".join(visible(line) for line in lines if line))


@on_recipe
def plan(
    given: Given,
    estimates: Annotated[
        bool, typer.Option("--estimate", help="Memory of every device, disk and tokens instead of the steps.")
    ] = False,
    gpus: Annotated[
        str,
        typer.Option(
            "--gpus", metavar="NxGIB", help="GPUs to estimate for, as in 8x80; default: those here."
        ),
    ] = "",
) -> None:
    """List every step: done, stale or to do, and why. Runs nothing.

    With --estimate: what the recipe takes, from the configs of its models; weights are neither fetched nor read.

    Example: kdpipe plan recipes/quickstart.yaml --set train.optimizer.learning_rate=3e-4
    """
    from kdpipe.pipeline.project import open_project

    if estimates or gpus:
        show_estimate(given, gpus)
        return
    project = open_project(given.load(), given.place)
    states = project.survey()
    unresolved, pinned = project.identities.unresolved(), project.identities.pinned()
    steps = [
        {
            "step": state.step.id,
            "round": state.step.round,
            "state": state.verdict,
            "why": state.why,
            "fingerprint": state.step.fingerprint,
            "dropped": sorted(state.dropped),
        }
        for state in states
    ]
    lines = plan_lines(project.run.name, states, horizon=_horizon(project.recipe), paint=painter(sys.stdout))
    if project.recipe.train.objective.has_kd:
        lines += _kept_bytes(project.recipe)
    lines += [f"pinned: {visible(name)} at {', '.join(commits)}" for name, commits in pinned.items()]
    lines += [f"unresolved until the first run fetches and pins it: {visible(name)}" for name in unresolved]
    document = {"run": project.run.name, "steps": steps, "pinned": pinned, "unresolved": unresolved}
    given.show(document, "\n".join(lines))


def _horizon(recipe: "Recipe") -> str:
    optimizer = recipe.train.optimizer
    if optimizer.schedule == "constant":
        return ""
    rounds = optimizer.schedule_rounds or recipe.rounds
    ends = f"the {optimizer.schedule} schedule ends after round {rounds}"
    if optimizer.schedule_rounds:
        return ends
    return f"{ends}; other `rounds` would train again from the start (set schedule_rounds)"


def _hidden_size(recipe: "Recipe", teacher: "Teacher") -> int | None:
    """The width of a teacher's hidden states, where the recipe says it."""
    from kdpipe.recipe.schema import ScratchTeacher, SelfTeacher

    match teacher:
        case ScratchTeacher(scratch=scratch):
            return scratch.hidden_size
        case SelfTeacher() if recipe.student.scratch is not None:
            return recipe.student.scratch.hidden_size
    return None


def _kept_bytes(recipe: "Recipe") -> list[str]:
    """What teacher-score stores for a completion token, and what the other choices would take."""
    keep = recipe.keep
    widths = {_hidden_size(recipe, teacher) for teacher in recipe.teachers}
    width = widths.pop() if len(widths) == 1 else None
    whose = (
        "the teacher" if len(recipe.teachers) == 1 else "its teacher" if recipe.is_routed else "each teacher"
    )
    ids = keep.teacher_top_k + keep.student_top_k or 64
    support = 8 + ids * (6 if recipe.teacher_score.logprobs == "float16" else 8)
    choices = {
        "the sampled token": "4",
        f"{ids} ids and a tail": str(support),
        "its hidden state": str(4 + 4 * width) if width else "4 + hidden size x 2 or 4",
    }
    names = list(choices)
    chosen = names[2] if keep.hidden else names[1] if keep.teacher_top_k or keep.student_top_k else names[0]
    others = ", ".join(f"{name} {size}" for name, size in choices.items() if name != chosen)
    return [
        f"kept of {whose} for each token: {chosen}, {choices[chosen]} bytes",
        f"  the other choices: {others}",
    ]


def plan_lines(run: str, states: "Sequence[State]", *, horizon: str, paint: Paint) -> list[str]:
    """The plan, a line a step; rounds that repeat the one before share a line."""
    todo = sum(not state.done for state in states)
    lines = [f"{paint(run, 'bold')}: {counted(len(states), 'step')}, {todo} to run"]
    width = max([24, *(len(state.step.id) + 2 for state in states)])
    rounds = itertools.groupby(states, lambda state: state.step.round)
    shaped = [(_shape(members := list(group), number), number, members) for number, group in rounds]
    for _, alike in itertools.groupby(shaped, lambda one: one[0]):
        (_, _, members), *repeats = alike
        lines += [_state_line(state, paint, width) for state in members]
        if repeats:
            first, final = repeats[0][1], repeats[-1][1]
            which = f"round {first}" if first == final else f"rounds {first} to {final}"
            lines.append(paint(f"  {which}: the same", "dim"))
    return [*lines, horizon] if horizon else lines


def _shape(states: "Sequence[State]", number: int) -> list[tuple[str, str, str]]:
    """What is shown of a round's steps, alike in rounds that only their number tells apart."""
    this, last = (f"@{number}", "@this"), (f"@{number - 1}", "@last")
    return [(s.step.link_name, s.verdict, s.why.replace(*this).replace(*last)) for s in states]


def _state_line(state: "State", paint: Paint, width: int) -> str:
    colours: dict[str, Style] = {"done": "green", "stale": "yellow", "to do": "cyan", "damaged": "red"}
    notes = [state.why] if state.why else []
    if state.dropped:
        notes.append(f"dropped: {', '.join(sorted(state.dropped))}")
    verdict = paint(f"{state.verdict:<8}" if notes else state.verdict, colours[state.verdict])
    return f"  {state.step.id:<{width}}{verdict}{visible('; '.join(notes))}"
