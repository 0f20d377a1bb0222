"""A teacher under examination, beside the student that it teaches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from kdpipe.data.rows import Problem
from kdpipe.doctor import engine as engines
from kdpipe.doctor import text as texts
from kdpipe.doctor.case import NEW_TOKENS, Case, context_of, sizes_of
from kdpipe.doctor.engine import UNMEASURED, Passed, Scorer, Tolerance
from kdpipe.doctor.finding import Finding, Outcome, found, skipped
from kdpipe.doctor.lengths import PromptReader
from kdpipe.doctor.student import ExaminedStudent
from kdpipe.engines.handle import ModelHandle
from kdpipe.errors import KdpipeError
from kdpipe.models.logprobs import token_logprobs
from kdpipe.models.reference import Pair
from kdpipe.recipe.schema import Teacher
from kdpipe.stages.sampling import request_for, sampling_of
from kdpipe.stages.scoring import TeacherHandle, as_teacher, output_head
from kdpipe.stages.settings.model import DrawSettings, SupportSettings, TeacherSettings, routes_of, teaches

TOP_K = 16
"""Ids compared at a token where the objective needs no top k."""
_WITHOUT_SHARED_IDS = ("prompt", "special tokens", "template", "end of sequence", "load", "null test")


class ExaminedTeacher:
    """One teacher, examined beside the student."""

    def __init__(self, settings: Teacher, model: ModelHandle, student: ExaminedStudent) -> None:
        self.case = case = student.case
        self.settings = settings
        self.model = model
        self.student = student
        self.temperature = case.recipe.temperature_of(settings)
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

    @cached_property
    def _plain(self) -> Passed:
        """What transformers alone says of its folder, and its noise."""
        self._rest()
        forward = self.case.plain(self.model, self.model.source, self.handle.num_ids)
        return forward(self._references()[:2], self.temperature)

    @property
    def _tolerance(self) -> Tolerance:
        """How far two passes over it may be apart."""
        is_other = self.model.is_served or self.settings.quantization is not None
        return UNMEASURED if is_other else self._plain[1]

    def findings(self) -> Iterator[Finding]:
        name = self.model.name
        vocabulary = found("vocabulary", name, self._vocabulary)
        yield vocabulary
        lost = skipped("its ids mean nothing to the student: see vocabulary")
        for probe, make in self._probes().items():
            is_lost = vocabulary.verdict == "FAILED" and probe not in _WITHOUT_SHARED_IDS
            finding = found(probe, name, (lambda: lost) if is_lost else make)
            yield finding
            if probe == "load" and finding.verdict == "FAILED" and self.model.is_served:
                return  # each of the others would wait for it again

    def _vocabulary(self) -> Outcome:
        outcome = texts.vocabulary(self.student.model.text, self.model.text, name=self.model.name)
        assert self.handle is not None  # what else has to fit between the two, raises
        return outcome

    def _probes(self) -> dict[str, Callable[[], Outcome]]:
        student, text = self.student.model.text, self.model.text
        quick: dict[str, Callable[[], Outcome]] = {
            "prompt": self._prompt,
            "special tokens": lambda: texts.special_tokens(student, text, student.prompt(self.problems[0])),
            "template": self._template,
            "end of sequence": lambda: texts.end_of_sequence(student, text, self.case.recipe.train.objective),
            "load": lambda: self.case.load(self.model),
            "context": self._context,
            "null test": lambda: self._null_test(student.prompt),
        }
        if self.case.depth == "quick":
            return quick
        full = quick | {
            "own prompt": self._own_prompt,
            "shift": self._shift,
            "not constant": lambda: engines.not_constant(self._scorer(), self._references(), self._tolerance),
            "same twice": lambda: engines.same_twice(
                self._scorer(), self._references(), self._tolerance, between=self._ask_otherwise
            ),
            "top-k": self._top_k,
            "hidden states": self._hidden_states,
            "own weights": self._own_weights,
            "overlap": self._overlap,
            "knows the task": self._knows_the_task,
        }
        asked = ("load", "same twice", "context", "top-k")  # what is asked in between, is asked first there
        return {probe: full[probe] for probe in asked} if self.case.depth == "servers" else full

    def _reads_own(self) -> bool:
        recipe = self.case.recipe
        return TeacherSettings.of(recipe, self.settings, recipe.teacher_score.engine).reads_own

    def _prompt(self) -> Outcome:
        if not self._reads_own():
            return skipped("it reads the student's prompt")
        return texts.prompt(self.handle.text, self.problems, self.settings.prompt)

    def _template(self) -> Outcome:
        text = self.model.text
        with suppress(KdpipeError):  # another probe says why; its template can be shown all the same
            text = self.handle.text  # with the arguments that its template knows, as teacher-score renders it
        ours, problem = self.student.model.text, self.problems[0]
        return texts.template(ours, text, self.settings, problem, reads_own=self._reads_own())

    def _context(self) -> Outcome:
        limit = None if self.model.is_served else context_of(self.model.source)
        who, text = f"teacher {self.model.name!r}", self.handle.text
        reader = PromptReader(who, self.settings, limit, text, self.handle.prompt)
        if not self.model.is_served:
            return self.case.context(reader)
        lengths = reader.lengths(self.case.recipe, "train", self.case.job.train)
        longest = max(lengths, key=lambda length: length.prompt).problem
        return self._served_context(self.handle.prompt(longest), self.case.recipe.rollout.max_new_tokens)

    def _served_context(self, prompt: list[int], tokens: int) -> Outcome:
        """Whether a server scores as much at once as a step will ask for: proxies have limits too."""
        if self.case.depth == "quick":
            return skipped("the server was asked before the first step")
        filler, k = self._references()[0][1] or prompt, self.case.recipe.keep.teacher_top_k
        completion = (filler * (1 + tokens // len(filler)))[:tokens]
        self._scorer().scores([(prompt, completion)], top_k=k)
        return Outcome(f"longest prompt {len(prompt)} + max_new_tokens {tokens}, scored at once, top {k}")

    def _ask_otherwise(self) -> None:
        """Asks a server what steps ask between two scores: a top k, and where it is to write, a sample."""
        recipe, references = self.case.recipe, self._references()
        if self.model.is_served and recipe.keep.teacher_top_k:
            self._scorer().scores(references, top_k=recipe.keep.teacher_top_k)
        if self.model.is_served and (recipe.grades_teachers or recipe.has_teacher_text):
            draws = DrawSettings(1.0, 1.0, 0, NEW_TOKENS["servers"], recipe.rollout.stop)
            request = request_for(references[0][0], 1, self.case.job.seed, "doctor")
            self.model.sample([request], sampling_of(draws, self.handle.text), progress=lambda _: None)

    def _scorer(self) -> Scorer:
        """This teacher on its engine, as teacher-score uses it."""
        return Scorer(self.model, self.temperature, self.handle.num_ids)

    def _references(self) -> list[Pair]:
        """Its prompts with the text that the student's references have, without ids that it lacks."""
        lacking = self.handle.vocabulary.unscorable
        pairs = self.student.references(self.problems[: 2 if self.case.depth == "servers" else 4])
        return [
            (self.handle.prompt(problem), [token for token in completion if token not in lacking])
            for problem, (_, completion) in zip(self.problems, pairs, strict=False)
        ]

    def _shift(self) -> Outcome:
        longest = max(self._references(), key=lambda pair: len(pair[1]))
        return engines.shift(self._scorer(), longest, self._tolerance)

    def _own_prompt(self) -> Outcome:
        if not self._reads_own():
            return skipped("it reads the student's prompt")
        return self._null_test(self.handle.prompt)

    def _null_test(self, prompt_of: Callable[[Problem], list[int]]) -> Outcome:
        """The student's weights in this teacher's engine, after these prompts."""
        if self.model.is_served:
            return skipped("a server has its weights, and does not load the student's")
        student = self.student.model
        is_quick = self.case.depth == "quick" and self.model.engine_name != "hf"
        if is_quick and sizes_of(self.model.source) != sizes_of(student.source):
            return skipped("its engine would have to restart for the student: kdpipe doctor does that")
        prompts = [prompt_of(problem) for problem in self.problems]
        if any(max(prompt) >= student.text.num_ids for prompt in prompts):
            return skipped("its prompt holds ids that the student lacks")
        drawn = [completion for _, completion in self.student.pairs(self.problems)]
        scorer = self.student.scorer(self.model, temperature=self.temperature)
        pairs, whose = list(zip(prompts, drawn, strict=True)), "the trainer's forward"
        return engines.agrees(scorer, pairs, self.student.forward, whose=whose, between=self._rest)

    def _rest(self) -> None:
        self.case.rest(self.model)

    def _top_k(self) -> Outcome:
        k = self.case.recipe.keep.teacher_top_k
        if not k:
            return skipped("the objective needs none")
        return engines.top_k(self._scorer(), self._references(), k)

    def _hidden_states(self) -> Outcome:
        if not self.case.recipe.keep.hidden:
            return skipped("the objective needs none")
        head = output_head(self.case.job, self.model.source, num_ids=self.handle.num_ids)
        weight, heat = head.weight_VH, self.temperature

        def turn(states: npt.NDArray[np.float32], ids: Sequence[int]) -> npt.NDArray[np.float64]:
            hidden_NH = torch.from_numpy(states).to(weight.device, weight.dtype)
            own_N = torch.tensor(ids, device=weight.device)
            found_N, _ = token_logprobs(hidden_NH, head, own_N, temperature=heat, chunk=max(1, len(ids)))
            return found_N.double().cpu().numpy()

        return engines.hidden_states(self._scorer(), self._references(), turn, self._tolerance)

    def _own_weights(self) -> Outcome:
        if self.model.is_served:
            return skipped("a server has its weights: there is no folder to compare with")
        if self.settings.quantization is not None:
            return skipped("quantization is asked for: the engine's weights are not those of the folder")
        whose, plain = "a plain transformers forward of its folder", self._plain
        forward = self.case.plain(self.model, self.model.source, self.handle.num_ids)
        scorer, pairs = self._scorer(), self._references()[:2]

        def passed(pairs: Sequence[Pair], temperature: float) -> Passed:
            return plain if temperature == self.temperature else forward(pairs, temperature)

        return engines.agrees(scorer, pairs, passed, whose=whose, between=self._rest)

    def _overlap(self) -> Outcome:
        """Of the most probable ids of both, at the student's own samples, each after its own prompt."""
        k, lacking = self.case.recipe.keep.teacher_top_k or TOP_K, self.handle.vocabulary.unscorable
        drawn = [
            (problem, completion)
            for problem, (_, completion) in zip(self.problems, self.student.pairs(self.problems), strict=True)
            if not lacking.intersection(completion)
        ]
        k = min(k, self.handle.num_ids)
        prompt_of = self.student.model.text.prompt
        at = self.case.recipe.rollout.temperature or 1.0
        ours = self.student.scorer(self.student.model, temperature=at).scores(
            [(prompt_of(p), c) for p, c in drawn], top_k=k
        )
        self.case.rest(self.student.model)
        theirs = self._scorer().scores([(self.handle.prompt(p), c) for p, c in drawn], top_k=k)
        return engines.overlap(ours, theirs, k)

    def _knows_the_task(self) -> Outcome:
        if (stand_in := self.case.stand_ins.get(self.model.name)) is not None:
            return skipped(stand_in)
        if any(problem.solution is None for problem in self.problems):
            return skipped("not every problem has a reference solution: it cannot be told")
        pairs = [(prompt, completion[:-1] or completion) for prompt, completion in self._references()]
        own, text = pairs, self.handle.text
        if not self._reads_own():
            with suppress(KdpipeError):  # the template probe says why it cannot be rendered
                both = zip(self.problems, pairs, strict=False)
                own = [(text.prompt(problem), completion) for problem, (_, completion) in both]
        return engines.knows_the_task(self._scorer(), pairs, own if own != pairs else None)


def examine(case: Case) -> Iterator[Finding]:
    """The findings on the student and on each teacher, each when it is made."""
    student = ExaminedStudent(case)
    if case.depth != "servers":
        yield from student.findings()
    for settings, model in case.teachers:
        yield from ExaminedTeacher(settings, model, student).findings()
    if case.device.type == "cuda":
        del student  # and with it the trainer's copy
        torch.cuda.empty_cache()
