"""The doctor: a student and its teachers are examined before anything is believed, or paid for.

`examine` makes the probes of `doctor_text.py` and `doctor_engine.py` over a recipe's own engines. What each catches
stands in `doctor_finding.py`. A full examination samples a few completions, loads every model several times, and
writes a perturbed copy of the student to a temporary folder; the quick one, which `run` makes by itself, asks for
nothing that the next steps would not load anyway.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from kdpipe import doctor_engine as engines
from kdpipe import doctor_text as texts
from kdpipe.adapters import read_adapter, start_adapter, write_adapter
from kdpipe.batching import make_batch
from kdpipe.checkpoints import open_model, read_head, resolve_dtype
from kdpipe.doctor_engine import TOLERANCES, Scorer, Tolerance
from kdpipe.doctor_finding import Finding, Outcome, Probe, found, skipped
from kdpipe.engine import AdapterSource
from kdpipe.errors import EngineError, KdpipeError
from kdpipe.estimate import Estimate, Sized, estimate
from kdpipe.forward import head_of, hidden_states, score_tokens
from kdpipe.job import Job, Text, request_for, sampling_of
from kdpipe.plain import Pair, adapter_parameters, logprobs_of, perturb, plain_logprobs, shape_of
from kdpipe.prompting import reference_completion, render_teacher_prompt
from kdpipe.recipe import Optimizer
from kdpipe.routing import teaches
from kdpipe.seeds import permutation
from kdpipe.stages.teacher_score import TeacherSide, teacher_side
from kdpipe.trainer import Trainer

if TYPE_CHECKING:
    import numpy.typing as npt

    from kdpipe.engine import Completion, Engine, ModelSource
    from kdpipe.recipe import Recipe, Teacher
    from kdpipe.rows import Problem

Depth = Literal["full", "quick"]
PROMPTS: dict[Depth, int] = {"full": 8, "quick": 4}
NEW_TOKENS: dict[Depth, int] = {"full": 48, "quick": 16}
_REFERENCE_TOKENS = 32
_WITHOUT_SHARED_IDS = ("special tokens", "template", "end of sequence", "load", "null test")
_LONGEST = 32
"""Problems of the longest texts, whose prompts are rendered for the context probe."""


@dataclass(frozen=True, slots=True)
class Model:
    """The student or a teacher as it is examined.

    `open_engine` gives the engine that will run it, and may fail. `is_here` is false where a server has the weights.
    `stand_in` says what the weights are where they are not yet those that a run would use.
    """

    name: str
    source: ModelSource
    text: Text
    open_engine: Callable[[], Engine]
    engine_name: str
    is_here: bool = True
    stand_in: str = ""

    def dtype(self, device: torch.device) -> torch.dtype:
        """The dtype that it computes in: a server's is not known, and taken to be the coarsest."""
        return resolve_dtype(self.source.dtype, device)[0] if self.is_here else torch.bfloat16

    def tolerance(self, device: torch.device) -> Tolerance:
        """How far two passes over it may be apart."""
        return TOLERANCES[str(self.dtype(device)).removeprefix("torch.")]


@dataclass(frozen=True, slots=True)
class Case:
    """What is examined: a recipe with its student, what samples from it, and its teachers with their settings."""

    job: Job
    device: torch.device
    student: Model
    teachers: Sequence[tuple[Teacher, Model]]
    depth: Depth

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.job.recipe

    def rest(self, model: Model, engine: Engine) -> None:
        """Lets an engine with memory of its own free it for a forward pass made elsewhere on the same GPU."""
        if self.device.type == "cuda" and model.engine_name != "hf" and model.is_here:
            engine.sleep()


def examine(case: Case) -> list[Finding]:
    """The findings on the student and on each teacher, in the order in which they are told."""
    with tempfile.TemporaryDirectory(prefix="kdpipe-doctor-") as folder:
        student = _Student(case, Path(folder))
        findings = list(student.findings())
        for settings, model in case.teachers:
            findings += _Teacher(case, settings, model, student).findings()
    if case.device.type == "cuda":
        del student  # and with it the trainer's copy
        torch.cuda.empty_cache()
    return findings


def sizes(case: Case) -> Estimate:
    """What the recipe takes, from the configs of its models and the length of its prompts."""
    recipe, text = case.recipe, case.student.text
    prompts = [text.prompt(problem) for problem in case.job.train[:_LONGEST]]
    lora, source = recipe.student.lora, case.student.source
    adapter = 0
    if lora is not None:
        targets = None if lora.targets == "all-linear" else lora.targets
        adapter = adapter_parameters(source.folder, rank=lora.rank, targets=targets)
    student = _sized(case, case.student, adapter=adapter)
    teachers = {
        model.name: student if settings.self_ is not None else _sized(case, model) if model.is_here else None
        for settings, model in case.teachers
    }
    mean = sum(map(len, prompts)) / len(prompts)
    return estimate(recipe, student, teachers, prompt_tokens=round(mean))


