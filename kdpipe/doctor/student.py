"""The student under examination: its samples, the trainer's forward pass, and reloads."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdpipe.data.rows import Problem
from kdpipe.data.seeds import permutation
from kdpipe.doctor import engine as engines
from kdpipe.doctor import text as texts
from kdpipe.doctor.case import NEW_TOKENS, PROMPTS, Case, context_of
from kdpipe.doctor.engine import Logprobs, Passed, Scorer, tolerance_of
from kdpipe.doctor.finding import Finding, Outcome, found
from kdpipe.doctor.lengths import PromptReader
from kdpipe.engines.handle import ModelHandle
from kdpipe.engines.protocol import Completion
from kdpipe.method.micro_batch import micro_batch_loss
from kdpipe.method.token_batch import TokenBatch
from kdpipe.models.adapters import read_adapter, start_adapter, write_adapter
from kdpipe.models.batching import Batch, batches_by_tokens, make_batch
from kdpipe.models.devices import dtype_name
from kdpipe.models.folder import open_model
from kdpipe.models.logprobs import Head
from kdpipe.models.reference import Pair, computing_in, logprobs_of, perturb, rounding_noise
from kdpipe.models.source import AdapterSource, ModelSource
from kdpipe.recipe.models import Optimizer
from kdpipe.recipe.objective import K1LossTerm, Objective
from kdpipe.stages.sampling import request_for, sampling_of
from kdpipe.stages.settings.model import DrawSettings, routes_of, teaches
from kdpipe.training.local import LocalTrainer

_REFERENCE_TOKENS = 32
_S_LESS_0 = Objective(kind="kd", kd=K1LossTerm(term="k1_loss"))
SHARES = (1.0, 0.3, 0.1, 0.03, 0.01)
"""Parts of their spread by which weights are changed for `reload`, until scores move by `MOST_MOVED` at most."""
MOST_MOVED = 5.0
"""Nats, at the 99th percentile: moved further, a deep model says nonsense, and rounds as it likes."""


class _Reading:
    """The sum of share times log-prob; its derivative by the shares is what a step's loss reads, `read_N`.

    It leaves no gradient on the weights.
    """

    def __init__(self, batch: Batch, temperature: float, chunk: int) -> None:
        self._ids_N, self._temperature, self._chunk = batch.target_ids_N, temperature, chunk
        zeros_N = torch.zeros(len(batch.target_ids_N), device=batch.target_ids_N.device)
        self.read_N = zeros_N
        all_N = zeros_N == 0
        self._tokens = TokenBatch(
            behaviour=zeros_N,
            proximal=zeros_N,
            advantage=zeros_N,
            kept=all_N,
            scorable=all_N,
            kd_open=all_N,
            share=zeros_N.clone().requires_grad_(),
            lengths=batch.counts,
            teacher=zeros_N,
        )

    def __call__(self, hidden_NH: torch.Tensor, head: Head) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total, _ = micro_batch_loss(
            _S_LESS_0,
            self._tokens,
            self._ids_N,
            hidden_NH,
            head,
            temperature=self._temperature,
            chunk=self._chunk,
            teacher=None,
        )
        [self.read_N] = torch.autograd.grad(total, self._tokens.share)
        return self._tokens.share.sum() * 0, {}


class ExaminedStudent:
    """The student with its samples and the forward pass of the trainer."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model = case.student
        self.dtype = case.dtype(self.model)

    @cached_property
    def problems(self) -> list[Problem]:
        """A few train problems, some of every teacher."""
        train = self.case.job.train
        order = [train[i] for i in permutation([p.prompt_id for p in train], "doctor")]
        count = PROMPTS[self.case.depth]
        chosen: dict[str, Problem] = {}
        for settings, _ in self.case.teachers:
            own = [problem for problem in order if teaches(routes_of(settings), problem)]
            chosen |= {problem.prompt_id: problem for problem in own[:count]}
        return list(chosen.values()) or order[:count]

    @cached_property
    def completions(self) -> dict[str, Completion]:
        """A completion of each of the problems, sampled from the whole distribution."""
        recipe, text = self.case.recipe, self.model.text
        tokens = min(NEW_TOKENS[self.case.depth], recipe.rollout.max_new_tokens)
        settings = sampling_of(DrawSettings.of(recipe.rollout, max_new_tokens=tokens), text)
        requests = [
            request_for(text.prompt(problem), 1, self.case.job.seed, "doctor", problem.prompt_id)
            for problem in self.problems
        ]
        # Truncated, b would be of another distribution than the trainer's.
        whole = replace(settings, top_p=1.0, top_k=0)
        drawn = self.model.sample(requests, whole, progress=lambda _: None)
        self.case.rest(self.model)
        return {problem.prompt_id: one for problem, [one] in zip(self.problems, drawn, strict=True)}

    def pairs(self, problems: Sequence[Problem]) -> list[Pair]:
        """The student's prompts of the problems with what it sampled."""
        found = self.completions
        return [(self.model.text.prompt(p), found[p.prompt_id].token_ids) for p in problems]

    @cached_property
    def _trainer(self) -> LocalTrainer:
        """What train would compute with: its weights, its autocast."""
        lora, adapter, num_ids = (
            self.case.recipe.student.lora,
            self.model.source.adapter,
            self.model.text.num_ids,
        )
        network = self._network(torch.float32 if lora is None else self.dtype)
        if adapter is not None:
            read_adapter(network, adapter.folder)
        return LocalTrainer(
            network,
            Optimizer(),
            num_ids=num_ids,
            horizon=1,
            compute=self.dtype,
            gradient_checkpointing=self.case.recipe.runtime.gradient_checkpointing,
        )

    def _network(self, dtype: torch.dtype) -> Any:
        folder, trust = self.model.source.folder, self.model.source.trust_remote_code
        return open_model(folder, dtype=dtype, device=self.case.device, trust_remote_code=trust)

    def forward(self, pairs: Sequence[Pair], temperature: float) -> Passed:
        """Log-probs of the trainer's forward, over the student's ids in use, one sequence at a time."""
        chunk = self.case.recipe.runtime.head_chunk_tokens
        batches = (make_batch([prompt], [each], device=self.case.device) for prompt, each in pairs)
        found_N = (self._trainer.logprobs(each, temperature=temperature, chunk=chunk) for each in batches)
        found = [logprobs_N.double().numpy() for logprobs_N in found_N]
        asked: Any = {"temperature": temperature, "num_ids": self.model.text.num_ids}
        noise = rounding_noise(self._trainer.model, pairs, **asked, dtype=self.dtype)
        return found, tolerance_of(noise, dtype_name(self.dtype))

    def _read_by_loss(self, pairs: Sequence[Pair], temperature: float) -> Logprobs:
        """Log-probs as the loss reads them: sequences side by side, as train cuts them, with gradients."""
        runtime, trainer = self.case.recipe.runtime, self._trainer
        lengths = [len(prompt) + len(completion) for prompt, completion in pairs]
        found: dict[int, npt.NDArray[np.float64]] = {}
        trainer.begin()
        for indices in batches_by_tokens(lengths, runtime.train_tokens):
            prompts, completions = zip(*(pairs[index] for index in indices), strict=True)
            batch = make_batch(prompts, completions, device=self.case.device)
            loss = _Reading(batch, temperature, runtime.head_chunk_tokens)
            trainer.accumulate(batch, loss)
            read_N = loss.read_N.double().cpu().numpy()
            found |= zip(indices, np.split(read_N, np.cumsum(batch.counts)[:-1]), strict=True)
        trainer.end()
        return [found[index] for index in range(len(pairs))]

    @cached_property
    def _passed(self) -> Passed:
        """The trainer's forward of what the student sampled."""
        return self.forward(self.pairs(self.problems), self.case.recipe.rollout.temperature)

    def findings(self) -> Iterator[Finding]:
        name = self.model.name
        yield found("prompt", name, lambda: texts.prompt(self.model.text, self.problems))
        yield found("context", name, self._context)
        yield found("load", name, lambda: self.case.load(self.model))
        yield found("sampler", name, self._sampler)
        yield found("loss", name, self._loss)
        if self.case.depth == "full":
            yield found("reload", name, self._reload)

    def _context(self) -> Outcome:
        text, settings = self.model.text, self.case.recipe.student
        limit = context_of(self.model.source)
        return self.case.context(PromptReader("the student", settings, limit, text, text.prompt))

    def _sampler(self) -> Outcome:
        temperature = self.case.recipe.rollout.temperature
        drawn = [np.asarray(one.logprobs, np.float64) for one in self.completions.values()]
        return engines.sampler(drawn, self._passed, temperature=temperature)

    def _loss(self) -> Outcome:
        temperature, pairs = self.case.recipe.rollout.temperature, self.pairs(self.problems)
        model, num_ids = self._trainer.model, self.model.text.num_ids
        with computing_in(self.dtype, model):
            plain = [logprobs_of(model, pair, temperature=temperature, num_ids=num_ids)[0] for pair in pairs]
        read = self._read_by_loss(pairs, temperature)
        return engines.trained(read, (plain, self._passed[1]), temperature=temperature)

    def _reload(self) -> Outcome:
        own, num_ids = self.model.source, self.model.text.num_ids
        pairs = self.references(self.problems[:2])
        self.case.rest(self.model)
        wanted = self.case.plain(self.model, own, num_ids)(pairs, 1.0)
        for share in SHARES:
            other = self._other(share)
            wanted_other = self.case.plain(self.model, other, num_ids)(pairs, 1.0)
            if engines.apart(wanted, wanted_other) <= MOST_MOVED:
                break
        scorer = self.scorer(self.model, temperature=1.0)
        return engines.reload(scorer, other, pairs, wanted=wanted, wanted_other=wanted_other)

    def scorer(self, model: ModelHandle, *, temperature: float) -> Scorer:
        """The student's weights, scored by the engine of `model`."""
        own = replace(model, source=self.model.source)
        return Scorer(own, temperature, self.model.text.num_ids)

    def references(self, problems: Sequence[Problem]) -> list[Pair]:
        """The student's prompts of the problems with the beginning of their reference solutions.

        Where there is none, of the question again: these probes need text, whoever wrote it.
        """
        text = self.model.text
        solved = [replace(problem, solution=problem.solution or problem.question) for problem in problems]
        return [(text.prompt(p), text.reference(p)[:_REFERENCE_TOKENS]) for p in solved]

    def _other(self, share: float) -> ModelSource:
        """A model of the student's sizes with other weights: another adapter where that is what changes."""
        source, lora = self.model.source, self.case.recipe.student.lora
        name = f"other weights {share:g}"
        folder, digest = self.case.folder / name, f"{name} than {self.model.source.digest}"
        if lora is None:
            perturb(source, folder, dtype=self.dtype, share=share)
            return replace(source, folder=folder, digest=digest)
        network = self._network(self.dtype)
        start_adapter(network, lora, seed=0)
        with torch.no_grad():
            for weight in network.parameters():
                if weight.requires_grad:
                    weight.add_(share * weight.std() if weight.any() else 0.1 * share)
        write_adapter(network, folder)
        return replace(source, adapter=AdapterSource(folder, digest))
