"""What teachers say of a round's completions: each stored score against a forward pass, routes and mixtures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from tests.replay import student, text
from tests.replay.difference import Differences
from tests.replay.forward import Network, logprobs, of_tokens
from tests.replay.objective import Support, reads_distributions
from tests.replay.reading import Key, Record, key, read_tensors
from tests.replay.view import Round, tensor


@dataclass(frozen=True)
class Scores:
    """Of one completion: q and scorable [n], and the distribution at each token where the loss reads one."""

    q: Tensor
    scorable: Tensor
    supports: Sequence[Support] = ()


def stored_scores(view: Round, found: Differences) -> dict[Key, Scores]:
    """The scores that train reads, after each was compared: of the one teacher of a completion, or of all."""
    teachers = view.recipe["teachers"]
    views = [TeacherView(view, teacher, found) for teacher in teachers]
    is_mixture = len(teachers) > 1 and all(teacher["only"] is None for teacher in teachers)
    result = {}
    for row in view.rollouts:
        scored = [one for one in views if key(row) in one.rows]
        wanted = [one for one in views if routes_to(one.teacher, view.problems[row["prompt_id"]])]
        found.require(scored, wanted)
        if is_mixture:
            result[key(row)] = mixture(view, row, scored)
        else:
            result[key(row)] = scored[0].scores(row)
    return shuffled(view, result) if view.objective["control"] == "shuffled_teacher" else result


def shuffled(view: Round, scores: Mapping[Key, Scores]) -> dict[Key, Scores]:
    """Each completion with the scores of one of the next prompt in an order, wrapped: sample by sample."""
    groups: dict[str, list[Key]] = {}
    for row in view.rollouts:
        groups.setdefault(row["prompt_id"], []).append(key(row))
    names = sorted(groups)
    ring = [names[n] for n in text.order(names, view.recipe["seed"], "shuffled-teacher", view.number)]
    found = {}
    for name, giver in zip(ring, [*ring[1:], ring[0]], strict=True):
        for rank, taker in enumerate(groups[name]):
            given = scores[groups[giver][rank % len(groups[giver])]]
            places = [t % len(given.q) for t in range(len(scores[taker].q))]
            supports = [given.supports[t] for t in places] if given.supports else ()
            found[taker] = Scores(given.q[places], given.scorable[places], supports)
    return found


def routes_to(teacher: Record, problem: Record) -> bool:
    """Whether the teacher teaches that problem."""
    return all(
        str(problem[name]) in map(str, wanted if isinstance(wanted, list) else [wanted])
        for name, wanted in (teacher["only"] or {}).items()
    )


def mixture(view: Round, row: Record, teachers: Sequence[TeacherView]) -> Scores:
    """The log of the weighted mean of the teachers' probabilities."""
    weights = tensor([one.teacher["weight"] or 1.0 for one in teachers])
    shares = weights / weights.sum()
    parts = [one.scores(row) for one in teachers]
    q = mean_of([part.q for part in parts], shares)
    supports: Sequence[Support] = ()
    if reads_distributions(view.objective):
        whole = mean_of([one.whole(row) for one in teachers], shares)
        supports = supports_of(whole, view.objective["kd"]["support"])
    return Scores(q, torch.stack([part.scorable for part in parts]).all(0), supports)


def mean_of(found: Sequence[Tensor], shares: Tensor) -> Tensor:
    return torch.stack([share * part.exp() for share, part in zip(shares, found, strict=True)]).sum(0).log()


