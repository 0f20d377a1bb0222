"""How fast vLLM samples beside the hf engine, on the same prompts in one run; prints one JSON line.

python benchmarks/engines.py /path/to/model [--prompts 64] [--prompt-tokens 100] [--new-tokens 64] [--threads N]

Prompts are random ids and no id ends a completion, so both engines do the same work token for token. Starting vLLM and
loading the model are not in the rates; `start_seconds` tells what they take.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from study import commit

from kdpipe.engines.hf.engine import HfEngine
from kdpipe.engines.protocol import Engine, SampleRequest, Sampling, ScoreRequest, Scoring
from kdpipe.engines.vllm.engine import VllmEngine
from kdpipe.models.cache import ModelCache
from kdpipe.models.devices import dtype_name, resolve_device, resolve_dtype
from kdpipe.models.folder import read_architecture
from kdpipe.models.source import ModelSource
from kdpipe.recipe.runtime import Runtime, Vllm


def main() -> None:
    arguments = parse_arguments()
    device = resolve_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    source = ModelSource(arguments.model, "benchmark")
    num_ids = read_architecture(arguments.model).rows
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.prompts, arguments.prompt_tokens)
    prompts = torch.randint(num_ids // 10, num_ids, shape, generator=generator).tolist()
    requests = [SampleRequest(ids, (seed,)) for seed, ids in enumerate(prompts)]
    sampling = Sampling(1.0, arguments.new_tokens, (), num_ids)
    engines: dict[str, Engine] = {
        "vllm": VllmEngine(
            Runtime(
                vllm=Vllm(max_model_len=arguments.prompt_tokens + arguments.new_tokens),
                threads=arguments.threads,
            ),
            device=device,
        ),
        "hf": HfEngine(ModelCache(device), Runtime()),
    }
    results: dict[str, object] = {
        "benchmark": "engines",
        "commit": commit(),
        "model": arguments.model.name,
        "device": str(device),
        "dtype": dtype_name(resolve_dtype(source.dtype, device)[0]),
        "threads": torch.get_num_threads(),
        **{key: vars(arguments)[key] for key in ("prompts", "prompt_tokens", "new_tokens")},
    }
    rates = {name: measure(engine, source, requests, sampling) for name, engine in engines.items()}
    for name, found in rates.items():
        results |= {f"{name}_{key}": value for key, value in found.items()}
    for key in ("sample_tokens_per_second", "score_tokens_per_second"):
        results[f"ratio_{key}"] = round(rates["vllm"][key] / rates["hf"][key], 2)
    print(json.dumps(results))


def measure(
    engine: Engine, source: ModelSource, requests: list[SampleRequest], sampling: Sampling
) -> dict[str, float]:
    """Completion tokens per second, sampled and scored, after a request that warms up."""
    start = timed(lambda: engine.load(source))
    engine.sample(requests[:1], Sampling(1.0, 1, (), sampling.num_ids), progress=lambda _: None)
    drawn = []
    seconds = timed(lambda: drawn.extend(engine.sample(requests, sampling, progress=lambda _: None)))
    pairs = [
        ScoreRequest(request.prompt_token_ids, completion.token_ids)
        for request, (completion,) in zip(requests, drawn, strict=True)
    ]
    tokens = sum(len(pair.completion_token_ids) for pair in pairs)
    score = timed(
        lambda: engine.score(
            pairs, Scoring(temperature=1.0, num_ids=sampling.num_ids), progress=lambda _: None
        )
    )
    engine.close()
    return {
        "start_seconds": round(start, 1),
        "sample_tokens_per_second": round(tokens / seconds, 1),
        "score_tokens_per_second": round(tokens / score, 1),
    }


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()
