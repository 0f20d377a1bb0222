"""The engine that runs transformers models in this process: batches, sampling loop, scores.

What is sampled depends on the requests beside it only through floating-point rounding; equal requests in
equal order give equal results bit for bit on one machine.

Shapes: B rows (completions being sampled), T steps, V ids in use, H hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from transformers import PreTrainedModel

from kdpipe.engines.hf.choice import Decoding, decoding_of
from kdpipe.engines.hf.decoding import Decoder
from kdpipe.engines.hf.sampling import draw, uniforms
from kdpipe.engines.limits import NOT_FINITE_HINT, Limits, require_sampling, require_scoring
from kdpipe.engines.protocol import (
    Completion,
    Progress,
    SampleRequest,
    Sampling,
    ScoreRequest,
    Scoring,
    TokenScores,
)
from kdpipe.errors import EngineError
from kdpipe.models.batching import batches_by_tokens, make_batch
from kdpipe.models.cache import ModelCache
from kdpipe.models.config import context_of
from kdpipe.models.logprobs import Head, HeadScores, head_of, hidden_states, logits_of, score_tokens
from kdpipe.models.source import ModelSource
from kdpipe.models.tokenizer import open_tokenizer
from kdpipe.recipe.runtime import Runtime
from kdpipe.recipe.section import ENGINE_ABILITIES

_PROGRESS_STEPS = 32
_COMPACT_BELOW = 0.75


@dataclass(frozen=True, slots=True)
class _Draw:
    """One completion to sample: the request and the place in it, its seed and its prompt."""

    request: int
    sample: int
    seed: int
    prompt: Sequence[int]


class HfEngine:
    """Samples and scores with the models of a cache, on its device, within `runtime`'s token limits."""

    abilities = ENGINE_ABILITIES["hf"]

    def __init__(self, models: ModelCache, runtime: Runtime) -> None:
        self._models = models
        self._runtime = runtime
        self._model: PreTrainedModel | None = None
        self._source: ModelSource | None = None

    def load(self, source: ModelSource) -> str | None:
        """See Engine. Asks the cache every time: a version in memory may have been withdrawn since."""
        self._model = None  # so that the cache can let go of it before it opens another
        model = self._models.get(source)
        warning = decoding_of(model).warning
        self._model, self._source = model, source
        return warning and f"{type(model).__name__}: {warning}"

    @torch.inference_mode()
    def sample(
        self, requests: Sequence[SampleRequest], sampling: Sampling, *, progress: Progress
    ) -> list[list[Completion]]:
        model, source = self._loaded()
        require_sampling(requests, sampling, _limits(model))
        rows = [
            _Draw(index, sample, seed, request.prompt_token_ids)
            for index, request in enumerate(requests)
            for sample, seed in enumerate(request.seeds)
        ]
        ends = _Ends(sampling, source, device=self._models.device)
        completions: dict[int, Completion] = {}
        head, decoding = head_of(model, num_ids=sampling.num_ids), decoding_of(model)
        for places in self._sample_batches(decoding, rows, new_tokens=sampling.max_new_tokens):
            batch = [rows[place] for place in places]
            decoder = decoding.decoder(model, max_new_tokens=sampling.max_new_tokens)
            drawn = self._sample_rows(decoder, head, batch, sampling, ends, progress=progress)
            completions |= zip(places, drawn, strict=True)
        in_order = (completions[place] for place in range(len(rows)))
        return [[next(in_order) for _ in request.seeds] for request in requests]

    @torch.inference_mode()
    def score(
        self, requests: Sequence[ScoreRequest], scoring: Scoring, *, progress: Progress
    ) -> list[TokenScores]:
        model, _ = self._loaded()
        require_scoring(requests, scoring, _limits(model))
        head = head_of(model, num_ids=scoring.num_ids)
        lengths = [
            len(request.prompt_token_ids) + len(request.completion_token_ids) - 1 for request in requests
        ]
        results: dict[int, TokenScores] = {}
        for indexes in batches_by_tokens(lengths, self._runtime.score_tokens):
            asked = [requests[index] for index in indexes]
            batch = make_batch(
                [request.prompt_token_ids for request in asked],
                [request.completion_token_ids for request in asked],
                device=self._models.device,
            )
            hidden_NH = hidden_states(model, batch)
            scored = [token for request in asked for token in request.scored_ids]
            given = [request.support_ids for request in asked if request.support_ids is not None]
            supports = torch.from_numpy(np.concatenate(given)).to(self._models.device) if given else None
            scores = score_tokens(
                hidden_NH,
                head,
                torch.tensor(scored, dtype=torch.long, device=self._models.device),
                temperature=scoring.temperature,
                top_k=scoring.top_k,
                chunk=self._runtime.head_chunk_tokens,
                support_ids_NS=supports,
            )
            kept_NH = hidden_NH if scoring.hidden else None
            results |= zip(indexes, _split(scores, kept_NH, batch.counts, indexes), strict=True)
            progress(len(batch.target_ids_N))
        return [results[index] for index in range(len(requests))]

    def sleep(self) -> None:
        self._model = self._source = None
        self._models.clear()
        if self._models.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        self.sleep()

    def _loaded(self) -> tuple[PreTrainedModel, ModelSource]:
        if self._model is None or self._source is None or not self._models.holds(self._source):
            raise EngineError(
                "no model is loaded: call load first, also after sleep and where a trainer withdrew the weights"
            )
        return self._model, self._source

    def _sample_batches(
        self, decoding: Decoding, rows: Sequence[_Draw], *, new_tokens: int
    ) -> list[list[int]]:
        """Places in `rows`, within the token budget, longest prompts first, a request's side by side."""
        lengths = [len(row.prompt) + new_tokens for row in rows]
        batches = batches_by_tokens(lengths, self._runtime.sample_tokens)
        if decoding.takes_unlike:
            return batches
        return [list(group) for batch in batches for _, group in groupby(batch, key=lengths.__getitem__)]

    def _sample_rows(
        self,
        decoder: Decoder,
        head: Head,
        rows: Sequence[_Draw],
        sampling: Sampling,
        ends: _Ends,
        *,
        progress: Progress,
    ) -> list[Completion]:
        """Completions of one batch of rows, in which those of a request stand side by side."""
        prompts = {row.request: row.prompt for row in rows}  # in the order of the rows
        repeats = Counter(row.request for row in rows)
        ledger = _Ledger(rows, sampling, device=self._models.device)
        hidden_HB = decoder.prefill(
            list(prompts.values()), list(repeats.values()), max_tokens=self._runtime.score_tokens
        )
        count = 0  # of tokens that are not yet reported
        for step in range(sampling.max_new_tokens):
            logits_BV = _logits(hidden_HB, head)
            ids_B, logprobs_B = draw(logits_BV, ledger.uniforms_BT[:, step], sampling=sampling)
            count += ledger.num_alive
            ledger.write(step, ids_B, logprobs_B, logits_BV.sum(-1))
            ledger.end(step, ends.reached(ids_B, ledger, step))
            last = ledger.num_alive == 0 or step + 1 == sampling.max_new_tokens
            if last or (step + 1) % _PROGRESS_STEPS == 0:
                ledger.require_finite(step)
                progress(count)
                count = 0
            if last:
                break
            if ledger.num_alive <= _COMPACT_BELOW * len(ids_B):
                kept = ledger.compact()
                decoder.keep(kept)
                ids_B = ids_B[kept]
            hidden_HB = decoder.step(ids_B)
        return ledger.completions()


