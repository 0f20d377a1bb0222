"""Probes of engines: are their log-probs those of a plain forward pass of the model's folder?

Every probe asks an engine through its protocol and compares the answer with a forward pass made elsewhere, or
with another answer. Differences are reported as their maximum and 99th percentile, never as a mean: scores shifted
by one differ by nats at every token, and by nearly nothing in their sum.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kdpipe.doctor.finding import Measure, Outcome, are_ok, failed
from kdpipe.engines.handle import ModelHandle
from kdpipe.engines.protocol import ScoreRequest, Scoring, TokenScores
from kdpipe.errors import EngineError
from kdpipe.models.reference import Pair
from kdpipe.models.source import ModelSource

Logprobs = list[npt.NDArray[np.float64]]
"""Of each completion, the log-probs of its tokens."""
Forward = Callable[[Sequence[Pair], float], Logprobs]
"""Pairs and a temperature -> log-probs of each completion's tokens, computed without any engine."""
Turn = Callable[[npt.NDArray[np.float32], Sequence[int]], npt.NDArray[np.float64]]
"""Hidden states [n, H] and the ids of n tokens -> their log-probs [n] at the scorer's temperature."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far two forward passes of equal weights may be apart, in nats, in a dtype."""

    p99: float
    largest: float


TOLERANCES = {
    "float32": Tolerance(5e-4, 2e-3),
    "float16": Tolerance(0.05, 0.3),
    "bfloat16": Tolerance(0.2, 1.0),
}
BETTER_THAN_GUESSING = 0.25
"""Nats a token by which a teacher has to find reference solutions likelier than guessing among the ids in use."""
SAME_ANSWER = 1e-3
"""How far numbers of one answer may be apart, in any dtype: they come from the same logits."""
_ALTERNATIVES = 3


@dataclass(frozen=True, slots=True)
class Scorer:
    """A model with the temperature and the number of ids that it scores at."""

    model: ModelHandle
    temperature: float
    num_ids: int
    tolerance: Tolerance

    def scores(self, pairs: Sequence[Pair], *, top_k: int = 0, hidden: bool = False) -> list[TokenScores]:
        """The engine's scores of the completions."""
        return self.model.score(
            [ScoreRequest(prompt, completion) for prompt, completion in pairs],
            Scoring(temperature=self.temperature, num_ids=self.num_ids, top_k=top_k, hidden=hidden),
            progress=lambda _: None,
        )

    def logprobs(self, pairs: Sequence[Pair]) -> Logprobs:
        """The scores alone; raises EngineError unless there is one for every token."""
        found = [np.asarray(score.logprobs, np.float64) for score in self.scores(pairs)]
        for number, (row, (_, completion)) in enumerate(zip(found, pairs, strict=True)):
            if len(row) != len(completion):
                raise EngineError(
                    f"{len(row)} scores for {len(completion)} completion tokens",
                    hint="the engine and the pipeline disagree about what a completion is",
                    request=number,
                )
        return found


def agrees(
    scorer: Scorer, pairs: Sequence[Pair], forward: Forward, *, whose: str, between: Callable[[], None]
) -> Outcome:
    """Whether the engine's scores, after `between`, equal those of `forward`; `whose` names it."""
    scored = scorer.logprobs(pairs)
    between()
    theirs = forward(pairs, scorer.temperature)
    measures = _apart(scored, theirs, scorer.tolerance)
    why = "" if are_ok(measures) else f": {_diagnosis(scorer, pairs, scored, theirs, forward)}"
    tokens = sum(map(len, scored))
    return Outcome(f"{tokens} tokens at temperature {scorer.temperature:g} against {whose}{why}", measures)


def _apart(ours: Logprobs, theirs: Logprobs, tolerance: Tolerance) -> tuple[Measure, ...]:
    """Maximum and 99th percentile of the differences, with their limits."""
    if not sum(map(len, ours)):
        raise EngineError("there is no completion token to compare", hint="raise rollout.max_new_tokens")
    return (
        Measure("max", _off(ours, theirs), tolerance.largest),
        Measure("p99", _off(ours, theirs, quantile=0.99), tolerance.p99),
    )


def _off(ours: Logprobs, theirs: Logprobs, *, quantile: float = 1.0) -> float:
    """How far they are apart, at most or at a quantile; 0 where there is nothing to compare."""
    off = np.abs(np.concatenate(ours) - np.concatenate(theirs))
    return float(np.quantile(off, quantile)) if off.size else 0.0


