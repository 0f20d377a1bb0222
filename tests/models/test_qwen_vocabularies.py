"""A student with four ids more than its teacher, as Qwen3 has beside Qwen2.5: what is read, and what is scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from kdpipe.data.rows import Problem
from kdpipe.engines.handle import ModelHandle
from kdpipe.engines.protocol import TokenScores
from kdpipe.errors import PreflightError
from kdpipe.models.prompting import Text, prompt_style, render_prompt
from kdpipe.models.source import ModelSource
from kdpipe.recipe.file import load_recipe
from kdpipe.stages.job import Job
from kdpipe.stages.scoring import TeacherHandle, as_teacher, check_scorable, score_completions
from kdpipe.stages.settings.model import SupportSettings, TeacherSettings
from tests.fakes import FakeEngine
from tests.models.test_prompting import CHAT, byte_tokenizer

SHARED = ("<tool_call>", "</tool_call>")
OWN = ("<tool_response>", "</tool_response>", "<think>", "</think>")
QUIET = CHAT + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n{% endif %}"
PROBLEM = Problem("p", "Why?", "1", "#### 1")
RECIPE = """
name: qwen
rounds: 1
task: {kind: gsm8k, data: ./data, instruction: ""}
student: {model: ./student, template: {enable_thinking: false}}
teachers: [{model: ./teacher}]
"""


class Pulse:
    def tokens(self, count: int) -> None: ...


def sides(folder: Path, **teacher: Any) -> tuple[Job, Text, TeacherHandle]:
    """A student with thinking switched off by four ids of its own, and a teacher that never had them."""
    (folder / "recipe.yaml").write_text(RECIPE)
    sets = [f"teachers.0.{name}={value}" for name, value in teacher.items()]
    recipe = load_recipe(folder / "recipe.yaml", tuple(sets)).recipe
    job = Job(recipe.runtime, 1, 1, [PROBLEM], [], cast("Any", None), cast("Any", Pulse()))
    qwen3 = byte_tokenizer(*SHARED, *OWN, chat_template=QUIET)
    qwen2 = byte_tokenizer(*SHARED, chat_template=CHAT)
    arguments = recipe.student.template
    student = Text(qwen3, prompt_style(recipe.task, [], arguments), (qwen3.eos_token_id,), 266)
    engine = FakeEngine(num_rows=266)
    its = Text(qwen2, prompt_style(recipe.task, [], arguments), (qwen2.eos_token_id,), 262)
    model = ModelHandle("teacher", ModelSource(folder, "a"), its, "hf", lambda: engine)
    settings = TeacherSettings.of(recipe, recipe.teacher, "hf")
    return job, student, as_teacher(settings, model, student=student, support=SupportSettings.of(recipe))


def test_a_teacher_that_lacks_ids_of_the_students_prompt_reads_its_own_template(tmp_path: Path) -> None:
    _, student, side = sides(tmp_path)
    prompt = student.prompt(PROBLEM)
    assert {264, 265} <= set(prompt), "the student's prompt holds <think> and </think>"
    found = side.prompt_ids(PROBLEM, prompt)
    assert side.text.tokenizer.decode(found) == "<s><|start|>user\nWhy?<|end|>\n<|start|>assistant\n"
    assert found == render_prompt(side.text.tokenizer, side.text.style, PROBLEM)


def test_it_reads_the_students_prompt_where_it_has_all_of_its_ids(tmp_path: Path) -> None:
    _, _, side = sides(tmp_path)
    plain = list(range(10, 20))
    assert side.prompt_ids(PROBLEM, plain) is plain


def test_tokens_that_it_lacks_are_cut_from_what_it_reads_and_get_no_score(tmp_path: Path) -> None:
    job, student, side = sides(tmp_path)
    assert (side.num_ids, side.vocabulary.unscorable) == (262, {262, 263, 264, 265})
    with_own, without = [264, 70, 265, 71, 260, 72], [70, 71, 260, 72]
    prompt = student.prompt(PROBLEM)
    scored = score_completions(
        job, [(PROBLEM, prompt, with_own), (PROBLEM, prompt, without)], teacher=side, top_k=3
    )
    (_, whole, mask), (_, cut, every) = scored
    assert mask.tolist() == [False, True, False, True, True, True]
    assert every.all()
    for name in ("logprobs", "topk_ids", "topk_logprobs", "tail_logprobs"):
        found, wanted = getattr(whole, name), getattr(cut, name)
        np.testing.assert_array_equal(found[mask], wanted)
        assert not found[~mask].any()
    assert isinstance(whole, TokenScores)


def test_more_than_one_in_a_hundred_of_them_stops_the_run() -> None:
    few, many = np.arange(200) > 1, np.arange(200) > 2
    check_scorable("teacher 'qwen2' lacks", [few])
    with pytest.raises(
        PreflightError, match=r"teacher 'qwen2' lacks the ids of 3 of 200 sampled tokens \(1.5%\)"
    ):
        check_scorable("teacher 'qwen2' lacks", [many])
