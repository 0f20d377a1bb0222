"""Memory and disk of training a LoRA adapter beside training all weights; prints one JSON line.

python benchmarks/lora_memory.py [--layers 10] [--hidden-size 512] [--rank 16]

A random float32 Llama is written once. Then each way of training takes one optimizer step on a few sequences in a
process of its own, alone and with student 0 as the teacher `self: initial` scoring them before. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from study import ROOT, commit

from kdpipe.data.tasks.arithmetic import words
from kdpipe.engines.hf.engine import HfEngine
from kdpipe.engines.protocol import ScoreRequest, Scoring
from kdpipe.models.adapters import start_adapter
from kdpipe.models.batching import make_batch
from kdpipe.models.cache import ModelCache
from kdpipe.models.folder import open_model, scratch_model, write_model
from kdpipe.models.logprobs import Head, token_logprobs
from kdpipe.models.source import ModelSource
from kdpipe.models.tokenizer import arithmetic_tokenizer, open_tokenizer
from kdpipe.recipe.models import Lora, Optimizer, Scratch
from kdpipe.recipe.runtime import Runtime
from kdpipe.training.local import LocalTrainer

NUM_IDS = 4096
CPU = torch.device("cpu")
WAYS = ("full", "lora")


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = write_base(arguments, folder / "base")
        found = {
            f"{way}{' with self: initial' if teacher else ''}": in_a_process(arguments, folder, way, teacher)
            for teacher in (False, True)
            for way in WAYS
        }
    settings = ("layers", "hidden_size", "rank", "sequences", "tokens")
    line = {
        "benchmark": "lora memory",
        "commit": commit(),
        **{key: vars(arguments)[key] for key in settings},
        "parameters": parameters,
        "base_mib": round(parameters * 4 / 2**20, 1),
        **found,
        "wall_seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(line))


def write_base(arguments: argparse.Namespace, folder: Path) -> int:
    """Writes the model; returns the number of its weights."""
    settings = Scratch(
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 11 // 4,
        num_layers=arguments.layers,
        num_heads=8,
        num_kv_heads=8,
        max_positions=1024,
    )
    model = scratch_model(settings, num_ids=NUM_IDS, eos_id=1, pad_id=0, seed=0)
    write_model(model, arithmetic_tokenizer(words()), folder)
    return sum(weight.numel() for weight in model.parameters())


def in_a_process(arguments: argparse.Namespace, folder: Path, way: str, teacher: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", way, "--folder", str(folder)]
    for key in ("rank", "sequences", "tokens", "threads"):
        command += [f"--{key}", str(vars(arguments)[key])]
    if teacher:
        command.append("--teacher")
    answer = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(answer.stdout)
    return found


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """One optimizer step: peak resident memory beyond that of the imports, and what is left on disk, in MiB.

    The peaks of loading (the file is mapped beside the weights) and of the step are apart.
    """
    torch.set_num_threads(arguments.threads)
    if arguments.measure == "lora":
        import peft  # noqa: F401
    before = resident("VmRSS")
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.sequences, arguments.tokens)
    rows = torch.randint(NUM_IDS, shape, generator=generator).tolist()
    pairs = [(ids[:8], ids[8:]) for ids in rows]
    cache = ModelCache(CPU)
    source = ModelSource(arguments.folder / "base", "base", dtype="float32")
    if arguments.teacher:
        engine = HfEngine(cache, Runtime())
        engine.load(source)
        engine.score(
            [ScoreRequest(*pair) for pair in pairs],
            Scoring(temperature=1.0, num_ids=NUM_IDS),
            progress=lambda _: None,
        )
    if arguments.measure == "lora":
        model = cache.get(source)
        start_adapter(model, Lora(rank=arguments.rank), seed=0)
    else:
        model = open_model(source.folder, dtype=torch.float32, device=CPU)
    at_load = resident("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here
    trainer = LocalTrainer(model, Optimizer(learning_rate=1e-4), num_ids=NUM_IDS, horizon=1)
    batch = make_batch([prompt for prompt, _ in pairs], [rest for _, rest in pairs], device=CPU)

    def loss(hidden_NH: torch.Tensor, head: Head) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logprobs_N, _ = token_logprobs(hidden_NH, head, batch.target_ids_N, temperature=1.0, chunk=512)
        return -logprobs_N.mean(), {}

    trainer.begin()
    trainer.accumulate(batch, loss)
    trainer.apply()
    trainer.end()
    in_step = resident("VmHWM")
    folder = arguments.folder / f"{arguments.measure}-{arguments.teacher}"
    trainer.write_checkpoint(folder, open_tokenizer(source.folder, trust_remote_code=False))
    return {
        "trained_parameters": sum(w.numel() for w in model.parameters() if w.requires_grad),
        "imports_mib": round(before, 1),
        "loading_peak_mib": round(at_load - before, 1),
        "step_peak_mib": round(in_step - before, 1),
        "weights_on_disk_mib": disk(folder / "model"),
        "trainer_on_disk_mib": disk(folder / "trainer"),
    }


def resident(field: str) -> float:
    """MiB of this process by /proc: now (VmRSS), or at its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) / 1024
    raise KeyError(field)


def disk(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20, 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("layers", 10),
        ("hidden-size", 512),
        ("rank", 16),
        ("sequences", 4),
        ("tokens", 64),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--teacher", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