def _sized(case: Case, model: Model, *, adapter: int = 0) -> Sized:
    shape = shape_of(model.source.folder, trust_remote_code=model.source.trust_remote_code)
    return Sized(model.name, shape, str(model.dtype(case.device)).removeprefix("torch."), adapter)


class _Student:
    """The student with its samples and the forward pass of the trainer."""

    def __init__(self, case: Case, scratch: Path) -> None:
        self.case = case
        self.model = case.student
        self._scratch = scratch
        self.dtype = self.model.dtype(case.device)
        self.tolerance = self.model.tolerance(case.device)

    @cached_property
    def problems(self) -> list[Problem]:
        """A few train problems, some of every teacher."""
        train = self.case.job.train
        order = [train[i] for i in permutation([p.prompt_id for p in train], "doctor")]
        count = PROMPTS[self.case.depth]
        chosen: dict[str, Problem] = {}
        for settings, _ in self.case.teachers:
            own = [problem for problem in order if teaches(settings, problem)]
            chosen |= {problem.prompt_id: problem for problem in own[:count]}
        return list(chosen.values()) or order[:count]

    @cached_property
    def completions(self) -> dict[str, Completion]:
        """A completion of each of the problems, sampled from the whole distribution."""
        recipe, text = self.case.recipe, self.model.text
        tokens = min(NEW_TOKENS[self.case.depth], recipe.rollout.max_new_tokens)
        settings = sampling_of(recipe, text, temperature=recipe.rollout.temperature, max_new_tokens=tokens)
        requests = [
            request_for(text.prompt(problem), 1, self.case.job.seed, "doctor", problem.prompt_id)
            for problem in self.problems
        ]
        engine = self.model.open_engine()
        engine.load(self.model.source)
        # Truncated, b would be of another distribution than the trainer's: that is not what is asked here.
        drawn = engine.sample(requests, replace(settings, top_p=1.0, top_k=0), progress=lambda _: None)
        self.case.rest(self.model, engine)
        return {problem.prompt_id: one for problem, [one] in zip(self.problems, drawn, strict=True)}

    def pairs(self, problems: Sequence[Problem]) -> list[Pair]:
        """The student's prompts of the problems with what it sampled."""
        found = self.completions
        return [(self.model.text.prompt(p), found[p.prompt_id].token_ids) for p in problems]

    def forward(self, pairs: Sequence[Pair], temperature: float) -> list[npt.NDArray[np.float64]]:
        """Log-probs of the trainer's forward, over the student's ids in use."""
        return self._trainer_forward(pairs, temperature)

    @cached_property
    def _trainer_forward(self) -> engines.Forward:
        """What train would compute: its weights, its autocast, `forward.py` in one batch at a time."""
        source, device = self.model.source, self.case.device
        lora = self.case.recipe.student.lora
        network = open_model(
            source.folder,
            dtype=torch.float32 if lora is None else self.dtype,
            device=device,
            trust_remote_code=source.trust_remote_code,
        )
        if source.adapter is not None:
            read_adapter(network, source.adapter.folder)
        trainer = Trainer(network, Optimizer(), horizon=1, compute=self.dtype)
        head = head_of(network, num_ids=self.model.text.num_ids)

        def forward(pairs: Sequence[Pair], temperature: float) -> list[npt.NDArray[np.float64]]:
            results = []
            for prompt, completion in pairs:
                batch = make_batch([prompt], [completion], device=device)
                with torch.no_grad(), trainer.computing():
                    scores = score_tokens(
                        hidden_states(network, batch),
                        head,
                        batch.target_ids_N,
                        temperature=temperature,
                        top_k=0,
                        chunk=self.case.recipe.runtime.head_chunk_tokens,
                    )
                results.append(scores.logprobs_N.double().cpu().numpy())
            return results

        return forward

    def findings(self) -> Iterator[Finding]:
        """What is asked of the student alone."""
        model, name = self.model, self.model.name
        tokens = self.case.recipe.rollout.max_new_tokens

        def context() -> Outcome:
            prompts = [model.text.prompt(problem) for problem in longest_problems(self.case.job)]
            limit = context_of(model.source)
            return texts.context(prompts, max_new_tokens=tokens, limit=limit, whose="the student")

        yield found("context", name, context)
        yield found("load", name, lambda: _load(model))
        yield found("sampler", name, self._sampler)
        if self.case.depth == "full":
            yield found("reload", name, self._reload)

    def _sampler(self) -> Outcome:
        temperature = self.case.recipe.rollout.temperature
        drawn = [np.asarray(one.logprobs, np.float64) for one in self.completions.values()]
        wanted = self.forward(self.pairs(self.problems), temperature)
        return engines.sampler(drawn, wanted, temperature=temperature, tolerance=self.tolerance)

    def _reload(self) -> Outcome:
        scorer = self.scorer(self.model.open_engine(), temperature=1.0)
        pairs = self.references(self.problems[:2])
        other, of_other = self._other()
        return engines.reload(scorer, other, pairs, forward=self._plain(self.model.source), of_other=of_other)

    def scorer(self, engine: Engine, *, temperature: float) -> Scorer:
        """The student as `engine` scores it."""
        return Scorer(engine, self.model.source, temperature, self.model.text.num_ids, self.tolerance)

    def references(self, problems: Sequence[Problem]) -> list[Pair]:
        """The student's prompts of the problems with the beginning of their reference solutions."""
        text = self.model.text
        return [
            (text.prompt(p), reference_completion(text.tokenizer, p, end_id=text.end_id)[:_REFERENCE_TOKENS])
            for p in problems
        ]

    def _plain(self, source: ModelSource) -> engines.Forward:
        def forward(pairs: Sequence[Pair], temperature: float) -> list[npt.NDArray[np.float64]]:
            return plain_logprobs(
                source,
                pairs,
                temperature=temperature,
                num_ids=self.model.text.num_ids,
                dtype=self.dtype,
                device=self.case.device,
            )

        return forward

    def _other(self) -> tuple[ModelSource, engines.Forward]:
        """A model of the student's sizes with other weights: another adapter where that is what changes."""
        source, lora = self.model.source, self.case.recipe.student.lora
        folder = self._scratch / "other"
        if lora is None:
            perturb(source, folder, dtype=self.dtype, seed=0)
            other = replace(source, folder=folder, digest=f"other than {source.digest}")
            return other, self._plain(other)
        network = open_model(
            source.folder,
            dtype=self.dtype,
            device=self.case.device,
            trust_remote_code=source.trust_remote_code,
        )
        start_adapter(network, lora, seed=0)
        with torch.no_grad():
            for weight in network.parameters():
                if weight.requires_grad:
                    weight.add_(0.1)
        write_adapter(network, folder)
        other = replace(source, adapter=AdapterSource(folder, f"other than {source.digest}"))

        def forward(pairs: Sequence[Pair], temperature: float) -> list[npt.NDArray[np.float64]]:
            num_ids = self.model.text.num_ids
            return logprobs_of(network.eval(), pairs, temperature=temperature, num_ids=num_ids)

        return other, forward


