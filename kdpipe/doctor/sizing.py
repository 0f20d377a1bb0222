"""The sizes of a recipe, from configs, tokenizers and data alone: what `plan --estimate` runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from kdpipe.data.tasks import read_problems
from kdpipe.data.tasks.arithmetic import words
from kdpipe.doctor.budget import sizes
from kdpipe.doctor.estimate import STAYS, Sized, training
from kdpipe.doctor.sizing_request import SIZING, AskSizes, Measured
from kdpipe.models.devices import dtype_name, memory_of, resolve_dtype
from kdpipe.models.folder import scratch_model
from kdpipe.models.prompting import open_text, prompt_style
from kdpipe.models.reference import Shape, adapter_parameters, shape_of, shape_of_model
from kdpipe.models.tokenizer import arithmetic_tokenizer, num_ids_in_use
from kdpipe.recipe.models import Scratch
from kdpipe.recipe.roles import STUDENT
from kdpipe.recipe.schema import Recipe, ScratchTeacher, SelfTeacher, ServedTeacher, Student, Teacher
from kdpipe.recipe.teacher import OwnTeacher
from kdpipe.workers.message import Nothing
from kdpipe.workers.worker import Report

PROMPTS = 256
"""Train prompts whose length is taken for all."""


class SizingServer:
    """Answers with the sizes of a recipe; no weights are read."""

    talk = SIZING

    def __call__(self, request: AskSizes, _report: Report[Nothing]) -> Measured:
        memory = {f"cuda:{number}": size for number, size in enumerate(request.gpus)}
        memory = memory or memory_of(request.recipe.runtime.device)
        recipe, folders, is_cuda = request.recipe, request.folders, "cpu" not in memory
        student = _student(recipe, folders, is_cuda=is_cuda)
        teachers = {one.name: _teacher(one, student, folders, is_cuda=is_cuda) for one in recipe.teachers}
        tokens = _prompt_tokens(request)
        return Measured(sizes(recipe, student, teachers, prompt_tokens=tokens, memory=memory))


def trainer_bytes(recipe: Recipe, folders: Mapping[str, Path]) -> int:
    """What the trainer keeps on a CUDA device while others work, from the student's config."""
    parts = training(recipe, _student(recipe, folders, is_cuda=True))
    return sum(parts[name] for name in STAYS)


def _student(recipe: Recipe, folders: Mapping[str, Path], *, is_cuda: bool) -> Sized:
    lora, is_scratch = recipe.student.lora, recipe.student.scratch is not None
    adapter = adapter_parameters(folders[STUDENT], lora) if lora and not is_scratch else 0
    return replace(_sized(recipe.student, folders, is_cuda=is_cuda), adapter=adapter)


def _sized(model: Student | OwnTeacher, folders: Mapping[str, Path], *, is_cuda: bool) -> Sized:
    """A model with what it computes in; `auto` on a CUDA device is bfloat16."""
    auto = "bfloat16" if is_cuda else dtype_name(resolve_dtype("auto", torch.device("cpu"))[0])
    scratch = model.scratch if isinstance(model, Student | ScratchTeacher) else None
    shape = (
        _scratch(scratch)
        if scratch
        else shape_of(folders[model.name], trust_remote_code=model.trust_remote_code)
    )
    return Sized(model.name, shape, auto if model.dtype == "auto" else model.dtype)


def _teacher(teacher: Teacher, student: Sized, folders: Mapping[str, Path], *, is_cuda: bool) -> Sized | None:
    match teacher:
        case SelfTeacher():
            return student
        case ServedTeacher():
            return None
        case _:
            return _sized(teacher, folders, is_cuda=is_cuda)


def _scratch(settings: Scratch) -> Shape:
    tokenizer = arithmetic_tokenizer(words())
    ids = num_ids_in_use(tokenizer)
    network = scratch_model(settings, num_ids=ids, eos_id=0, pad_id=0, seed=0)
    return shape_of_model(network)


def _prompt_tokens(request: AskSizes) -> int:
    """Mean length of the first train prompts, as the student reads them."""
    recipe, student = request.recipe, request.recipe.student
    train, _ = read_problems(recipe.task, request.folder, hub_folder=request.folders.get("data"))
    style = prompt_style(recipe.task, train, student.template)
    text = open_text(request.folders.get(STUDENT), style, trust=student.trust_remote_code)
    prompts = [text.prompt(problem) for problem in train[:PROMPTS]]
    return round(sum(map(len, prompts)) / len(prompts))
