"""The doctor: the findings on a student and its teachers before a run is paid for.

`examine` runs the probes of `text.py` and `engine.py` on a recipe's own engines. What each catches is in
`finding.py`. A full examination samples a few completions, loads every model several times, and
writes a perturbed copy of the student to the case's folder; the quick one, which `run` makes by itself, asks for
nothing that the next steps would not load anyway. That of servers, which it makes before any step, opens no weights.
"""

import torch

from kdpipe.doctor.case import LONGEST, Case
from kdpipe.doctor.estimate import Estimate, Sized, estimate
from kdpipe.doctor.finding import Finding
from kdpipe.doctor.student import ExaminedStudent
from kdpipe.doctor.teacher import ExaminedTeacher
from kdpipe.engines.handle import ModelHandle
from kdpipe.models.devices import dtype_name
from kdpipe.models.reference import adapter_parameters, shape_of
from kdpipe.recipe.schema import SelfTeacher


def examine(case: Case) -> list[Finding]:
    """The findings on the student and on each teacher, in the order in which they are reported."""
    student = ExaminedStudent(case)
    findings = [] if case.depth == "servers" else list(student.findings())
    for settings, model in case.teachers:
        findings += ExaminedTeacher(settings, model, student).findings()
    if case.device.type == "cuda":
        del student  # and with it the trainer's copy
        torch.cuda.empty_cache()
    return findings


def sizes(case: Case) -> Estimate:
    """The estimate of the recipe, from the configs of its models and the length of its prompts."""
    recipe, text = case.recipe, case.student.text
    prompts = [text.prompt(problem) for problem in case.job.train[:LONGEST]]
    lora, source = recipe.student.lora, case.student.source
    adapter = 0 if lora is None else adapter_parameters(source.folder, lora)
    student = _sized(case, case.student, adapter=adapter)
    teachers: dict[str, Sized | None] = {}
    for settings, model in case.teachers:
        is_student = isinstance(settings, SelfTeacher)
        teachers[model.name] = student if is_student else None if model.is_served else _sized(case, model)
    mean = sum(map(len, prompts)) / len(prompts)
    return estimate(recipe, student, teachers, prompt_tokens=round(mean))


def _sized(case: Case, model: ModelHandle, *, adapter: int = 0) -> Sized:
    shape = shape_of(model.source.folder, trust_remote_code=model.source.trust_remote_code)
    return Sized(model.name, shape, dtype_name(case.dtype(model)), adapter)
