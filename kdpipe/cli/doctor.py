"""What examines a recipe before a run: its objective, its models and the machine."""

import itertools
import math
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdpipe.cli.parameters import (
    WORKSPACE,
    Given,
    JsonOption,
    SetOption,
    WorkspaceOption,
    on_recipe,
    workspace_at,
)
from kdpipe.cli.terminal import COLUMNS, Paint, Style, counted, indented, painter, print_result, say, shown
from kdpipe.cli.trust import TrustOption, require_trust
from kdpipe.errors import KdpipeError, PreflightError
from kdpipe.results.visible_text import visible

if TYPE_CHECKING:
    from pydantic import JsonValue

    from kdpipe.doctor.finding import Finding, Measure, Phase, Verdict
    from kdpipe.recipe.schema import Recipe

COLOURS: "dict[Verdict, Style]" = {
    "ok": "green",
    "FAILED": "red",
    "warning": "yellow",
    "skipped": "dim",
    "not applicable": "dim",
}


@on_recipe
def check_loss(given: Given) -> None:
    """Check that an objective trains what it claims to.

    It is measured on tiny models; exit 4 when a property fails. Needs neither models nor network. `run` refuses
    what fails 1, 2 or 3, unless the recipe says reproduce: true.

    Example: kdpipe check-loss quickstart --set train.objective.kd=k1_loss
    """
    from kdpipe.doctor.finding import PHASES

    loaded = given.load()
    phases = _checked_phases(loaded.recipe, given.workspace)
    by_number = list(enumerate(zip(*(phase.findings for phase in phases), strict=True), 1))
    failed = [number for number, found in by_number if any(one.verdict == "FAILED" for one in found)]
    found_json = PHASES.dump_python(phases, mode="json")
    blocks = ["\n".join(check_loss_lines(phase, painter(sys.stdout))) for phase in phases]
    document = {"recipe": str(loaded.path), "failed": failed, "phases": found_json}
    given.show(document, "\n\n".join(blocks))
    if failed:
        which = f"propert{'y' if len(failed) == 1 else 'ies'} {', '.join(map(str, failed))}"
        raise PreflightError(
            f"{given.recipe}: its objective fails {which}",
            hint="`kdpipe docs objectives` says what each descends; `reproduce: true` lets `run` use it as it is",
        )


def _checked_phases(recipe: "Recipe", workspace: Path) -> "tuple[Phase, ...]":
    """What a worker finds: torch is not for this process."""
    from kdpipe.doctor.finding import CHECK_LOSS, CheckLoss
    from kdpipe.workers.worker import Worker

    # Everything is tiny: more threads would only wait for each other.
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = workspace_at(workspace) / "logs" / "check-loss.log"
    worker = Worker("kdpipe.doctor.loss.check:LossServer", CHECK_LOSS, log=log, environment=one_thread)
    try:
        found = worker.call(CheckLoss(recipe))
    finally:
        worker.stop()
    assert found is not None
    return found.phases


def doctor(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="Examine the models of this recipe.")
    ] = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
    trust: TrustOption = False,
) -> None:
    """Print the environment, or examine a recipe's models.

    Exit 4 when a probe fails. `kdpipe docs doctor` says what each probe catches. Models that no step has made yet are
    replaced by stand-ins.

    Example: kdpipe doctor quickstart
    """
    if recipe is not None:
        _examine(Given(recipe, tuple(overrides or ()), workspace, as_json, trust))
        return
    found = _environment(workspace)
    width = max(map(len, found))
    lines = [f"{name:<{width}}  {'-' if value is None else value}" for name, value in found.items()]
    print_result(found, "\n".join(lines), as_json=as_json)


def _environment(workspace: Path) -> dict[str, "JsonValue"]:
    """Versions, machine, and what torch makes of it; torch is asked in a worker."""
    import shutil
    import tempfile
    from dataclasses import asdict

    from kdpipe.models.device_request import DEVICE, LookAtDevice
    from kdpipe.store.durable import TEMPORARY
    from kdpipe.store.environment import environment
    from kdpipe.store.trial import NEEDS, try_workspace
    from kdpipe.workers.worker import Worker

    root = workspace_at(workspace)
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    found = {**environment(), "free_disk_gib": shutil.disk_usage(place).free >> 30}
    try:
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=place) as folder:
            found["workspace"] = "; ".join(
                [f"{NEEDS}: tried in {shown(place)}", *try_workspace(Path(folder))]
            )
    except (OSError, KdpipeError) as error:
        found["workspace"] = f"{error}"
    with tempfile.TemporaryDirectory(prefix="kdpipe-doctor-") as folder:
        worker = Worker("kdpipe.models.devices:DeviceServer", DEVICE, log=Path(folder) / "doctor.log")
        try:
            seen = worker.call(LookAtDevice("auto"))
        finally:
            worker.stop()
    assert seen is not None
    return {**found, **asdict(seen)}


