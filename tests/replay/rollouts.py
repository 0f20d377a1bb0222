"""What a round sampled: which prompts, as which ids, which log-probs, texts and grades."""

from __future__ import annotations

from typing import Any

from tests.replay import text
from tests.replay.difference import Differences, joined
from tests.replay.forward import cut, of_tokens
from tests.replay.reading import Record, key
from tests.replay.view import Round, tensor


def compare_rollouts(view: Round, found: Differences) -> None:
    stored = [(row["prompt_id"], row["sample"], row["source"] == "student") for row in view.rollouts]
    found.require(stored, expected_rows(view))
    for row in view.rollouts:
        problem = view.problems[row["prompt_id"]]
        found.require(row["prompt_token_ids"], text.render(view.tokenizer, view.recipe["task"], problem))
        if row["source"] == "reference":
            found.require(row["completion_token_ids"], text.reference(view.tokenizer, problem))
        found.require(row["text"], shown(view.tokenizer, row))
        found.require((row["correct"], row["reward"]), graded(view, row, problem))
    compare_sampler(view, found)
    if view.recipe["rollout"]["off_policy_text"] == "teacher":
        compare_written(view, found)


def expected_rows(view: Round) -> list[tuple[str, int, bool]]:
    """Prompt, sample and whether the student samples: of a share of the prompts, in their order."""
    rollout, seed = view.recipe["rollout"], view.recipe["seed"]
    prompts = text.round_prompts(
        list(view.problems), prompts=rollout["prompts"], number=view.number, seed=seed
    )
    count = round(rollout["on_policy_fraction"] * rollout["prompts"])
    sampled = {prompts[index] for index in text.order(prompts, seed, "on-policy", view.number)[:count]}
    return [
        (name, sample, name in sampled)
        for name in prompts
        for sample in range(rollout["samples"] if name in sampled else 1)
    ]


def shown(tokenizer: Any, row: Record) -> str:
    """The text of a completion without its end token; other special tokens part it."""
    ids = row["completion_token_ids"]
    pieces: list[list[int]] = [[]]
    for token in ids[:-1] if row["finish_reason"] == "stop" else ids:
        if token in tokenizer.all_special_ids:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return "\n".join(filter(None, (tokenizer.decode(piece) for piece in pieces)))


def graded(view: Round, row: Record, problem: Record) -> tuple[bool | None, float | None]:
    if view.recipe["task"]["grader"] == "none":
        return None, None
    right = text.last_number(row["text"]) == text.answered(problem)
    return right, float(right)


def compare_sampler(view: Round, found: Differences) -> None:
    """b, of what top_k and top_p left of the distribution, and how much of it that was."""
    rollout, kept = view.recipe["rollout"], []
    for row in view.rollouts:
        if row["source"] == "student":
            stored = tensor(row["sampler_logprobs"])
            own = cut(view.sampled_from(row), top_k=rollout["top_k"], top_p=rollout["top_p"])
            found.note("log-probs", stored, of_tokens(own, row["completion_token_ids"]))
            kept.append((view.proximal[key(row)] - stored).exp())
    if rollout["top_p"] < 1 or rollout["top_k"]:
        found.note("kept mass", view.metrics[None, "rollout/kept_mass_mean"], joined(kept).mean())


def compare_written(view: Round, found: Differences) -> None:
    """Rows that are not sampled hold what the teacher wrote, whose log-probs are not kept."""
    [teacher] = view.recipe["teachers"]
    written = view.run.rows(view.number, f"rollout-{teacher['name']}/rollouts.parquet")
    given = [row for row in view.rollouts if row["source"] == "teacher"]
    stored, expected = (
        [(key(row), row["completion_token_ids"]) for row in rows] for rows in (given, written)
    )
    found.require(stored, expected)