class _Ledger:
    """What the rows of a batch have drawn, and which of them still run.

    `owner_B`, `uniforms_BT` and `alive_B` follow the decoder's rows as they are compacted; the rest keeps
    all rows of the batch.
    """

    def __init__(self, rows: Sequence[_Draw], sampling: Sampling, *, device: torch.device) -> None:
        shape = (len(rows), sampling.max_new_tokens)
        self._rows = rows
        self.owner_B = torch.arange(len(rows), device=device)
        self.alive_B = torch.ones(len(rows), dtype=torch.bool, device=device)
        drawn = uniforms([row.seed for row in rows], sampling.max_new_tokens)
        self.uniforms_BT = torch.from_numpy(drawn).to(device)
        self.num_alive = len(rows)
        self.ids_BT = torch.zeros(shape, dtype=torch.long, device=device)
        self._logprobs_BT = torch.zeros(shape, device=device)
        self._checks_BT = torch.zeros(shape, device=device)
        self._lengths_B = torch.full((len(rows),), sampling.max_new_tokens, device=device)
        self._stopped_B = torch.zeros(len(rows), dtype=torch.bool, device=device)

    def write(
        self, step: int, ids_B: torch.Tensor, logprobs_B: torch.Tensor, logit_sums_B: torch.Tensor
    ) -> None:
        """Notes what was drawn at this step; a sum of logits is finite only if all of them are."""
        self.ids_BT[self.owner_B, step] = ids_B
        self._logprobs_BT[self.owner_B, step] = logprobs_B.float()
        self._checks_BT[self.owner_B, step] = logit_sums_B.float()

    def end(self, step: int, reached_B: torch.Tensor) -> None:
        """Ends the rows that have reached an end with this step's token."""
        newly_B = reached_B & self.alive_B
        if not newly_B.any():
            return
        owners = self.owner_B[newly_B]
        self._lengths_B[owners] = step + 1
        self._stopped_B[owners] = True
        self.alive_B = self.alive_B & ~newly_B
        self.num_alive -= len(owners)

    def compact(self) -> torch.Tensor:
        """Leaves the running rows only; returns which of the former rows they are."""
        kept = self.alive_B.nonzero().squeeze(-1)
        self.owner_B, self.alive_B = self.owner_B[kept], self.alive_B[kept]
        self.uniforms_BT = self.uniforms_BT[kept]
        return kept

    def require_finite(self, step: int) -> None:
        """Raises EngineError when a running row has met logits that are not finite."""
        steps = torch.arange(step + 1, device=self._lengths_B.device)
        bad = ~self._checks_BT[:, : step + 1].isfinite() & (steps < self._lengths_B[:, None])
        if bad.any():
            row, token = bad.nonzero()[0].tolist()
            raise EngineError(
                f"sample {self._rows[row].sample}: logits at completion token {token} are not finite",
                hint=NOT_FINITE_HINT,
                request=self._rows[row].request,
            )

    def completions(self) -> list[Completion]:
        lists = zip(
            self.ids_BT.tolist(),
            self._logprobs_BT.tolist(),
            self._lengths_B.tolist(),
            self._stopped_B.tolist(),
            strict=True,
        )
        return [
            Completion(ids[:length], logprobs[:length], "stop" if stopped else "length")
            for ids, logprobs, length, stopped in lists
        ]