class TeacherView:
    """One teacher in one round."""

    def __init__(self, view: Round, teacher: Record, found: Differences) -> None:
        self.view, self.teacher = view, teacher
        step = "teacher-score" if len(view.recipe["teachers"]) == 1 else f"teacher-score-{teacher['name']}"
        folder = student.teacher_folder(view.run, teacher, view.number)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.network = Network(folder, view.num_ids)
        self.temperature = teacher["temperature"] or view.temperature
        self.rows = {key(row): row for row in view.run.rows(view.number, f"{step}/scores.parquet")}
        hidden = view.run.step(view.number, step) / "hidden.safetensors"
        self.hidden = read_tensors(hidden) if hidden.is_file() else None
        for row in view.rollouts:
            if key(row) in self.rows:
                self.compare(row, found)

    def compare(self, rollout: Record, found: Differences) -> None:
        """The stored scores of a completion against those of an own forward pass."""
        row, prompt, ids = self.rows[key(rollout)], self.prompt(rollout), rollout["completion_token_ids"]
        found.require(row["teacher_prompt_token_ids"], prompt)
        found.require(row["scorable"], [True] * len(ids))
        own = self.swapped(logprobs(self.network.logits(prompt, ids).detach(), self.temperature))
        found.note("log-probs", row["teacher_logprobs"], of_tokens(own, ids))
        if self.hidden is not None:
            found.note("log-probs", self.whole(rollout), own)
        elif "topk_ids" in row:
            self.compare_support(rollout, own, found)

    def compare_support(self, rollout: Record, own: Tensor, found: Differences) -> None:
        """The ids of a support, their log-probs and that of all others together."""
        is_wide = self.view.recipe["teacher_score"]["logprobs"] == "float32"
        support = self.view.objective["kd"]["support"]
        by_sampler = self.view.sampled_from(rollout)
        for t, stored in enumerate(stored_supports(self.rows[key(rollout)])):
            assert stored.ids is not None
            found.require(set(stored.ids.tolist()), chosen(support, own[t], by_sampler[t]))
            kind = "log-probs" if is_wide else "log-probs in float16"
            found.note(kind, stored.logprobs[:-1], own[t, stored.ids])
            found.note("log-probs", stored.logprobs[-1], tail(own[t], stored.ids))

    def prompt(self, rollout: Record) -> list[int]:
        """The student's, or the teacher's own text in the teacher's template."""
        if self.teacher["prompt"] is None:
            found: list[int] = rollout["prompt_token_ids"]
            return found
        problem = self.view.problems[rollout["prompt_id"]]
        return text.render(self.tokenizer, self.view.recipe["task"], problem, self.teacher["prompt"])

    def swapped(self, whole: Tensor) -> Tensor:
        """With `end_token: alias` the columns of the two end ids trade places."""
        if self.view.objective["end_token"] != "alias":
            return whole
        order = torch.arange(whole.shape[-1])
        ends = [self.view.tokenizer.eos_token_id, self.tokenizer.eos_token_id]
        order[ends] = order[ends[::-1]]
        return whole[:, order]

    def whole(self, rollout: Record) -> Tensor:
        """The log-probs [n, V] that the kept hidden states stand for."""
        assert self.hidden is not None
        place = list(self.rows).index(key(rollout))
        start, end = self.hidden["offsets"][place : place + 2].tolist()
        logits = self.network.head(self.hidden["hidden"][start:end])
        return self.swapped(logprobs(logits, self.temperature))

    def scores(self, rollout: Record) -> Scores:
        """The stored scores of a completion, as the loss reads them."""
        row, supports = self.rows[key(rollout)], list[Support]()
        if "topk_ids" in row:
            supports = stored_supports(row)
        elif reads_distributions(self.view.objective):
            supports = supports_of(self.whole(rollout), self.view.objective["kd"]["support"])
        return Scores(tensor(row["teacher_logprobs"]), torch.tensor(row["scorable"]), supports)


def stored_supports(row: Record) -> list[Support]:
    """The support of each token: ids without their padding, and the tail last."""
    found = []
    for ids, values, rest in zip(row["topk_ids"], row["topk_logprobs"], row["tail_logprobs"], strict=True):
        count = sum(token >= 0 for token in ids)
        points = tensor([*map(float, values[:count]), rest])
        found.append(Support(points, torch.tensor(ids[:count])))
    return found


def supports_of(whole: Tensor, support: Any) -> list[Support]:
    """From log-probs [n, V]: all of them, or the best and a tail."""
    if support == "vocabulary":
        return [Support(line) for line in whole]
    best = whole.topk(support["teacher_top_k"]).indices
    return [
        Support(torch.cat([line[ids], tail(line, ids)[None]]), ids)
        for line, ids in zip(whole, best, strict=True)
    ]


def chosen(support: Mapping[str, int | None] | None, teacher: Tensor, sampler: Tensor) -> set[int]:
    """The ids of a support at one token, from the log-probs [V] of those who choose."""
    [(name, count)] = [(name, count) for name, count in (support or {"teacher_top_k": 64}).items() if count]
    sides = {"teacher_top_k": [teacher], "student_top_k": [sampler], "union_top_k": [teacher, sampler]}[name]
    return {int(token) for side in sides for token in side.topk(min(count, len(side))).indices}


def tail(line: Tensor, ids: Tensor) -> Tensor:
    """The log-mass of all ids but these."""
    return line.index_fill(0, ids, -math.inf).logsumexp(0)