def _examine(given: Given) -> None:
    """Examines a recipe's models; raises PreflightError when a probe fails."""
    from dataclasses import asdict

    from kdpipe.cli.estimate import estimate_lines
    from kdpipe.doctor.budget import SIZES
    from kdpipe.doctor.finding import FINDINGS
    from kdpipe.pipeline.preflight import examine_recipe
    from kdpipe.pipeline.requirements import key_uses

    loaded = given.load()
    require_trust(loaded, given.place, trusts=given.trusts)
    for use in key_uses(loaded.recipe):
        say(use)
    recipe, paint = given.recipe, painter(sys.stdout)
    told: list[Finding] = []

    def tell(found: "dict[str, JsonValue]") -> None:
        [finding] = FINDINGS.validate_python([found])
        is_first = not told or told[-1].about != finding.about
        told.append(finding)
        if not given.as_json:
            print("\n".join(finding_lines(finding, paint, is_first=is_first)), flush=True)

    result = examine_recipe(loaded, given.place, tell=say, on_finding=tell)
    failed = [f"{one.probe} ({one.about})" for one in told if one.verdict == "FAILED"]
    lines = ["", summary_line(result.run, told, paint), ""]
    lines += estimate_lines(SIZES.validate_python(result.estimate), paint, free_bytes=result.free_disk_bytes)
    if not failed:
        lines += ["", *_after_doctor(given, result.missing)]
    given.show({"recipe": recipe, **asdict(result), "failed": failed}, "\n".join(lines))
    if failed:
        raise PreflightError(
            f"{recipe}: {counted(len(failed), 'probe')} failed: {', '.join(failed)}",
            hint=f"`kdpipe docs doctor` says what each catches; fix it and repeat: kdpipe doctor {recipe}",
        )


def _after_doctor(given: Given, missing: Mapping[str, str]) -> list[str]:
    """The next command: steps that are not done come first, as their models could only be stood in for."""
    if not missing:
        return [f"next  {given.command('run', given.recipe)}"]
    return [
        f"not there yet: {', '.join(sorted(set(missing.values())))}; examine again when they are done",
        f"next  {given.command('run', given.recipe, '--rounds', '0')}",
        f"      {given.command('doctor', given.recipe)}",
    ]


def check_loss_lines(phase: "Phase", paint: Paint) -> list[str]:
    """The findings on an objective as a table of 80 columns, and below it what its failures mean."""
    heading = textwrap.wrap(phase.objective, COLUMNS, subsequent_indent="  ")
    rows = [("property", "verdict", "measured")]
    rows += [(finding.about, finding.verdict, _measured(finding)) for finding in phase.findings]
    verdict_width, measured_width = (max(len(row[i]) for row in rows) for i in (1, 2))
    width = COLUMNS - len("  1  ") - len("  ") * 2 - verdict_width - measured_width
    lines = [paint(line, "bold") for line in heading]
    for number, (claim, verdict, measured) in enumerate(rows):
        first, *others = textwrap.wrap(claim, width)
        shown = f"{verdict:<{verdict_width}}"
        shown = paint(shown, COLOURS[phase.findings[number - 1].verdict]) if number else shown
        lines.append(f"  {number or ' '}  {first:<{width}}  {shown}  {measured}".rstrip())
        lines += [f"     {other}" for other in others]
    for number, finding in enumerate(phase.findings, 1):
        if finding.verdict == "FAILED":
            numbers = [f"{m.name} {_shown_number(m, '.2g')}" for m in finding.measures]
            why = ", ".join([*numbers, *filter(None, [finding.said])])
            lines += indented(f"{number} FAILED: {finding.catches} ({why})", "  ", "     ")
    return lines


def _measured(finding: "Finding") -> str:
    """The worst of a property's numbers."""
    if not finding.measures:
        return finding.said if finding.verdict == "skipped" else "not finite" if finding.said else ""
    worst = finding.measures[0]
    if not math.isfinite(worst.value):
        return "not finite"
    return f"{'moves by' if worst.must_exceed else 'off by'} {worst.value:.2g} of {worst.of:.2g}"


def summary_line(run: str, findings: "Sequence[Finding]", paint: Paint) -> str:
    """How many probes there were, by verdict."""
    counts = Counter(finding.verdict for finding in findings)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in COLOURS if counts[verdict])
    return f"{paint(run, 'bold')}: {counted(len(findings), 'probe')}: {summary}"


def finding_lines(finding: "Finding", paint: Paint, *, is_first: bool) -> list[str]:
    """A finding in 80 columns; the first of a model below the name of that."""
    from kdpipe.doctor.finding import CATCHES

    width = max(map(len, CATCHES))
    indent = " " * (width + 13)
    said, *more = indented(visible(finding.said), indent)
    shown = paint(f"{finding.verdict:<7}", COLOURS[finding.verdict])
    lines = ["", paint(visible(finding.about), "bold")] if is_first else []
    lines += [f"  {finding.probe:<{width}}  {shown}  {said.strip()}", *more]
    for origin, measures in itertools.groupby(finding.measures, lambda measure: measure.origin):
        limits = ", ".join(map(_limited, measures))
        lines += indented(f"{limits} ({origin})" if origin else limits, indent)
    if finding.verdict == "FAILED":
        lines += indented(f"catches {finding.catches}", indent)
    return lines


def _limited(measure: "Measure") -> str:
    """A number with its limit and how the two compare."""
    if not math.isfinite(measure.value):
        return f"{measure.name} not finite"
    spec = "g" if measure.limit >= 10 else ".2g"
    sign = ">" if measure.value > measure.limit else "<="
    return f"{measure.name} {_shown_number(measure, spec)} {sign} {measure.limit:{spec}}"


def _shown_number(measure: "Measure", spec: str) -> str:
    return f"{measure.value:{spec}}" if math.isfinite(measure.value) else "not finite"
