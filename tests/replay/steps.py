"""The optimizer steps of a round: which completions each saw, its loss, its gradient, and the weights it left."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence

import torch

from tests.replay import student, text
from tests.replay.difference import Differences
from tests.replay.forward import logprobs
from tests.replay.objective import Sample, Step, baselines, distill_weight, subtracts
from tests.replay.optimizer import AdamW, flat, gradients_of, norm_of
from tests.replay.reading import Record, Run, Tensors, key, read_tensors
from tests.replay.view import Round


def compare_steps(view: Round, samples: Sequence[Sample], found: Differences) -> None:
    by_key = {key(row): sample for row, sample in zip(view.rollouts, samples, strict=True)}
    for row in view.completions:
        found.note("advantage", row["advantage"] or 0.0, by_key[key(row)].advantage)
        found.require(row["kept"], bool(by_key[key(row)].kept(view.objective).any()))
    if view.weights is None:
        return
    optimizer = AdamW(
        view.recipe["train"]["optimizer"],
        rate_horizon(view.recipe),
        steps_taken(view.run, view.number - 1),
        *student.moments(view.run, view.number - 1),
    )
    of_group = baselines_of(view, "group", samples, [sample.prompt_id for sample in samples])
    weights, plan = view.weights, planned(view)
    for place, (epoch, indices) in enumerate(plan):
        number = (view.number - 1) * len(plan) + place + 1
        stored = [key(row) for row in view.completions if row["optimizer_step"] == number]
        found.require(stored, [key(view.rollouts[index]) for index in indices])
        found.require({row["epoch"] for row in view.completions if row["optimizer_step"] == number}, {epoch})
        chosen = [samples[index] for index in indices]
        of_step = baselines_of(view, "step", chosen, [0] * len(chosen))
        baseline = [of_step[n] + of_group[index] for n, index in enumerate(indices)]
        weights = take(view, Taking(number, chosen, baseline), optimizer, weights, found)
    compare_what_is_left(view, weights, optimizer, found)


def planned(view: Round) -> list[tuple[int, list[int]]]:
    """The epoch of each optimizer step and the places of its completions."""
    train, found = view.recipe["train"], []
    names = [f"{row['prompt_id']}/{row['sample']}" for row in view.rollouts]
    for epoch in range(train["epochs"]):
        order = text.order(names, view.recipe["seed"], "train", view.number, epoch)
        ends = [len(order) * n // train["minibatches"] for n in range(train["minibatches"] + 1)]
        found += [(epoch, order[start:end]) for start, end in itertools.pairwise(ends)]
    return found


def baselines_of(view: Round, scope: str, samples: Sequence[Sample], groups: Sequence[object]) -> list[float]:
    """0 where the objective does not subtract that one."""
    if not subtracts(view.objective, scope):
        return [0.0] * len(samples)
    return baselines(view.objective, samples, groups)


class Taking:
    """Optimizer step `number` of the run, its samples and their baselines."""

    def __init__(self, number: int, samples: Sequence[Sample], baseline: Sequence[float]) -> None:
        self.number, self.samples, self.baseline = number, samples, baseline


def take(view: Round, taking: Taking, optimizer: AdamW, weights: Tensors, found: Differences) -> Tensors:
    """The weights after one optimizer step, whose metrics are compared."""
    objective = dict(view.objective)
    objective["distill_weight"] = distill_weight(objective, optimizer.step, weight_horizon(view.recipe))
    step = Step(objective, taking.samples, view.recipe["rollout"]["max_new_tokens"], taking.baseline)
    learning = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    now = [
        logprobs(view.policy.logits(sample.prompt, sample.ids, learning), view.temperature)
        for sample in taking.samples
    ]
    loss = step.loss(now)
    gradients = gradients_of(loss, learning)
    metrics = {name: value for (at, name), value in view.metrics.items() if at == taking.number}
    found.note("loss", metrics["train/loss"], loss)
    found.note("schedules", metrics["train/learning_rate"], optimizer.rate())
    if "train/distill_weight" in metrics:
        found.note("schedules", metrics["train/distill_weight"], objective["distill_weight"])
    is_skipped = step.is_rounding(now)
    found.require("train/skipped" in metrics, is_skipped)
    if is_skipped:
        return weights
    found.note("gradient norm", metrics["train/grad_norm"], norm_of(gradients), relative=True)
    return optimizer.update(weights, gradients)


def compare_what_is_left(view: Round, weights: Tensors, optimizer: AdamW, found: Differences) -> None:
    """Weights, moments, the number of steps taken, and the average of students."""
    assert view.weights is not None
    run, number = view.run, view.number
    stored = student.trained(run, number)
    compare_updates(view.weights, weights, stored, found)
    for own, kept in zip((optimizer.first, optimizer.second), student.moments(run, number), strict=True):
        found.note("moments", flat(kept), flat(own), relative=True)
    found.require(steps_taken(run, number), optimizer.step)
    for teacher in view.recipe["teachers"]:
        if teacher["self"] == "ema":
            old, new = (
                read_tensors(student.teacher_folder(run, teacher, round_)) for round_ in (number, number + 1)
            )
            decay = teacher["decay"]
            own = {name: decay * old[name] + (1 - decay) * stored[name] for name in old}
            found.note("average", flat(new), flat(own))


def compare_updates(before: Tensors, own: Tensors, stored: Tensors, found: Differences) -> None:
    """How far the weights moved, by the largest move and by the direction of all."""
    moved, expected = flat(stored) - flat(before), flat(own) - flat(before)
    found.note("weights", moved, expected, relative=True)
    if bool(expected.any()):
        found.note("direction", 1 - float(torch.cosine_similarity(moved, expected, dim=0)), 0.0)


def steps_taken(run: Run, number: int) -> int:
    """Optimizer steps from the start of the run to the end of round `number`."""
    if number == 0:
        return 0
    state = json.loads((run.step(number, "train/trainer") / "trainer.json").read_text())
    return int(state["optimizer_step"])


def rate_horizon(recipe: Mapping[str, Record]) -> int:
    """Optimizer steps over which the learning rate moves."""
    train = recipe["train"]
    rounds = train["optimizer"]["schedule_rounds"] or recipe["rounds"]
    return int(rounds * train["minibatches"] * train["epochs"])


def weight_horizon(recipe: Mapping[str, Record]) -> int:
    """Optimizer steps over which the distill weight moves."""
    train = recipe["train"]
    rounds = train["objective"]["distill_schedule"]["rounds"] or train["objective"]["kd_rounds"]
    return int((rounds or recipe["rounds"]) * train["minibatches"] * train["epochs"])
