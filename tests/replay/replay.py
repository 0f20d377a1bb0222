"""A run, computed again from its files: prompts, log-probs, grades, advantages, losses, gradients, steps, weights.

Nothing of kdpipe is imported. Each round begins with what is stored, so that differences do not add up, and its loss
reads the stored log-probs of sampler and teacher, each of which is compared with an own one before.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer

from tests.replay import student, text
from tests.replay.difference import Differences
from tests.replay.forward import Network, of_tokens
from tests.replay.objective import Sample, has_kd, prepare
from tests.replay.optimizer import AdamW, gradients_of, norm_of
from tests.replay.reading import Run, key
from tests.replay.rollouts import compare_rollouts
from tests.replay.steps import compare_steps, compare_updates
from tests.replay.teacher import Scores, stored_scores
from tests.replay.view import Round, tensor


def replay(run: Run) -> Differences:
    """The largest differences between what the run stored and what is computed here."""
    found = Differences()
    if run.recipe["student"]["sft"]:
        compare_cold_start(run, found)
    for number in range(1, run.recipe["rounds"] + 1):
        view = Round(run, number)
        compare_rollouts(view, found)
        samples = samples_of(view, found)
        prepare(view.objective, samples)
        compare_steps(view, samples, found)
    return found


def samples_of(view: Round, found: Differences) -> list[Sample]:
    """The completions as train reads them."""
    scores = stored_scores(view, found) if has_kd(view.objective) else {}
    result = []
    for row in view.rollouts:
        ids, p = row["completion_token_ids"], view.proximal[key(row)]
        found.note("log-probs", p, of_tokens(view.trained_from(row), ids))
        scored = scores.get(key(row)) or Scores(p, torch.ones(len(ids), dtype=torch.bool))
        is_sampled = row["source"] == "student"
        result.append(
            Sample(
                prompt_id=row["prompt_id"],
                prompt=row["prompt_token_ids"],
                ids=ids,
                is_sampled=is_sampled,
                is_cut=row["finish_reason"] == "length",
                correct=bool(row["correct"]),
                reward=row["reward"] or 0.0,
                behaviour=tensor(row["sampler_logprobs"]) if is_sampled else torch.full_like(p, torch.nan),
                proximal=p,
                teacher=scored.q,
                scorable=scored.scorable,
                supports=scored.supports,
            )
        )
    return result


def compare_cold_start(run: Run, found: Differences) -> None:
    """The steps on reference solutions before round 1: cross-entropy at temperature 1."""
    section, folder = run.recipe["student"]["sft"], run.beside_recipe(run.recipe["student"]["model"])
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    network = Network(folder, len(tokenizer))
    optimizer = AdamW(section["optimizer"], section["steps"], 0, {}, {})
    weights, loss, gradients = network.weights, torch.zeros(()), network.weights
    for problems in text.batches(run.problems()[: section["problems"]], section, run.recipe["seed"]):
        learning = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        values = []
        for problem in problems:
            prompt = text.render(tokenizer, run.recipe["task"], problem)
            ids = text.reference(tokenizer, problem)
            values.append(-of_tokens(network.logits(prompt, ids, learning).log_softmax(-1), ids))
        loss = torch.cat(values).mean()
        gradients = gradients_of(loss, learning)
        weights = optimizer.update(weights, gradients)
    last = {name: value for (_, name), value in run.metrics(0, "sft-student").items()}
    found.note("loss", last["sft/loss"], loss)
    found.note("gradient norm", last["sft/grad_norm"], norm_of(gradients), relative=True)
    compare_updates(network.weights, weights, student.trained(run, 0), found)
