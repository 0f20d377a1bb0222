"""How fast the hf engine samples and scores, beside transformers' own `generate`; prints one JSON line.

python benchmarks/sampling.py /path/to/model [--prompts 16] [--prompt-tokens 100] [--new-tokens 64]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kdpipe.engines.hf.engine import HfEngine
from kdpipe.engines.protocol import Completion, SampleRequest, Sampling, ScoreRequest, Scoring
from kdpipe.models.cache import ModelCache
from kdpipe.models.devices import resolve_device
from kdpipe.models.source import ModelSource
from kdpipe.recipe.runtime import Runtime


def main() -> None:
    arguments = parse_arguments()
    device = resolve_device("cpu")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    cache = ModelCache(device)
    engine = HfEngine(cache, Runtime())
    source = ModelSource(arguments.model, "benchmark", dtype="float32")
    engine.load(source)
    model = cache.get(source)
    num_ids = model.get_output_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.prompts, arguments.prompt_tokens)
    # Equally long prompts and no end ids: both sides do the same work, token for token.
    prompts = torch.randint(num_ids // 10, num_ids, shape, generator=generator)
    requests = [SampleRequest(ids, (seed,)) for seed, ids in enumerate(prompts.tolist())]
    sampling = Sampling(1.0, arguments.new_tokens, (), num_ids)
    prefill_only = Sampling(1.0, 1, (), num_ids)

    def nothing(_: int) -> None:
        pass

    results: dict[str, object] = {"benchmark": "sampling", "model": arguments.model.name}
    results |= {"threads": torch.get_num_threads(), **{key: vars(arguments)[key] for key in COUNTS}}
    engine.sample(requests[:1], prefill_only, progress=nothing)
    drawn: list[list[Completion]] = []
    our_prefill = timed(lambda: engine.sample(requests, prefill_only, progress=nothing))
    their_prefill = timed(lambda: generate(model, prompts, 1))

    def sample() -> None:
        drawn[:] = engine.sample(requests, sampling, progress=nothing)

    ours = timed(sample)
    theirs = timed(lambda: generate(model, prompts, arguments.new_tokens))
    pairs = [
        ScoreRequest(request.prompt_token_ids, row[0].token_ids)
        for request, row in zip(requests, drawn, strict=True)
    ]
    score = timed(lambda: engine.score(pairs, Scoring(temperature=1.0, num_ids=num_ids), progress=nothing))
    tokens = arguments.prompts * arguments.new_tokens
    steps = max(arguments.new_tokens - 1, 1)
    results |= {
        "sample_tokens_per_second": round(tokens / ours[0], 1),
        "generate_tokens_per_second": round(tokens / theirs[0], 1),
        "sample_over_generate": round(theirs[0] / ours[0], 2),
        "sample_cpu_seconds": round(ours[1], 2),
        "generate_cpu_seconds": round(theirs[1], 2),
        "sample_step_ms": round(1000 * (ours[0] - our_prefill[0]) / steps, 2),
        "generate_step_ms": round(1000 * (theirs[0] - their_prefill[0]) / steps, 2),
        "sample_step_cpu_ms": round(1000 * (ours[1] - our_prefill[1]) / steps, 2),
        "generate_step_cpu_ms": round(1000 * (theirs[1] - their_prefill[1]) / steps, 2),
        "sample_prefill_seconds": round(our_prefill[0], 3),
        "generate_prefill_seconds": round(their_prefill[0], 3),
        "score_completion_tokens_per_second": round(tokens / score[0], 1),
    }
    print(json.dumps(results))


COUNTS = ("prompts", "prompt_tokens", "new_tokens")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    return parser.parse_args()


def generate(model: torch.nn.Module, prompts: torch.Tensor, new_tokens: int) -> None:
    with torch.no_grad():
        model.generate(  # type: ignore[operator]
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
