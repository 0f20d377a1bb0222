"""What examines a recipe before a run: its objective, its models and the machine."""

import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdpipe.cli.parameters import (
    WORKSPACE,
    JsonOption,
    RecipeArgument,
    SetOption,
    WorkspaceOption,
    load_given,
)
from kdpipe.cli.terminal import COLUMNS, Paint, Style, counted, inert, painter, print_json
from kdpipe.errors import PreflightError

if TYPE_CHECKING:
    from kdpipe.recipe.schema import Recipe


def check_loss(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Check what a recipe's objective does to a student, on tiny models; exit 4 when it is not what it claims.

    Needs neither models nor network. `run` refuses what fails 1, 2 or 3, unless the recipe says reproduce: true.

    Example: kdpipe check-loss quickstart --set train.objective.kd=k1_loss
    """
    loaded = load_given(recipe, overrides, workspace)
    phases = _checked_phases(loaded.recipe, workspace)
    failed = sorted({f["number"] for p in phases for f in p["findings"] if f["verdict"] == "FAILED"})
    if as_json:
        print_json({"recipe": str(loaded.path), "failed": failed, "phases": phases})
    else:
        blocks = ["\n".join(check_loss_lines(phase, painter(sys.stdout))) for phase in phases]
        print("\n\n".join(blocks))
    if failed:
        which = f"propert{'y' if len(failed) == 1 else 'ies'} {', '.join(map(str, failed))}"
        raise PreflightError(
            f"{recipe}: its objective fails {which}",
            hint="docs/objectives.md says what each objective descends; `reproduce: true` lets `run` use it as it is",
        )


def _checked_phases(recipe: "Recipe", workspace: Path) -> list[dict[str, Any]]:
    """What a worker finds: torch is not for this process."""
    from kdpipe.recipe.schema import resolved
    from kdpipe.workers.worker import Worker

    # Everything is tiny: more threads would only wait for each other.
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = workspace.resolve() / "logs" / "check-loss.log"
    worker = Worker("kdpipe.doctor.loss.check:serve", log=log, environment=one_thread)
    try:
        found: Any = worker.call({"recipe": resolved(recipe)}, on_event=lambda _event: None)
    finally:
        worker.stop()
    phases: list[dict[str, Any]] = found["phases"]
    return phases


def doctor(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="Examine the models of this recipe.")
    ] = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Print the environment as a block to paste; with a recipe, examine its teachers; exit 4 when a probe fails.

    docs/doctor.md says what each probe catches. Models that no step has made yet are stood in for.

    Example: kdpipe doctor quickstart
    """
    if recipe is not None:
        _examine(recipe, overrides, workspace, as_json=as_json)
        return
    found = _environment(workspace)
    if as_json:
        print_json(found)
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {'-' if value is None else value}")


def _environment(workspace: Path) -> dict[str, Any]:
    """Versions, machine, and what torch makes of it; torch is asked in a worker."""
    import shutil
    import tempfile

    from kdpipe.store.environment import environment
    from kdpipe.workers.worker import Worker

    place = next(folder for folder in (workspace.resolve(), *workspace.resolve().parents) if folder.exists())
    found: dict[str, Any] = dict(environment())
    found["free_disk_gib"] = shutil.disk_usage(place).free >> 30
    with tempfile.TemporaryDirectory(prefix="kdpipe-doctor-") as folder:
        worker = Worker("kdpipe.doctor.machine:serve", log=Path(folder) / "doctor.log")
        try:
            seen: Any = worker.call({"device": "auto"}, on_event=lambda _event: None)
        finally:
            worker.stop()
    return {**found, **seen}


def _examine(recipe: str, overrides: list[str] | None, workspace: Path, *, as_json: bool) -> None:
    """Examines a recipe's models; raises PreflightError when a probe fails."""
    from kdpipe.pipeline.preflight import examine_recipe

    result = {
        "recipe": recipe,
        **examine_recipe(load_given(recipe, overrides, workspace), workspace.resolve()),
    }
    failed = [f"{one['probe']} ({one['about']})" for one in result["findings"] if one["verdict"] == "FAILED"]
    if as_json:
        print_json({**result, "failed": failed})
    else:
        paint = painter(sys.stdout)
        lines = [*doctor_lines(result, paint), "", *estimate_lines(result, paint)]
        if not failed:
            lines += ["", *_after_doctor(recipe, workspace, result["missing"])]
        print("\n".join(lines))
    if failed:
        count = f"{len(failed)} probe{'s'[: len(failed) != 1]}"
        raise PreflightError(
            f"{recipe}: {count} failed: {', '.join(failed)}",
            hint=f"docs/doctor.md says what each catches; mend it and repeat: kdpipe doctor {recipe}",
        )


def _after_doctor(recipe: str, workspace: Path, missing: dict[str, str]) -> list[str]:
    """The next command: what is not made yet comes first, as it could only be stood in for."""
    place = "" if workspace == WORKSPACE else f" --workspace {shlex.quote(str(workspace))}"
    lines = []
    if missing:
        steps = ", ".join(sorted(set(missing.values())))
        lines.append(f"not there yet: {steps}; examine again when they are done")
        lines.append(f"next  kdpipe run {recipe} --rounds 0{place}")
        lines.append(f"      kdpipe doctor {recipe}{place}")
        return lines
    return [f"next  kdpipe run {recipe}{place}"]


# -------------------------------------------------------------------------------------------- its lines


def check_loss_lines(phase: dict[str, Any], paint: Paint) -> list[str]:
    """The findings on an objective as a table of 80 columns, and below it what its failures mean."""
    heading = textwrap.wrap(phase["objective"], COLUMNS, subsequent_indent="  ")
    rows = [("property", "verdict", "measured")]
    rows += [(f["claim"], f["verdict"], _measured(f)) for f in phase["findings"]]
    verdict_width, measured_width = (max(len(row[i]) for row in rows) for i in (1, 2))
    width = COLUMNS - len("  1  ") - len("  ") * 2 - verdict_width - measured_width
    colours: dict[str, Style] = {"ok": "green", "FAILED": "red", "not applicable": "dim"}
    lines = [paint(line, "bold") for line in heading]
    for number, (claim, verdict, measured) in enumerate(rows):
        first, *others = textwrap.wrap(claim, width)
        shown = f"{verdict:<{verdict_width}}"
        shown = paint(shown, colours[verdict]) if number else shown
        lines.append(f"  {number or ' '}  {first:<{width}}  {shown}  {measured}".rstrip())
        lines += [f"     {other}" for other in others]
    for finding in phase["findings"]:
        if finding["meaning"]:
            numbers = [f"{m['name']} {m['value']:.2g}" for m in finding["measures"]]
            why = ", ".join([*numbers, *filter(None, [finding["problem"]])])
            text = f"{finding['number']} FAILED: {finding['meaning']} ({why})"
            lines += textwrap.wrap(
                text, COLUMNS, initial_indent="  ", subsequent_indent="     ", break_on_hyphens=False
            )
    return lines


def doctor_lines(result: dict[str, Any], paint: Paint) -> list[str]:
    """The findings as a table of 80 columns: who, probe, verdict and worst number, and below each what it says."""
    findings = result["findings"]
    width = max(len(finding["probe"]) for finding in findings)
    counts = {
        verdict: sum(finding["verdict"] == verdict for finding in findings)
        for verdict in ("ok", "FAILED", "warning", "skipped")
    }
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    lines = [f"{paint(result['run'], 'bold')}: {counted(len(findings), 'probe')}: {told}"]
    about = ""
    for finding in findings:
        if finding["about"] != about:
            about = finding["about"]
            lines += ["", paint(inert(about), "bold")]
        lines += _finding_lines(finding, width, paint)
    return lines


def _finding_lines(finding: dict[str, Any], width: int, paint: Paint) -> list[str]:
    """A probe with its verdict and what it says, and below that its numbers; what a failure means comes last."""
    colours: dict[str, Style] = {"ok": "green", "FAILED": "red", "warning": "yellow", "skipped": "dim"}
    indent = " " * (width + 13)

    def wrapped(text: str) -> list[str]:
        return textwrap.wrap(
            text, COLUMNS, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )

    verdict = finding["verdict"]
    lines = wrapped(inert(finding["said"]))
    shown = paint(f"{verdict:<7}", colours[verdict])
    lines[0] = f"  {finding['probe']:<{width}}  {shown}  {lines[0].strip()}"
    lines += wrapped(", ".join(map(_limited, finding["measures"])))
    return lines + (wrapped(f"catches {finding['catches']}") if verdict == "FAILED" else [])


def _limited(measure: dict[str, Any]) -> str:
    """A number beside its limit, as the two stand to each other."""
    found, limit = measure["value"], measure["limit"]
    if found is None:
        return f"{measure['name']} not finite"
    value = f"{found:g}" if limit > 1 else f"{found:.2g}"
    return f"{measure['name']} {value} {'>' if found > limit else '<='} {limit:g}"


def estimate_lines(result: dict[str, Any], paint: Paint) -> list[str]:
    """What the recipe takes: memory by role, disk and tokens of a round."""
    found = result["estimate"]
    if "problem" in found:
        return [f"what it takes cannot be told: {inert(found['problem'])}"]
    lines = [paint("takes (completions of full length, nothing compressed, activations roughly)", "bold")]
    parameters = ", ".join(f"{name} {_short_count(count)}" for name, count in found["parameters"].items())
    lines.append(f"  parameters  {parameters}")
    for role, parts in found["memory_bytes"].items():
        kept = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
        text = f"{role} {_size(sum(parts.values()))}: {kept}"
        lines += textwrap.wrap(
            text, COLUMNS, initial_indent="  memory      ", subsequent_indent=" " * 16, break_on_hyphens=False
        )
    disk = found["disk_bytes_per_round"]
    parts = ", ".join(f"{name} {_size(size)}" for name, size in disk.items())
    text = (
        f"{_size(sum(disk.values()))} a round ({parts}); {_size(found['disk_bytes_kept'])} stay at the end, "
        f"{_size(result['free_disk_bytes'])} are free"
    )
    lines += textwrap.wrap(text, COLUMNS, initial_indent="  disk        ", subsequent_indent=" " * 16)
    tokens = ", ".join(f"{count:,} {name}" for name, count in found["tokens_per_round"].items())
    lines.append(f"  tokens      {tokens}, a round")
    return lines


def _short_count(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _size(count: int) -> str:
    """Bytes in the largest unit that keeps the number above 1."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.0f} kB"


def _measured(finding: dict[str, Any]) -> str:
    """The worst of a finding's numbers."""
    if finding["problem"] or not finding["measures"]:
        return "not finite" if finding["problem"] else ""
    worst = finding["measures"][0]
    verb = "moves by" if worst["must_move"] else "off by"
    return f"{verb} {worst['value']:.2g} of {worst['of']:.2g}"
