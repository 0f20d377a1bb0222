"""For which problems each stage samples, by which settings, and with which seeds: seen at the model's door."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdpipe.data.rows import Problem
from kdpipe.engines.protocol import SampleRequest, Sampling
from kdpipe.recipe.stages import RolloutSection
from kdpipe.stages import evaluate, rollout, sampling, teacher_text
from kdpipe.stages.settings.model import DrawSettings, PromptSettings


class Asked(Exception):
    """What a stage would have had sampled."""

    def __init__(self, requests: Sequence[SampleRequest], how: Sampling) -> None:
        super().__init__()
        self.requests, self.how = requests, how

    @property
    def prompts(self) -> list[int]:
        return [request.prompt_token_ids[0] for request in self.requests]

    @property
    def seeds(self) -> set[int]:
        return {seed for request in self.requests for seed in request.seeds}


def raising(requests: Sequence[SampleRequest], how: Sampling, **_: Any) -> Any:
    raise Asked(requests, how)


TEXT: Any = SimpleNamespace(
    end_ids=(1, 7), num_ids=30, prompt=lambda problem: [int(problem.prompt_id.rpartition("/")[2])]
)
MODEL: Any = SimpleNamespace(name="student", text=TEXT, sample=raising)
TRAIN, TEST = (
    [Problem(f"{split}/{first + number}", "", "", "") for number in range(20)]
    for split, first in (("train", 100), ("test", 200))
)
DRAWS = DrawSettings(temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=11, stop=("\n", "##"))


def job(number: int = 1, seed: int = 1) -> Any:
    def in_parts(_name: str, items: Any, *, build: Callable[[Any], Any], **_: Any) -> int:
        build(items)
        return 0

    return SimpleNamespace(
        train=TRAIN,
        test=TEST,
        round=number,
        seed=seed,
        in_parts=in_parts,
        asking=lambda _ids: contextlib.nullcontext(),
        pulse=SimpleNamespace(tokens=None),
        draft=SimpleNamespace(folder=Path()),
    )


def asked(stage: Callable[..., Any], *arguments: Any, **named: Any) -> Asked:
    with pytest.raises(Asked) as caught:
        stage(*arguments, **named)
    return caught.value


CONTEXT: Any = SimpleNamespace(
    student=lambda *_: MODEL,
    student_text=lambda: SimpleNamespace(**vars(TEXT), tokenizer=SimpleNamespace(get_vocab=dict)),
    texts=list,
    grade=lambda _: None,
    teacher=lambda _: SimpleNamespace(model=MODEL, text=TEXT, num_ids=30, name="teacher", prompt=TEXT.prompt),
)


def of_rollout(number: int = 1, seed: int = 1) -> Asked:
    section = RolloutSection(prompts=6, samples=3, max_new_tokens=11, temperature=0.7)
    settings: Any = SimpleNamespace(rollout=section, task=None)
    return asked(rollout.rollout, settings, job(number, seed), CONTEXT)


def of_text(number: int) -> Asked:
    settings: Any = SimpleNamespace(
        teacher=SimpleNamespace(only=None),
        rollout=DRAWS,
        task=None,
        samples=2,
        problems=None,
        prompts=PromptSettings(prompts=len(TRAIN), on_policy_fraction=0.5),
    )
    return asked(teacher_text.write_texts, settings, job(number), CONTEXT)


def of_grades(number: int = 1) -> Asked:
    settings: Any = SimpleNamespace(
        evaluate=replace(DRAWS, temperature=0.3), samples=2, problems=9, teacher=None
    )
    return asked(evaluate._grades, settings, job(number), MODEL, TEXT.prompt, None)


def of_reverse_kl(monkeypatch: pytest.MonkeyPatch, number: int = 1) -> Asked:
    monkeypatch.setattr(evaluate, "has_exact", lambda *_: False)
    settings: Any = SimpleNamespace(
        evaluate=replace(DRAWS, temperature=0.3), rollout=DRAWS, reverse_kl_problems=9, weights=None
    )
    return asked(evaluate._reverse_kl_rows, settings, job(number), MODEL, (), schema=None, first_part=0)


def test_a_stage_samples_by_its_settings_and_its_models_ids() -> None:
    assert sampling.sampling_of(DRAWS, TEXT) == Sampling(
        temperature=0.7, max_new_tokens=11, end_ids=(1, 7), num_ids=30, top_p=0.9, top_k=5, stop=("\n", "##")
    )


def test_each_sample_of_each_prompt_of_each_round_and_seed_has_a_seed_of_its_own() -> None:
    found = [of_rollout(), of_rollout(2), of_rollout(seed=2)]
    assert {len(request.seeds) for one in found for request in one.requests} == {3}
    every = [seed for one in found for request in one.requests for seed in request.seeds]
    assert len(every) == len(set(every)) == 3 * 6 * 3
    assert of_rollout().requests == found[0].requests


def test_a_prompt_that_comes_again_in_a_later_round_is_sampled_anew() -> None:
    """Three rounds of six are an epoch of these twenty: the fourth has prompts that were there before."""
    rounds = [of_rollout(number) for number in range(1, 7)]
    assert not set(rounds[0].prompts) & set(rounds[1].prompts)
    again = set(rounds[0].prompts) & {prompt for one in rounds[3:] for prompt in one.prompts}
    assert again
    assert len({seed for one in rounds for seed in one.seeds}) == 6 * 18


def test_rounds_are_of_train_and_a_teacher_writes_another_text_in_each() -> None:
    assert {prompt // 100 for number in (1, 2) for prompt in of_rollout(number).prompts} == {1}
    first, second = of_text(1), of_text(2)
    assert {prompt // 100 for prompt in first.prompts} == {1}
    assert set(first.prompts) & set(second.prompts)
    assert not first.seeds & second.seeds
    assert first.how.temperature == 0.7


def test_evaluations_are_of_test_the_same_in_every_round_and_with_draws_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grades, reverse_kl = of_grades(), of_reverse_kl(monkeypatch)
    for found in (grades, reverse_kl):
        assert {prompt // 100 for prompt in found.prompts} == {2}
        assert len(set(found.prompts)) == 9
    assert grades.prompts == reverse_kl.prompts  # of one order, whatever the round
    assert (of_grades(2).requests, of_reverse_kl(monkeypatch, 2).requests) == (
        grades.requests,
        reverse_kl.requests,
    )
    assert not grades.seeds & reverse_kl.seeds
    assert (grades.how.temperature, reverse_kl.how.temperature) == (0.3, 0.7)


def test_a_teacher_is_evaluated_after_its_own_prompt_and_the_student_after_its() -> None:
    given: dict[str, Any] = {"evaluate": DRAWS, "samples": 1, "problems": 4, "teachers": {}, "task": None}
    teacher: Any = SimpleNamespace(name="teacher", model=MODEL, prompt=lambda _: [7], student=TEXT)
    context: Any = SimpleNamespace(
        **{**vars(CONTEXT), "teacher": lambda _: teacher}, baseline=lambda *_: None
    )
    settings: Any = SimpleNamespace(**given, engine="hf", teacher=SimpleNamespace(only=None, name="teacher"))
    assert asked(evaluate.evaluate, settings, job(), context).prompts == [7] * 4
    settings.teacher = None
    assert {prompt // 100 for prompt in asked(evaluate.evaluate, settings, job(), context).prompts} == {2}


def test_the_subset_of_test_does_not_follow_the_order_of_the_file() -> None:
    chosen = {problem.prompt_id for problem in evaluate.subset(TEST, 9)}
    assert chosen == {problem.prompt_id for problem in evaluate.subset(TEST[::-1], 9)}
    assert chosen != {problem.prompt_id for problem in TEST[:9]}
