"""Commands on artifacts: export a student, verify, remove what no run uses."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kdpipe.cli.parameters import (
    WORKSPACE,
    Given,
    JsonOption,
    RoundOption,
    WorkspaceOption,
    folder_at,
    on_recipe,
    path_named,
    workspace_at,
)
from kdpipe.cli.terminal import indented, print_result, say, shown
from kdpipe.cli.trust import TrustOption, require_trust
from kdpipe.errors import ArtifactError, RecipeError

if TYPE_CHECKING:
    from kdpipe.models.export_request import WrittenWeights

SHARE_LOST = 0.05
"""Share of what training moved a student, from which on a wider dtype is advised."""


@on_recipe
def export(
    given: Given,
    target: Annotated[Path, typer.Argument(metavar="OUT", parser=path_named, help="The folder to make.")],
    round_number: RoundOption = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Only the LoRA adapter, as peft loads it, not merged.")
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="Numbers of the weights; the student's own if left out."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Compare weights written anew with those trained.")
    ] = True,
    trust: TrustOption = False,
) -> None:
    """Write the student as a Hugging Face folder.

    transformers and vLLM load it. Where weights are written anew (an adapter merged, another dtype), the KL divergence
    from what was trained is measured on completions of the run.

    Example: kdpipe export recipes/quickstart.yaml my-student
    """
    from kdpipe.pipeline.housekeeping import export as export_student

    project = given.open()
    require_trust(project.loaded, given.place, trusts=trust)
    done = export_student(
        project,
        folder_at(target),
        round_number=round_number,
        adapter=adapter,
        dtype=dtype,
        measure=measure,
    )
    written = done.written and asdict(done.written)
    lines = [f"{shown(done.folder)}: student {done.round}", *_rounded_lines(done.written)]
    given.show({"round": done.round, "folder": str(done.folder), "written": written}, "\n".join(lines))


def _rounded_lines(written: "WrittenWeights | None") -> list[str]:
    """How far the weights that were written are from those that were trained."""
    if written is None:
        return []
    found = written.distance
    if found is None:
        return [f"  {written.dtype}; not compared with what was trained"]
    said = (
        f"{written.dtype}: KL from what was trained {found.written:.2g} nats a token, back {found.back:.2g}, on "
        f"{found.tokens} sampled tokens"
    )
    if found.start:
        share = found.written / found.start
        said += f"; that is {share:.2g} of the {found.start:.2g} nats that training moved it"
    lines = indented(said, "  ")
    if found.start and found.written > SHARE_LOST * found.start and written.dtype != "float32":
        lines += indented("--dtype float32 keeps what was learned, as --adapter does of an adapter", "  ")
    return lines


@on_recipe
def verify(
    given: Given,
    full: Annotated[bool, typer.Option("--full", help="Compare sha256, not only sizes.")] = False,
) -> None:
    """Check the artifacts of a run against their manifests.

    Exit 5 when one is damaged.

    Example: kdpipe verify recipes/quickstart.yaml --full
    """
    from kdpipe.pipeline.housekeeping import verify as verify_steps

    project = given.open()
    findings = list(verify_steps(project, full=full))
    if not findings:
        raise RecipeError(f"{project.run.name}: no step is done yet", hint=f"kdpipe run {given.recipe}")
    damaged = [finding for finding in findings if finding.problem]
    steps, files = len(findings), sum(finding.files for finding in findings)
    size, what = sum(finding.bytes for finding in findings), "sha256" if full else "sizes"
    problems = {finding.step: finding.problem for finding in damaged}
    given.show(
        {"steps": steps, "files": files, "bytes": size, "damaged": problems},
        f"{steps} steps, {files} files, {size / 1e6:,.1f} MB: {what} compared",
    )
    if damaged:
        if not given.as_json:
            for finding in damaged:
                say(f"{finding.step}: {finding.problem}")
        force = " ".join(f"--force {finding.step}" for finding in damaged)
        raise ArtifactError(
            f"{len(damaged)} of {steps} steps are damaged",
            hint=f"rebuild them and what depends on them: kdpipe run {given.recipe} {force}",
        )


def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Really remove it.")] = False,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", hidden=True)] = None,
) -> None:
    """List the store entries that no run uses.

    They are removed with --delete. A run's entries are in use as long as its folder is under runs/ of the workspace.

    Example: kdpipe gc --delete
    """
    from kdpipe.pipeline.housekeeping import collect, garbage

    del recipe  # accepted so that the command reads like the others; the store belongs to the workspace
    found = (collect if delete else garbage)(workspace_at(workspace))
    total = sum(item.bytes for item in found)
    folders = [{"folder": str(item.folder), "bytes": item.bytes, "reason": item.reason} for item in found]
    lines = [f"{shown(item.folder)}  {item.bytes / 1e6:,.1f} MB  {item.reason}" for item in found]
    done = "removed" if delete else "can go: kdpipe gc --delete"
    lines.append(f"{len(found)} entries, {total / 1e6:,.1f} MB {done}" if found else "nothing to remove")
    document = {"deleted": delete, "bytes": total, "entries": folders}
    print_result(document, "\n".join(lines), as_json=as_json)
