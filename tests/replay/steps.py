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
    """All optimizer steps of the round, from the stored weights and moments before it to those after it."""
    by_key = {key(row): sample for row, sample in zip(view.rollouts, samples, strict=True)}
    for row in view.completions:
        found.note("advantage", row["advantage"] or 0.0, by_key[key(row)].advantage)
        found.require(row["kept"], bool(by_key[key(row)].kept(view.objective).any()))
    if view.weights is not None:
        Steps(view, samples, found).compare(view.weights)


class Steps:
    """The steps of one round; `optimizer` goes from one to the next."""

    def __init__(self, view: Round, samples: Sequence[Sample], found: Differences) -> None:
        self.view, self.samples, self.found = view, samples, found
        before = view.number - 1
        taken, moments = steps_taken(view.run, before), student.moments(view.run, before)
        settings = view.recipe["train"]["optimizer"]
        self.optimizer = AdamW(settings, rate_horizon(view.recipe), taken, *moments)

    def compare(self, weights: Tensors) -> None:
        before, plan = weights, planned(self.view)
        for place, (epoch, chosen) in enumerate(plan):
            number = (self.view.number - 1) * len(plan) + place + 1
            rows = [row for row in self.view.completions if row["optimizer_step"] == number]
            expected = [(epoch, key(self.view.rollouts[index])) for index in chosen]
            self.found.require([(row["epoch"], key(row)) for row in rows], expected)
            weights = self.take(number, chosen, weights)
        stored = student.trained(self.view.run, self.view.number)
        compare_updates(before, weights, stored, self.found)
        self.compare_state()
        compare_average(self.view, stored, self.found)

    def take(self, number: int, chosen: Sequence[int], weights: Tensors) -> Tensors:
        """The weights after optimizer step `number` of the run, whose metrics are compared."""
        view, found, optimizer = self.view, self.found, self.optimizer
        weight = distill_weight(view.objective, optimizer.step, weight_horizon(view.recipe))
        objective = {**view.objective, "distill_weight": weight}
        samples = [self.samples[index] for index in chosen]
        step = Step(objective, samples, view.recipe["rollout"]["max_new_tokens"], self.baselines(chosen))
        learning = {name: value.clone().requires_grad_() for name, value in weights.items()}
        now = [
            logprobs(view.policy.logits(sample.prompt, sample.ids, learning), view.temperature)
            for sample in samples
        ]
        loss = step.loss(now)
        gradients = gradients_of(loss, learning)
        metrics = {name: value for (at, name), value in view.metrics.items() if at == number}
        found.note("loss", metrics["train/loss"], loss)
        found.note("schedules", metrics["train/learning_rate"], optimizer.rate())
        found.note("schedules", metrics.get("train/distill_weight", weight), weight)
        is_skipped = step.is_rounding(now)
        found.require("train/skipped" in metrics, is_skipped)
        if is_skipped:
            return weights
        found.note("gradient norm", metrics["train/grad_norm"], norm_of(gradients), relative=True)
        return optimizer.update(weights, gradients)

    def baselines(self, chosen: Sequence[int]) -> list[float]:
        """What is subtracted from the signals of each completion of a step."""
        objective, groups = self.view.objective, [sample.prompt_id for sample in self.samples]
        if subtracts(objective, "group"):
            of_all = baselines(objective, self.samples, groups)
            return [of_all[index] for index in chosen]
        if subtracts(objective, "step"):
            return baselines(objective, [self.samples[index] for index in chosen], [0] * len(chosen))
        return [0.0] * len(chosen)

    def compare_state(self) -> None:
        """The moments, and how many steps were taken."""
        run, number, own = self.view.run, self.view.number, self.optimizer
        for mine, stored in zip((own.first, own.second), student.moments(run, number), strict=True):
            self.found.note("moments", flat(stored), flat(mine), relative=True)
        self.found.require(steps_taken(run, number), own.step)


def planned(view: Round) -> list[tuple[int, list[int]]]:
    """The epoch of each optimizer step and the places of its completions."""
    train, found = view.recipe["train"], []
    names = [f"{row['prompt_id']}/{row['sample']}" for row in view.rollouts]
    for epoch in range(train["epochs"]):
        order = text.order(names, view.recipe["seed"], "train", view.number, epoch)
        ends = [len(order) * n // train["minibatches"] for n in range(train["minibatches"] + 1)]
        found += [(epoch, order[start:end]) for start, end in itertools.pairwise(ends)]
    return found


def compare_average(view: Round, weights: Tensors, found: Differences) -> None:
    """The moving average of the students, where a teacher is one."""
    for teacher in view.recipe["teachers"]:
        if teacher["self"] == "ema":
            old, new = (
                read_tensors(student.teacher_folder(view.run, teacher, number))
                for number in (view.number, view.number + 1)
            )
            decay = teacher["decay"]
            own = {name: decay * old[name] + (1 - decay) * weights[name] for name in old}
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