class _Teacher:
    """One teacher, examined beside the student."""

    def __init__(self, case: Case, settings: Teacher, model: Model, student: _Student) -> None:
        self.case = case
        self.settings = settings
        self.model = model
        self.student = student
        self.dtype = model.dtype(case.device)
        self.tolerance = model.tolerance(case.device)
        self.problems = [problem for problem in student.problems if teaches(settings, problem)]

    @cached_property
    def side(self) -> TeacherSide:
        """The teacher as teacher-score sees it; raises PreflightError where its vocabulary does not fit."""
        texts_of = {"student": self.student.model.text, "teacher": self.model.text}
        return teacher_side(self.case.job, self.settings, **texts_of)

    @property
    def temperature(self) -> float:
        """The temperature at which it scores."""
        return self.settings.temperature or self.case.recipe.rollout.temperature

    def findings(self) -> Iterator[Finding]:
        """What is asked of this teacher."""
        name = self.model.name
        vocabulary = found("vocabulary", name, self._vocabulary)
        yield vocabulary
        probes = self._quick() if self.case.depth == "quick" else {**self._quick(), **self._full()}
        for probe, make in probes.items():
            if vocabulary.verdict == "FAILED" and probe not in _WITHOUT_SHARED_IDS:
                yield Finding(probe, name, "skipped", "its ids mean nothing to the student: see vocabulary")
            else:
                yield found(probe, name, make)

    def _vocabulary(self) -> Outcome:
        outcome = texts.vocabulary(self.student.model.text, self.model.text, name=self.model.name)
        assert self.side is not None  # what else has to fit between the two, raises
        return outcome

    def _quick(self) -> dict[Probe, Callable[[], Outcome]]:
        student, text = self.student.model.text, self.model.text
        return {
            "special tokens": lambda: texts.special_tokens(student, text, student.prompt(self.problems[0])),
            "template": self._template,
            "end of sequence": lambda: texts.end_of_sequence(student, text, self.case.recipe.train.objective),
            "context": self._context,
            "load": lambda: _load(self.model),
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
            return self.side.text
        except KdpipeError:  # another probe says why; its template can be shown all the same
            return self.model.text

    def _context(self) -> Outcome:
        problems = [problem for problem in longest_problems(self.case.job) if teaches(self.settings, problem)]
        prompts = [self._prompt(problem) for problem in problems or self.problems]
        return texts.context(
            prompts,
            max_new_tokens=self.case.recipe.rollout.max_new_tokens,
            limit=context_of(self.model.source) if self.model.is_here else None,
            whose=f"teacher {self.model.name!r}",
        )

    def _prompt(self, problem: Problem) -> list[int]:
        """What it reads before a completion."""
        return self.side.prompt_ids(problem, self.student.model.text.prompt(problem))

    # engine

    def _scorer(self) -> Scorer:
        """This teacher on its engine, as teacher-score asks it."""
        return Scorer(
            self.model.open_engine(), self.model.source, self.temperature, self.side.num_ids, self.tolerance
        )

    def _references(self) -> list[Pair]:
        """What it reads, with the beginning of reference solutions, without ids that it lacks."""
        lacking = self.side.vocabulary.unscorable
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
            return skipped("its prompt holds ids that the student has not")
        return self._null(prompts)

    def _null(self, prompts: Sequence[list[int]]) -> Outcome:
        """The student's weights in this teacher's place, after these prompts."""
        drawn = [completion for _, completion in self.student.pairs(self.problems)]
        pairs = list(zip(prompts, drawn, strict=True))
        scorer = self.student.scorer(self.model.open_engine(), temperature=self.temperature)
        scored = scorer.logprobs(pairs)
        self.case.rest(self.model, scorer.engine)
        whose = "the trainer's forward"
        return engines.agrees(scorer, pairs, self.student.forward, whose=whose, scored=scored)

    def _cannot_hold_the_student(self) -> str | None:
        """Why the student's weights do not get into this teacher's engine, or None when they do."""
        if not self.model.is_here:
            return "a server has its weights, and does not load the student's"
        if self.case.depth == "full" or self.model.engine_name == "hf":
            return None
        if _sizes(self.model.source) != _sizes(self.student.model.source):
            return "its engine would have to be started anew for the student: kdpipe doctor does that"
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
            num_ids=self.side.num_ids,
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
        if not self.model.is_here:
            return skipped("a server has its weights: there is no folder to compare with")
        scorer, pairs = self._scorer(), self._references()[:2]
        scored = scorer.logprobs(pairs)
        self.case.rest(self.model, scorer.engine)

        def forward(pairs: Sequence[Pair], temperature: float) -> list[npt.NDArray[np.float64]]:
            return plain_logprobs(
                self.model.source,
                pairs,
                temperature=temperature,
                num_ids=self.side.num_ids,
                dtype=self.dtype,
                device=self.case.device,
            )

        whose = "a plain transformers forward of its folder"
        return engines.agrees(scorer, pairs, forward, whose=whose, scored=scored)

    def _knows_the_task(self) -> Outcome:
        if self.model.stand_in:
            return skipped(self.model.stand_in)
        pairs = [(prompt, completion[:-1] or completion) for prompt, completion in self._references()]
        own = None
        if not self._reads_own():
            text = self.side.text
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


def _load(model: Model) -> Outcome:
    """Whether the model's engine starts and takes the model."""
    model.open_engine().load(model.source)
    return Outcome(f"engine {model.engine_name}" + (f", {model.stand_in}" if model.stand_in else ""))


def longest_problems(job: Job) -> list[Problem]:
    """The problems of either split with the longest texts: their prompts are likely the longest."""

    def length(problem: Problem) -> int:
        return len(problem.question) + len(problem.solution)

    by_question = sorted(job.train, key=lambda p: len(p.question))[-_LONGEST:]
    return [*by_question, *sorted(job.train, key=length)[-_LONGEST:]]


def context_of(source: ModelSource) -> int | None:
    """How many tokens the model holds, by its config; None where there is none, or it does not say."""
    if not (source.folder / "config.json").is_file():
        return None
    sizes = _sizes(source)
    value = sizes.get("max_position_embeddings", sizes.get("n_positions"))
    return value if isinstance(value, int) else None


def _sizes(source: ModelSource) -> dict[str, object]:
    """What config.json says that decides which weights fit."""
    try:
        config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{source.folder / 'config.json'}: cannot be read: {error}") from error
    text = config.get("text_config", config)
    left_out = ("eos_token_id", "bos_token_id", "pad_token_id", "_name_or_path", "transformers_version")
    return {name: value for name, value in text.items() if name not in left_out}
