"""The engine that runs transformers models in this process: batches, sampling loop, scores.

What is sampled depends on the requests beside it only through floating-point rounding; equal requests in
equal order give equal results bit for bit on one machine.

Shapes: B rows (completions being sampled), T steps, V ids in use, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel

from kdpipe.engines.hf.decoding import is_llama_like, make_decoder
from kdpipe.engines.hf.sampling import draw, uniforms
from kdpipe.engines.protocol import Completion, TokenScores, about
from kdpipe.errors import EngineError, ModelError
from kdpipe.models.batching import batches_by_tokens, make_batch
from kdpipe.models.logprobs import Head, HeadScores, head_of, hidden_states, score_tokens
from kdpipe.models.prompting import open_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kdpipe.engines.protocol import Ability, Progress, SampleRequest, Sampling, ScoreRequest, Scoring
    from kdpipe.models.cache import ModelCache
    from kdpipe.models.source import ModelSource

_PROGRESS_STEPS = 32
_COMPACT_BELOW = 0.75


@dataclass(frozen=True, slots=True)
class _Draw:
    """One completion to sample: the request and the place in it, and its seed."""

    request: int
    sample: int
    seed: int


class HfEngine:
    """Samples and scores with the models of a cache, on the cache's device.

    `sample_tokens` bounds the tokens of one sampling batch, prompts and new ones; `score_tokens` those of
    one forward pass; `head_chunk_tokens` those whose logits exist at once.
    """

    abilities: frozenset[Ability] = frozenset({"support", "hidden"})

    def __init__(
        self, models: ModelCache, *, sample_tokens: int, score_tokens: int, head_chunk_tokens: int
    ) -> None:
        self._models = models
        self._sample_tokens = sample_tokens
        self._score_tokens = score_tokens
        self._head_chunk_tokens = head_chunk_tokens
        self._model: PreTrainedModel | None = None
        self._source: ModelSource | None = None

    def load(self, source: ModelSource) -> None:
        """See Engine. Asks the cache every time: a version in memory may have been withdrawn since."""
        self._model = None  # so that the cache can let go of it before it opens another
        self._model = self._models.get(source)
        self._source = source

    @torch.inference_mode()
    def sample(
        self, requests: Sequence[SampleRequest], sampling: Sampling, *, progress: Progress
    ) -> list[list[Completion]]:
        """See Engine."""
        model, _ = self._loaded()
        for index, request in enumerate(requests):
            with about(index):
                _require_fit(model, request.prompt_token_ids, new_tokens=sampling.max_new_tokens)
        _require_ids(model, sampling.num_ids)
        results: dict[tuple[int, int], Completion] = {}
        for rows in self._sample_batches(requests, max_new_tokens=sampling.max_new_tokens):
            prompts = [requests[index].prompt_token_ids for index, _ in _runs(rows)]
            completions = self._sample_rows(rows, prompts, sampling, progress=progress)
            for row, completion in zip(rows, completions, strict=True):
                results[row.request, row.sample] = completion
        return [
            [results[index, sample] for sample in range(len(request.seeds))]
            for index, request in enumerate(requests)
        ]

    @torch.inference_mode()
    def score(
        self, requests: Sequence[ScoreRequest], scoring: Scoring, *, progress: Progress
    ) -> list[TokenScores]:
        """See Engine."""
        model, _ = self._loaded()
        for index, request in enumerate(requests):
            with about(index):
                completion = request.completion_token_ids
                _require_fit(model, request.prompt_token_ids, new_tokens=len(completion))
                _require_known(model, completion)
                _require_known(model, request.scored_ids)
                _require_support(request, scoring.num_ids)
        head = head_of(model, num_ids=_require_ids(model, scoring.num_ids, top_k=scoring.top_k))
        lengths = [
            len(request.prompt_token_ids) + len(request.completion_token_ids) - 1 for request in requests
        ]
        results: dict[int, TokenScores] = {}
        for indexes in batches_by_tokens(lengths, self._score_tokens):
            batch = make_batch(
                [requests[index].prompt_token_ids for index in indexes],
                [requests[index].completion_token_ids for index in indexes],
                device=self._models.device,
            )
            hidden_NH = hidden_states(model, batch)
            scored = [token for index in indexes for token in requests[index].scored_ids]
            scores = score_tokens(
                hidden_NH,
                head,
                torch.tensor(scored, dtype=torch.long, device=self._models.device),
                temperature=scoring.temperature,
                top_k=scoring.top_k,
                chunk=self._head_chunk_tokens,
                support_ids_NS=self._supports([requests[index] for index in indexes]),
            )
            kept_NH = hidden_NH if scoring.hidden else None
            results |= zip(indexes, _split(scores, kept_NH, batch.counts, indexes), strict=True)
            progress(len(batch.target_ids_N))
        return [results[index] for index in range(len(requests))]

    def _supports(self, requests: Sequence[ScoreRequest]) -> torch.Tensor | None:
        """The `support_ids` of all completion tokens of the requests, one after another."""
        given = [request.support_ids for request in requests if request.support_ids is not None]
        return torch.from_numpy(np.concatenate(given)).to(self._models.device) if given else None

    def sleep(self) -> None:
        """See Engine."""
        self._model = self._source = None
        self._models.clear()
        if self._models.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """See Engine."""
        self.sleep()

    def _loaded(self) -> tuple[PreTrainedModel, ModelSource]:
        if self._model is None or self._source is None or not self._models.holds(self._source):
            raise EngineError(
                "no model is loaded: call load first, also after sleep and where a trainer withdrew the weights"
            )
        return self._model, self._source

    def _sample_batches(self, requests: Sequence[SampleRequest], *, max_new_tokens: int) -> list[list[_Draw]]:
        """Rows in batches within the token budget, longest prompts first, a request's rows side by side."""
        model, _ = self._loaded()
        rows = [
            _Draw(index, sample, seed)
            for index, request in enumerate(requests)
            for sample, seed in enumerate(request.seeds)
        ]
        lengths = [len(requests[row.request].prompt_token_ids) + max_new_tokens for row in rows]
        batches = [
            [rows[index] for index in indexes] for indexes in batches_by_tokens(lengths, self._sample_tokens)
        ]
        if is_llama_like(model):
            return batches

        def prompt_tokens(row: _Draw) -> int:
            return len(requests[row.request].prompt_token_ids)

        return [list(group) for batch in batches for _, group in groupby(batch, key=prompt_tokens)]

    def _sample_rows(
        self,
        rows: Sequence[_Draw],
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        progress: Progress,
    ) -> list[Completion]:
        """Completions of one batch of rows; `prompts` are those of its requests, in order."""
        model, source = self._loaded()
        head = head_of(model, num_ids=sampling.num_ids)
        decoder = make_decoder(model, max_new_tokens=sampling.max_new_tokens)
        repeats = [count for _, count in _runs(rows)]
        ledger = _Ledger(rows, sampling, device=self._models.device)
        ends = _Ends(sampling, source, device=self._models.device)
        hidden_HB = decoder.prefill(prompts, repeats, max_tokens=self._score_tokens)
        for step in range(sampling.max_new_tokens):
            logits_BV = _logits(hidden_HB, head)
            ids_B, logprobs_B = draw(logits_BV, ledger.uniforms_BT[:, step], sampling=sampling)
            ledger.write(step, ids_B, logprobs_B, logits_BV.sum(-1))
            ledger.end(step, ends.reached(ids_B, ledger, step))
            last = ledger.num_alive == 0 or step + 1 == sampling.max_new_tokens
            if last or (step + 1) % _PROGRESS_STEPS == 0:
                ledger.require_finite(step)
                progress(ledger.take_count())
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
        self._count = 0

    def write(
        self, step: int, ids_B: torch.Tensor, logprobs_B: torch.Tensor, logit_sums_B: torch.Tensor
    ) -> None:
        """Notes what was drawn at this step; a sum of logits is finite only if all of them are."""
        self.ids_BT[self.owner_B, step] = ids_B
        self._logprobs_BT[self.owner_B, step] = logprobs_B.float()
        self._checks_BT[self.owner_B, step] = logit_sums_B.float()
        self._count += self.num_alive

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

    def take_count(self) -> int:
        """How many tokens were drawn since the last call."""
        count, self._count = self._count, 0
        return count

    def require_finite(self, step: int) -> None:
        """Raises EngineError when a running row has met logits that are not finite."""
        steps = torch.arange(step + 1, device=self._lengths_B.device)
        bad = ~self._checks_BT[:, : step + 1].isfinite() & (steps < self._lengths_B[:, None])
        if bad.any():
            row, token = bad.nonzero()[0].tolist()
            raise EngineError(
                f"sample {self._rows[row].sample}: logits at completion token {token} are not finite",
                hint="the weights hold nan, inf or values too large for the dtype; try dtype: float32",
                request=self._rows[row].request,
            )

    def completions(self) -> list[Completion]:
        """The completions of all rows."""
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


