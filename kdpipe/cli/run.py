"""Commands that run a recipe: all of it, once for each value of a sweep, or one step."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from kdpipe.cli.one_run import run_one
from kdpipe.cli.parameters import Given, RoundOption, on_recipe
from kdpipe.cli.study import run_study
from kdpipe.cli.trust import TrustOption
from kdpipe.errors import RecipeError
from kdpipe.store.stage import Stage

if TYPE_CHECKING:
    from kdpipe.pipeline.project import Project
    from kdpipe.pipeline.runner import Request


@on_recipe
def run(
    given: Given,
    rounds: Annotated[int | None, typer.Option(min=0, help="Only the first N rounds of the plan.")] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP", help="Perform a step again, as in rollout@3; repeatable."),
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="A.B=C,D", help="A run for each value; several make a grid.")
    ] = None,
    trust: TrustOption = False,
) -> None:
    """Run every step that is not done. Repeating the command resumes.

    With --sweep every combination of the values is a run of its own. Runs share the steps that do not depend on the
    values, a run that fails does not stop the others, and a comparison comes at the end.

    Example: kdpipe run recipes/quickstart.yaml --set train.optimizer.learning_rate=1e-3
    """
    from kdpipe.pipeline.runner import Request

    given = given._replace(trusts=trust)
    request = Request(rounds=rounds, force=tuple(force or ()))
    if sweep:
        _sweep(given, sweep, request)
    else:
        run_one(given, lambda _project: request)


def _sweep(given: Given, sweep: list[str], request: "Request") -> None:
    from kdpipe.recipe.sweep import points
    from kdpipe.results.comparison import compare as rows_of
    from kdpipe.results.comparison import own_name
    from kdpipe.results.contender import read_contender

    run_study(
        "sweep",
        [(" ".join(point), given.varied(point)) for point in points(sweep)],
        request,
        compare=lambda done: rows_of(
            [read_contender(folder) for folder in done.values()],
            named=lambda group, fields: fields or own_name(group, fields),
        ),
        markdown=False,
    )


STAGE_HELP = {
    Stage.SFT: "Cold-start the student or a teacher.\n\nThe first one that is not done.\n\n"
    "Example: kdpipe sft recipes/quickstart.yaml",
    Stage.ROLLOUT: "Sample the student on a round's prompts.\n\nThe steps that it needs run first.\n\n"
    "Example: kdpipe rollout recipes/quickstart.yaml --round 1",
    Stage.TEACHER_SCORE: "Score a round's completions with the teacher.\n\n"
    "The steps that it needs run first. Of several teachers, the first one that is not done scores.\n\n"
    "Example: kdpipe teacher-score recipes/quickstart.yaml --round 1",
    Stage.TRAIN: "Train the student on a round.\n\nThe steps that it needs run first.\n\n"
    "Example: kdpipe train recipes/quickstart.yaml --round 1",
    Stage.EVALUATE: "Evaluate the student of a round on held-out problems.\n\nThe steps that it needs run first.\n\n"
    "Example: kdpipe evaluate recipes/quickstart.yaml --round 0",
}


def stage_command(stage: Stage) -> Callable[..., None]:
    """The command that runs one step of a stage."""

    @on_recipe
    def command(given: Given, round_number: RoundOption = None, trust: TrustOption = False) -> None:
        _one_step(stage, given._replace(trusts=trust), round_number)

    return command


def _one_step(stage: Stage, given: Given, round_number: int | None) -> None:
    """Runs the first unfinished step of a stage (or that of a round), and what it lacks."""
    from kdpipe.pipeline.runner import Request

    def request(project: "Project") -> Request:
        states = [
            state
            for state in project.survey()
            if state.step.stage == stage and round_number in (None, state.step.round)
            # A round has one rollout; what teachers write for it is among what that needs.
            if not (stage == Stage.ROLLOUT and state.step.subject)
        ]
        if not states:
            where = f" in round {round_number}" if round_number is not None else ""
            raise RecipeError(
                f"the plan has no {stage} step{where}", hint=f"kdpipe plan {given.recipe}  lists the steps"
            )
        unfinished = [state.step for state in states if not state.done]
        return Request(only=unfinished[0] if unfinished else states[-1].step)

    run_one(given, request)