def _diagnosis(
    scorer: Scorer, pairs: Sequence[Pair], ours: Logprobs, theirs: Logprobs, forward: Forward
) -> str:
    """The first known mistake that explains the difference."""
    temperature, tolerance = scorer.temperature, scorer.tolerance

    def fits(found: Logprobs, wanted: Logprobs) -> bool:
        return bool(sum(map(len, found))) and are_ok(_apart(found, wanted, tolerance))

    guess = -math.log(scorer.num_ids)
    if all(np.abs(row - guess).max(initial=0.0) < tolerance.largest for row in ours):
        return f"every score is -ln {scorer.num_ids} = {guess:.3f}: the weights are lost"
    if fits([row[1:] for row in ours], [row[:-1] for row in theirs]):
        return "each score is that of the token before: they come one position late"
    if fits([row[:-1] for row in ours], [row[1:] for row in theirs]):
        return "each score is that of the token after: they come one position early"
    if temperature != 1 and fits(ours, forward(pairs, temperature * temperature)):
        return f"they fit temperature {temperature**2:g}: the temperature is applied twice"
    if temperature != 1 and fits(ours, forward(pairs, 1.0)):
        return "they fit temperature 1: the temperature is not applied"
    return "other weights, or other arithmetic"


def sampler(drawn: Logprobs, wanted: Logprobs, *, temperature: float, tolerance: Tolerance) -> Outcome:
    """Whether the log-probs that came with samples are those of the trainer's forward."""
    measures = _apart(drawn, wanted, tolerance)
    why = "" if are_ok(measures) else ": importance ratios would be wrong from the first update on"
    said = (
        f"{sum(map(len, drawn))} sampled tokens at temperature {temperature:g} against the trainer's forward"
    )
    return Outcome(said + why, measures)


