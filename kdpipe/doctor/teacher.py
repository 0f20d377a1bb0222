"""A teacher under examination, beside the student that it teaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from kdpipe.doctor import engine as engines
from kdpipe.doctor import text as texts
from kdpipe.doctor.case import Case, context_of, longest_problems, sizes_of
from kdpipe.doctor.engine import Scorer
from kdpipe.doctor.finding import Finding, Outcome, Probe, found, skipped
from kdpipe.errors import KdpipeError
from kdpipe.models.folder import read_head
from kdpipe.models.prompting import render_teacher_prompt
from kdpipe.models.reference import Pair, plain_logprobs
from kdpipe.stages.scoring import TeacherHandle, as_teacher
from kdpipe.stages.settings.model import SupportSettings, TeacherSettings, routes_of, teaches

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kdpipe.data.rows import Problem
    from kdpipe.doctor.student import ExaminedStudent
    from kdpipe.engines.handle import ModelHandle
    from kdpipe.models.prompting import Text
    from kdpipe.recipe.schema import Teacher

_WITHOUT_SHARED_IDS = ("special tokens", "template", "end of sequence", "load", "null test")


class ExaminedTeacher:
    """One teacher, examined beside the student."""

    def __init__(self, case: Case, settings: Teacher, model: ModelHandle, student: ExaminedStudent) -> None:
        self.case = case
        self.settings = settings
        self.model = model
        self.student = student
        self.dtype = case.dtype(model)
        self.tolerance = case.tolerance(model)
        self.problems = [problem for problem in student.problems if teaches(routes_of(settings), problem)]

    @cached_property
    def handle(self) -> TeacherHandle:
        """The teacher as teacher-score sees it; raises PreflightError where its vocabulary does not fit."""
        recipe = self.case.recipe
        return as_teacher(
            TeacherSettings.of(recipe, self.settings, recipe.teacher_score.engine),
            self.model,
            student=self.student.model.text,
            support=SupportSettings.of(recipe),
        )

    @property
    def temperature(self) -> float:
        """The temperature at which it scores."""
        return self.case.recipe.temperature_of(self.settings)

    def findings(self) -> Iterator[Finding]:
        """The findings on this teacher."""
        name = self.model.name
        vocabulary = found("vocabulary", name, self._vocabulary)
        yield vocabulary
        probes = self._quick() if self.case.depth == "quick" else {**self._quick(), **self._full()}
        for probe, make in probes.items():
            if vocabulary.verdict == "FAILED" and probe not in _WITHOUT_SHARED_IDS:
                yield found(
                    probe, name, lambda: skipped("its ids mean nothing to the student: see vocabulary")
                )
            else:
                yield found(probe, name, make)

    def _vocabulary(self) -> Outcome:
        outcome = texts.vocabulary(self.student.model.text, self.model.text, name=self.model.name)
        assert self.handle is not None  # what else has to fit between the two, raises
        return outcome

    def _quick(self) -> dict[Probe, Callable[[], Outcome]]:
        student, text = self.student.model.text, self.model.text
        return {
            "special tokens": lambda: texts.special_tokens(student, text, student.prompt(self.problems[0])),
            "template": self._template,
            "end of sequence": lambda: texts.end_of_sequence(student, text, self.case.recipe.train.objective),
            "context": self._context,
            "load": lambda: self.case.load(self.model),
            "null test": self._null_test,
        }

    def _full(self) -> dict[Probe, Callable[[], Outcome]]:
        return {
            "own prompt": self._null_test_of_own_prompt,
            "shift": lambda: engines.shift(self._scorer(), max(self._references(), key=lambda p: len(p[1]))),
            "not constant": lambda: engines.not_constant(self._scorer(), self._references()),
            "same twice": lambda: engines.same_twice(self._scorer(), self._references()),
            "top-k": self._top_k,
            "hidden states": self._hidden_states,
            "own weights": self._own_weights,
            "knows the task": self._knows_the_task,
        }

    # text

    def _reads_own(self) -> bool:
        return self.settings.prompt is not None or (
            bool(self.settings.template) and self.settings.template != self.case.recipe.student.template
        )

    def _template(self) -> Outcome:
        return texts.template(
            self.student.model.text,
            self._own_text(),
            self.settings,
            self.problems[0],
            reads_own=self._reads_own(),
        )

    def _own_text(self) -> Text:
        """Its text with the template arguments that its template knows, as teacher-score renders it."""
        try:
            return self.handle.text
        except KdpipeError:  # another probe says why; its template can be shown all the same
            return self.model.text

    def _context(self) -> Outcome:
        problems = [
            problem
            for problem in longest_problems(self.case.job)
            if teaches(routes_of(self.settings), problem)
        ]
        prompts = [self._prompt(problem) for problem in problems or self.problems]
        return texts.context(
            prompts,
            max_new_tokens=self.case.recipe.rollout.max_new_tokens,
            limit=context_of(self.model.source) if not self.model.is_served else None,
            whose=f"teacher {self.model.name!r}",
        )

    def _prompt(self, problem: Problem) -> list[int]:
        """The prompt that it reads before a completion."""
        return self.handle.prompt_ids(problem, self.student.model.text.prompt(problem))

    # engine

    def _scorer(self) -> Scorer:
        """This teacher on its engine, as teacher-score uses it."""
        return Scorer(self.model, self.temperature, self.handle.num_ids, self.tolerance)

    def _references(self) -> list[Pair]:
        """Its prompts with the beginning of reference solutions, without ids that it lacks."""
        lacking = self.handle.vocabulary.unscorable
        pairs = self.student.references(self.problems[:4])
        return [
            (self._prompt(problem), [token for token in completion if token not in lacking])
            for problem, (_, completion) in zip(self.problems, pairs, strict=False)
        ]

    def _null_test(self) -> Outcome:
        if (why := self._cannot_hold_the_student()) is not None:
            return skipped(why)
        return self._null([self.student.model.text.prompt(problem) for problem in self.problems])

    def _null_test_of_own_prompt(self) -> Outcome:
        if not self._reads_own():
            return skipped("it reads the student's prompt")
        if (why := self._cannot_hold_the_student()) is not None:
            return skipped(why)
        prompts = [self._prompt(problem) for problem in self.problems]
        if any(max(prompt) >= self.student.model.text.num_ids for prompt in prompts):
            return skipped("its prompt holds ids that the student lacks")
        return self._null(prompts)

    def _null(self, prompts: Sequence[list[int]]) -> Outcome:
        """The student's weights in this teacher's engine, after these prompts."""
        drawn = [completion for _, completion in self.student.pairs(self.problems)]
        pairs = list(zip(prompts, drawn, strict=True))
        scorer = self.student.scorer(self.model, temperature=self.temperature)
        scored = scorer.logprobs(pairs)
        self.case.rest(self.model)
        whose = "the trainer's forward"
        return engines.agrees(scorer, pairs, self.student.forward, whose=whose, scored=scored)

    def _cannot_hold_the_student(self) -> str | None:
        """Why the student's weights do not get into this teacher's engine, or None when they do."""
        if self.model.is_served:
            return "a server has its weights, and does not load the student's"
        if self.case.depth == "full" or self.model.engine_name == "hf":
            return None
        if sizes_of(self.model.source) != sizes_of(self.student.model.source):
            return "its engine would have to restart for the student: kdpipe doctor does that"
        return None

    def _top_k(self) -> Outcome:
        k = self.case.recipe.keep.teacher_top_k
        if not k:
            return skipped("the objective needs none")
        return engines.top_k(self._scorer(), self._references(), k)

    def _hidden_states(self) -> Outcome:
        if not self.case.recipe.keep.hidden:
            return skipped("the objective needs none")
        source, device, temperature = self.model.source, self.case.device, self.temperature
        head = read_head(
            source.folder,
            num_ids=self.handle.num_ids,
            dtype=self.dtype,
            device=device,
            trust_remote_code=source.trust_remote_code,
        )

        def turn(states: npt.NDArray[np.float32], ids: Sequence[int]) -> npt.NDArray[np.float64]:
            hidden_NH = torch.from_numpy(states).to(device, self.dtype)
            logits_NV = (hidden_NH @ head.weight_VH.T).float()
            if head.bias_V is not None:
                logits_NV += head.bias_V
            logprobs_NV = (logits_NV / temperature).log_softmax(-1)
            own = torch.tensor(list(ids), device=device)[:, None]
            return logprobs_NV.gather(1, own)[:, 0].double().cpu().numpy()

        return engines.hidden_states(self._scorer(), self._references(), turn)

    def _own_weights(self) -> Outcome:
        if self.model.is_served:
            return skipped("a server has its weights: there is no folder to compare with")
        if self.settings.quantization is not None:
            return skipped("quantization is asked for: the engine's weights are not those of the folder")
        scorer, pairs = self._scorer(), self._references()[:2]
        scored = scorer.logprobs(pairs)
        self.case.rest(self.model)

        def forward(pairs: Sequence[Pair], temperature: float) -> list[npt.NDArray[np.float64]]:
            return plain_logprobs(
                self.model.source,
                pairs,
                temperature=temperature,
                num_ids=self.handle.num_ids,
                dtype=self.dtype,
                device=self.case.device,
            )

        whose = "a plain transformers forward of its folder"
        return engines.agrees(scorer, pairs, forward, whose=whose, scored=scored)

    def _knows_the_task(self) -> Outcome:
        if (stand_in := self.case.stand_ins.get(self.model.name)) is not None:
            return skipped(stand_in)
        pairs = [(prompt, completion[:-1] or completion) for prompt, completion in self._references()]
        own = None
        if not self._reads_own():
            text = self.handle.text
            try:
                prompts = [
                    render_teacher_prompt(text.tokenizer, text.style, problem, None)
                    for problem in self.problems[: len(pairs)]
                ]
            except KdpipeError:  # the template probe says so
                prompts = [prompt for prompt, _ in pairs]
            if prompts != [prompt for prompt, _ in pairs]:
                own = [(prompt, completion) for prompt, (_, completion) in zip(prompts, pairs, strict=True)]
        return engines.knows_the_task(self._scorer(), pairs, own)