def _runs(rows: Sequence[_Draw]) -> list[tuple[int, int]]:
    """Requests of the rows, in order, with the number of rows of each."""
    return [(request, len(list(group))) for request, group in groupby(rows, key=lambda row: row.request)]


def _logits(hidden_HB: torch.Tensor, head: Head) -> torch.Tensor:
    """Logits [B, V] over the ids in use, float32 or float64."""
    logits_VB = torch.mm(head.weight_VH, hidden_HB)
    if head.bias_V is not None:
        logits_VB += head.bias_V[:, None]
    logits_BV = logits_VB.t().contiguous()
    return logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()


def _split(
    scores: HeadScores, hidden_NH: torch.Tensor | None, counts: Sequence[int], indexes: Sequence[int]
) -> list[TokenScores]:
    """Scores of a batch, cut into those of its sequences; raises EngineError on non-finite logits."""
    finite = torch.split(scores.finite_N, list(counts))
    for index, finite_C in zip(indexes, finite, strict=True):
        if not finite_C.all():
            token = int((~finite_C).nonzero()[0])
            raise EngineError(
                f"logits at completion token {token} are not finite",
                hint="the weights hold nan, inf or values too large for the dtype; try dtype: float32",
                request=index,
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


def _require_fit(model: PreTrainedModel, ids: Sequence[int], *, new_tokens: int) -> None:
    """Raises ModelError on a prompt that is too long, EngineError on an empty one or foreign ids."""
    if not ids:
        raise EngineError("its prompt is empty, so nothing predicts the first token")
    limit = model.config.max_position_embeddings
    if len(ids) + new_tokens > limit:
        what = f"{len(ids)} prompt tokens and {new_tokens} completion tokens"
        raise ModelError(
            f"{what} do not fit the model's context of {limit}",
            hint="lower max_new_tokens, drop long prompts, or take a model with a longer context",
        )
    _require_known(model, ids)


def _require_known(model: PreTrainedModel, ids: Sequence[int]) -> None:
    if not ids:
        return
    rows = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= rows or min(ids) < 0:
        raise EngineError(f"token ids reach from {min(ids)} to {max(ids)}, the model has {rows}")


def _require_support(request: ScoreRequest, num_ids: int) -> None:
    ids = request.support_ids
    if ids is None or not ids.size:
        return
    if len(ids) != len(request.completion_token_ids):
        raise EngineError(f"support_ids for {len(ids)} of {len(request.completion_token_ids)} tokens")
    if ids.max() >= num_ids or ids.min() < 0:
        raise EngineError(f"support_ids reach from {ids.min()} to {ids.max()}, {num_ids} ids are in use")


def _require_ids(model: PreTrainedModel, num_ids: int, *, top_k: int = 0) -> int:
    rows = model.get_output_embeddings().weight.shape[0]
    if not 0 < num_ids <= rows:
        raise EngineError(f"{num_ids} ids in use, but the model's output head has {rows} rows")
    if not 0 <= top_k <= num_ids:
        raise EngineError(f"top_k is {top_k}, but there are {num_ids} ids in use")
    return num_ids