def shift(scorer: Scorer, pair: Pair) -> Outcome:
    """Whether a changed token moves its own score first, at the first, a middle and the last place."""
    prompt, completion = pair
    [before] = scorer.logprobs([pair])
    last = len(completion) - 1
    for place in sorted({0, last // 2, last}):
        others = _other_ids(completion[place], scorer.num_ids)
        changed = [(prompt, [*completion[:place], other, *completion[place + 1 :]]) for other in others]
        moved = [np.abs(after - before) > scorer.tolerance.p99 for after in scorer.logprobs(changed)]
        first = min((int(row.argmax()) for row in moved if row.any()), default=None)
        if first == place:
            continue
        if first is None:
            return failed(f"token {place} of {last} was changed, and no score moved: scores come late")
        when = "early" if first < place else "late"
        return failed(
            f"token {place} of {last} was changed, and the first score that moved is that of token {first}: "
            f"scores come {when}"
        )
    [alone] = scorer.logprobs([(prompt, completion[:1])])
    off = abs(float(alone[0] - before[0]))
    return Outcome(
        f"tokens 0, {last // 2} and {last} changed; a completion of one token keeps its score",
        (Measure("one token", off, scorer.tolerance.largest),),
    )


def _other_ids(token: int, num_ids: int) -> list[int]:
    """Ids other than `token`, far from it and from each other."""
    step = max(1, num_ids // (_ALTERNATIVES + 1))
    ids = [(token + number * step) % num_ids for number in range(1, _ALTERNATIVES + 1)]
    return sorted({found for found in ids if found != token})


def not_constant(scorer: Scorer, pairs: Sequence[Pair]) -> Outcome:
    """Whether scores differ from token to token; every second one is replaced by an arbitrary id.

    A teacher that knows the solutions by heart gives all of their own tokens nearly the same score: 0.
    """
    spoilt = [
        (prompt, [(t + 1 + i // 2) % scorer.num_ids if i % 2 else t for i, t in enumerate(completion)])
        for prompt, completion in pairs
    ]
    every = np.concatenate(scorer.logprobs(spoilt))
    spread = float(every.max() - every.min())
    measure = Measure("spread", spread, scorer.tolerance.p99, must_exceed=True)
    if measure.is_ok:
        return Outcome(f"{len(every)} scores from {every.min():.3g} to {every.max():.3g}", (measure,))
    guess = -math.log(scorer.num_ids)
    is_guess = abs(float(every.mean()) - guess) < scorer.tolerance.largest
    why = f"which is -ln {scorer.num_ids}: the weights are lost" if is_guess else "whatever the token"
    return Outcome(f"all {len(every)} scores are {every.mean():.4g}, {why}", (measure,))


def same_twice(scorer: Scorer, pairs: Sequence[Pair], *, between: Callable[[], None]) -> Outcome:
    """Whether the same requests give the same scores again after `between`, in another order, and alone."""
    first = scorer.logprobs(pairs)
    between()
    others = {
        "again": scorer.logprobs(pairs),
        "other order": scorer.logprobs(pairs[::-1])[::-1],
        "alone": scorer.logprobs(pairs[:1]),
    }
    measures = tuple(
        Measure(name, _off(first[: len(found)], found), scorer.tolerance.largest)
        for name, found in others.items()
    )
    return Outcome(f"{len(pairs)} requests again, backwards, and one alone", measures)


def reload(
    scorer: Scorer, other: ModelSource, pairs: Sequence[Pair], *, forward: Forward, of_other: Forward
) -> Outcome:
    """Whether loading A, B and A again gives the scores of A, B and A; B has A's sizes and other weights."""
    first = scorer.logprobs(pairs)
    between = replace(scorer, model=replace(scorer.model, source=other)).logprobs(pairs)
    again = scorer.logprobs(pairs)
    tolerance, temperature = scorer.tolerance, scorer.temperature
    wanted, wanted_other = forward(pairs, temperature), of_other(pairs, temperature)
    moved = Measure("A and B", _off(first, between), tolerance.p99, must_exceed=True)
    of_b = Measure("B and plain", _off(between, wanted_other), tolerance.largest)
    of_b_p99 = Measure("p99", _off(between, wanted_other, quantile=0.99), tolerance.p99)
    of_a = Measure("A and plain", _off(again, wanted), tolerance.largest)
    back = Measure("A again", _off(first, again), tolerance.largest)
    if not moved.is_ok:
        said = "after other weights are loaded the scores are still the old ones"
    elif not are_ok([of_b, of_b_p99]):
        said = "part of the weights, such as the output head, stays the old one when others are loaded"
    elif not are_ok([of_a, back]):
        said = "after loading other weights and back the scores are not what they were"
    else:
        said = "A the student, B a copy of it with other weights, and A again"
    return Outcome(said, (moved, of_b, of_b_p99, of_a, back))


def top_k(scorer: Scorer, pairs: Sequence[Pair], k: int) -> Outcome:
    """Whether k distinct ids come with each token, sorted, and fit the score of the token beside them."""
    order, own_token, mass = [0.0], [0.0], [0.0]
    for number, (score, (_, completion)) in enumerate(zip(scorer.scores(pairs, top_k=k), pairs, strict=True)):
        ids, logprobs, tail = score.topk_ids, score.topk_logprobs, score.tail_logprobs
        if ids is None or logprobs is None or tail is None:
            return failed(f"request {number}: {k} most probable ids were asked for, and none came")
        if ids.shape != (len(completion), k) or logprobs.shape != ids.shape:
            return failed(
                f"request {number}: ids of shape {list(ids.shape)}, expected {[len(completion), k]}"
            )
        if any(len(set(row)) < k for row in ids.tolist()):
            return failed(f"request {number}: an id occurs twice among the {k} most probable ones")
        values, own = logprobs.astype(np.float64), np.asarray(score.logprobs, np.float64)
        is_own = ids == np.asarray(completion)[:, None]
        order.append(np.diff(values, axis=1).max(initial=0.0))
        own_token.append(np.abs(values - own[:, None])[is_own].max(initial=0.0))
        own_token.append((own - values.min(axis=1))[~is_own.any(axis=1)].max(initial=0.0))
        total = np.exp(values).sum(axis=1) + np.exp(tail.astype(np.float64))
        mass.append(np.abs(total - 1).max(initial=0.0))
    return Outcome(
        f"{k} distinct ids at each token, by falling log-prob, with the sampled token where it belongs",
        (
            Measure("order", float(np.max(order)), 0.0),
            Measure("own token", float(np.max(own_token)), SAME_ANSWER),
            Measure("mass", float(np.max(mass)), SAME_ANSWER),
        ),
    )


def hidden_states(scorer: Scorer, pairs: Sequence[Pair], turn: Turn) -> Outcome:
    """Whether hidden states through the output head of the folder give the engine's scores."""
    ours: Logprobs = []
    theirs: Logprobs = []
    for number, (score, (_, completion)) in enumerate(
        zip(scorer.scores(pairs, hidden=True), pairs, strict=True)
    ):
        if score.hidden is None:
            return failed(f"request {number}: hidden states were asked for, and none came")
        ours.append(np.asarray(score.logprobs, np.float64))
        theirs.append(turn(score.hidden, completion))
    measures = _apart(ours, theirs, scorer.tolerance)
    return Outcome(f"{sum(map(len, ours))} tokens through the output head of the folder", measures)


def knows_the_task(scorer: Scorer, references: Sequence[Pair], own: Sequence[Pair] | None) -> Outcome:
    """Whether reference solutions are likelier than guessing; `own` are those in the teacher's template."""
    every = np.concatenate(scorer.logprobs(references))
    if not every.size:
        raise EngineError("the reference solutions are empty", hint="look at the task's data")
    guess = -math.log(scorer.num_ids)
    gain = float(every.mean()) - guess
    measure = Measure("over guessing", gain, BETTER_THAN_GUESSING, must_exceed=True)
    said = f"reference solutions have {every.mean():.2f} nats a token, guessing has {guess:.2f}"
    if own is not None:
        after_own = float(np.concatenate(scorer.logprobs(own)).mean())
        said += f"; after its own template's prompt {after_own:.2f}"
    return Outcome(said if measure.is_ok else f"{said}: its weights look random", (measure,))