class _Ends:
    """Tells which rows have just drawn an end id or completed a stop string."""

    def __init__(self, sampling: Sampling, source: ModelSource, *, device: torch.device) -> None:
        self._is_end_V = torch.zeros(sampling.num_ids, dtype=torch.bool, device=device)
        self._is_end_V[[token for token in sampling.end_ids if token < sampling.num_ids]] = True
        self._stop = sampling.stop
        trust = source.trust_remote_code
        self._tokenizer = open_tokenizer(source.folder, trust_remote_code=trust) if sampling.stop else None
        # A byte needs one token at most; a few more, as decoders strip spaces in front.
        self._window = max((len(text.encode()) for text in sampling.stop), default=0) + 8

    def reached(self, ids_B: torch.Tensor, ledger: _Ledger, step: int) -> torch.Tensor:
        """Bool [B]: the rows whose completion is over with this step's token."""
        reached_B = self._is_end_V[ids_B]
        if self._tokenizer is None:
            return reached_B
        tails = ledger.ids_BT[ledger.owner_B, max(0, step + 1 - self._window) : step + 1].tolist()
        texts = self._tokenizer.batch_decode(
            tails, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        hits = [any(stop in text for stop in self._stop) for text in texts]
        return reached_B | torch.tensor(hits, device=ids_B.device)


def _logits(hidden_HB: torch.Tensor, head: Head) -> torch.Tensor:
    """Logits [B, V] over the ids in use, float32 or float64."""
    products_VB = torch.mm(head.weight_VH, hidden_HB)
    if head.bias_V is not None:
        products_VB += head.bias_V[:, None]
    products_BV = products_VB.t().contiguous()
    if head.low_rank is not None:
        products_BV = products_BV + head.low_rank.products(hidden_HB.t())
    return logits_of(products_BV, head)


def _split(
    scores: HeadScores, hidden_NH: torch.Tensor | None, counts: Sequence[int], indexes: Sequence[int]
) -> list[TokenScores]:
    """Scores of a batch, cut into those of its sequences; raises EngineError on non-finite logits."""
    finite = torch.split(scores.finite_N, list(counts))
    for index, finite_C in zip(indexes, finite, strict=True):
        if not finite_C.all():
            token = int((~finite_C).nonzero()[0])
            raise EngineError(
                f"logits at completion token {token} are not finite", hint=NOT_FINITE_HINT, request=index
            )
    columns = {"logprobs": scores.logprobs_N.float()}
    if scores.topk_ids_NS.shape[-1]:
        columns["topk_ids"] = scores.topk_ids_NS.int()
        columns["topk_logprobs"] = scores.topk_logprobs_NS.float()
        columns["tail_logprobs"] = scores.tail_logprobs_N.float()
    if hidden_NH is not None:
        columns["hidden"] = hidden_NH.float()
    pieces = zip(*(torch.split(column.cpu(), list(counts)) for column in columns.values()), strict=True)
    return [
        TokenScores(**{name: part.numpy() for name, part in zip(columns, parts, strict=True)})
        for parts in pieces
    ]


def _limits(model: PreTrainedModel) -> Limits:
    """How many tokens the model holds, and the ids that it has rows for."""
    return Limits(context_of(model.config), model.get_output_embeddings().weight.shape[0])
