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

from kdpipe.doctor.finding import Measure, Outcome, are_ok, failed, skipped
from kdpipe.engines.handle import ModelHandle
from kdpipe.engines.protocol import ScoreRequest, Scoring, TokenScores
from kdpipe.errors import EngineError
from kdpipe.method.statistics import token_mean
from kdpipe.models.reference import Pair
from kdpipe.models.source import ModelSource

Logprobs = list[npt.NDArray[np.float64]]
"""Of each completion, the log-probs of its tokens."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far two forward passes of equal weights may be apart, in nats, and where that comes from."""

    p99: float
    largest: float
    median: float
    origin: str


Passed = tuple[Logprobs, Tolerance]
"""What a forward pass computes, and how far another pass of the same weights may be from it."""
Forward = Callable[[Sequence[Pair], float], Passed]
"""Pairs and a temperature -> log-probs of each completion's tokens, computed without any engine."""
Turn = Callable[[npt.NDArray[np.float32], Sequence[int]], npt.NDArray[np.float64]]
"""Hidden states [n, H] and the ids of n tokens -> their log-probs [n] at the scorer's temperature."""

TIMES_NOISE = 2.0
"""How often its noise a difference may be. Measured with SmolLM2: sound passes are 0.3 (bfloat16) to 1 of it apart."""
FLOORS = {"float32": 2e-4, "float16": 5e-3, "bfloat16": 0.04}
"""Nats that the largest difference may be in any model, whose noise may happen to be none; a quarter at the p99."""
UNMEASURED = Tolerance(0.2, 1.0, 0.1, "for numbers that cannot be measured here")
"""Of a model that runs as something else than its folder holds: on a server, or quantized by its engine."""
BETTER_THAN_GUESSING = 0.25
"""Nats a token by which a teacher has to find reference solutions likelier than guessing among the ids in use."""
SAME_ANSWER = 1e-3
"""How far numbers of one answer may be apart, in any dtype: they come from the same logits."""
_ONE_ANSWER = "numbers of one answer, in any dtype"
_ALTERNATIVES = 3
_PLAINLY = 4
"""How often its limit a score moves that plainly depends on the tokens."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """A model with the temperature and the number of ids that it scores at."""

    model: ModelHandle
    temperature: float
    num_ids: int

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


def tolerance_of(noise: npt.NDArray[np.float64], dtype: str) -> Tolerance:
    """The limits that belong to a model's noise at some tokens."""
    floor, origin = FLOORS[dtype], f"{TIMES_NOISE:g} x the model's own rounding noise in {dtype}"
    if not noise.size:
        return Tolerance(floor / 4, floor, floor / 8, f"the least in {dtype}")
    p99, largest = (TIMES_NOISE * float(np.quantile(noise, quantile)) for quantile in (0.99, 1.0))
    if largest < floor:
        origin = f"the least in {dtype}; {TIMES_NOISE:g} x the model's own rounding noise is {largest:.1g}"
    median = max(TIMES_NOISE * float(np.median(noise)), floor / 8)
    return Tolerance(max(p99, floor / 4), max(largest, floor), median, origin)


def agrees(
    scorer: Scorer, pairs: Sequence[Pair], forward: Forward, *, whose: str, between: Callable[[], None]
) -> Outcome:
    """Whether the engine's scores, after `between`, equal those of `forward`; `whose` names it."""
    scored = scorer.logprobs(pairs)
    between()
    theirs, tolerance = passed = forward(pairs, scorer.temperature)
    measures = _apart(scored, theirs, tolerance)
    why = "" if are_ok(measures) else f": {_diagnosis(scorer, pairs, scored, passed, forward)}"
    tokens = sum(map(len, scored))
    return Outcome(f"{tokens} tokens at temperature {scorer.temperature:g} against {whose}{why}", measures)


def _apart(ours: Logprobs, theirs: Logprobs, tolerance: Tolerance) -> tuple[Measure, ...]:
    """Maximum and 99th percentile of the differences, with their limits."""
    if not sum(map(len, ours)):
        raise EngineError("there is no completion token to compare", hint="raise rollout.max_new_tokens")
    return (
        Measure("max", _off(ours, theirs), tolerance.largest, origin=tolerance.origin),
        Measure("p99", _off(ours, theirs, quantile=0.99), tolerance.p99, origin=tolerance.origin),
    )


def apart(ours: Passed, theirs: Passed) -> float:
    """How far two passes are apart at the 99th percentile, in nats."""
    return _off(ours[0], theirs[0], quantile=0.99)


def _off(ours: Logprobs, theirs: Logprobs, *, quantile: float = 1.0) -> float:
    """How far they are apart, at most or at a quantile; 0 where there is nothing to compare."""
    off = np.abs(np.concatenate(ours) - np.concatenate(theirs))
    return float(np.quantile(off, quantile)) if off.size else 0.0


def _diagnosis(
    scorer: Scorer, pairs: Sequence[Pair], ours: Logprobs, passed: Passed, forward: Forward
) -> str:
    """The first known mistake that explains the difference."""
    temperature, (theirs, tolerance) = scorer.temperature, passed

    def fits(found: Logprobs, wanted: Logprobs) -> bool:
        return bool(sum(map(len, found))) and are_ok(_apart(found, wanted, tolerance))

    guess = -math.log(scorer.num_ids)
    if all(np.abs(row - guess).max(initial=0.0) < tolerance.largest for row in ours):
        return f"every score is -ln {scorer.num_ids} = {guess:.3f}: the weights are lost"
    if fits([row[1:] for row in ours], [row[:-1] for row in theirs]):
        return "each score is that of the token before: they come one position late"
    if fits([row[:-1] for row in ours], [row[1:] for row in theirs]):
        return "each score is that of the token after: they come one position early"
    if temperature != 1 and fits(ours, forward(pairs, temperature * temperature)[0]):
        return f"they fit temperature {temperature**2:g}: the temperature is applied twice"
    if temperature != 1 and fits(ours, forward(pairs, 1.0)[0]):
        return "they fit temperature 1: the temperature is not applied"
    return "other weights, or other arithmetic"


def sampler(drawn: Logprobs, wanted: Passed, *, temperature: float) -> Outcome:
    """Whether the log-probs that came with samples are those of the trainer's forward."""
    measures = _apart(drawn, *wanted)
    why = "" if are_ok(measures) else ": importance ratios would be wrong from the first update on"
    said = (
        f"{sum(map(len, drawn))} sampled tokens at temperature {temperature:g} against the trainer's forward"
    )
    return Outcome(said + why, measures)


def trained(read: Logprobs, wanted: Passed, *, temperature: float) -> Outcome:
    """Whether the log-probs that the loss reads are those of a plain forward."""
    measures = _apart(read, *wanted)
    why = "" if are_ok(measures) else ": training would move another distribution than the one that samples"
    said = f"{sum(map(len, read))} tokens at temperature {temperature:g} as the loss reads them"
    return Outcome(f"{said}, against a plain forward{why}", measures)


def shift(scorer: Scorer, pair: Pair, tolerance: Tolerance) -> Outcome:
    """Whether a changed token moves its own score first, at the first, a middle and the last place.

    It cannot be told where scores hardly depend on the tokens at all.
    """
    prompt, completion = pair
    [before] = scorer.logprobs([pair])
    last, strongest = len(completion) - 1, 0.0
    for place in sorted({0, last // 2, last}):
        others = _other_ids(completion[place], scorer.num_ids)
        changed = [(prompt, [*completion[:place], other, *completion[place + 1 :]]) for other in others]
        moves = [np.abs(after - before) for after in scorer.logprobs(changed)]
        strongest = max(strongest, *(float(row.max()) for row in moves))
        moved = [row > tolerance.p99 for row in moves]
        first = min((int(row.argmax()) for row in moved if row.any()), default=None)
        if first == place:
            continue
        if first is None and strongest <= _PLAINLY * tolerance.p99:
            return skipped(
                f"cannot be told: no score moves by more than {strongest:.2g} nats when a token changes"
            )
        where = "no score moved" if first is None else f"the first score that moved is that of token {first}"
        when = "early" if first is not None and first < place else "late"
        return failed(f"token {place} of {last} was changed, and {where}: scores come {when}")
    [alone] = scorer.logprobs([(prompt, completion[:1])])
    off = abs(float(alone[0] - before[0]))
    return Outcome(
        f"tokens 0, {last // 2} and {last} changed; a completion of one token keeps its score",
        (Measure("one token", off, tolerance.largest, origin=tolerance.origin),),
    )


def _other_ids(token: int, num_ids: int) -> list[int]:
    """Ids other than `token`, far from it and from each other."""
    step = max(1, num_ids // (_ALTERNATIVES + 1))
    ids = [(token + number * step) % num_ids for number in range(1, _ALTERNATIVES + 1)]
    return sorted({found for found in ids if found != token})


def not_constant(scorer: Scorer, pairs: Sequence[Pair], tolerance: Tolerance) -> Outcome:
    """Whether scores differ from token to token; every second one is replaced by an arbitrary id.

    A teacher that knows the solutions by heart gives all of their own tokens nearly the same score: 0.
    """
    spoilt = [
        (prompt, [(t + 1 + i // 2) % scorer.num_ids if i % 2 else t for i, t in enumerate(completion)])
        for prompt, completion in pairs
    ]
    every = np.concatenate(scorer.logprobs(spoilt))
    spread = float(every.max() - every.min())
    measure = Measure("spread", spread, tolerance.p99, must_exceed=True, origin=tolerance.origin)
    if measure.is_ok:
        return Outcome(f"{len(every)} scores from {every.min():.3g} to {every.max():.3g}", (measure,))
    guess = -math.log(scorer.num_ids)
    is_guess = abs(float(every.mean()) - guess) < tolerance.largest
    why = f"which is -ln {scorer.num_ids}: the weights are lost" if is_guess else "whatever the token"
    return Outcome(f"all {len(every)} scores are {every.mean():.4g}, {why}", (measure,))


def same_twice(
    scorer: Scorer, pairs: Sequence[Pair], tolerance: Tolerance, *, between: Callable[[], None]
) -> Outcome:
    """Whether the same requests give the same scores again after `between`, in another order, and alone."""
    first = scorer.logprobs(pairs)
    between()
    others = {
        "again": scorer.logprobs(pairs),
        "other order": scorer.logprobs(pairs[::-1])[::-1],
        "alone": scorer.logprobs(pairs[:1]),
    }
    measures = tuple(
        Measure(name, _off(first[: len(found)], found), tolerance.largest, origin=tolerance.origin)
        for name, found in others.items()
    )
    return Outcome(f"{len(pairs)} requests again, backwards, and one alone", measures)


def reload(
    scorer: Scorer, other: ModelSource, pairs: Sequence[Pair], *, wanted: Passed, wanted_other: Passed
) -> Outcome:
    """Whether loading A, B and A again gives the scores of A, B and A; B has A's sizes and other weights."""
    first = scorer.logprobs(pairs)
    between = replace(scorer, model=replace(scorer.model, source=other)).logprobs(pairs)
    again = scorer.logprobs(pairs)
    (plain, a), (plain_other, b) = wanted, wanted_other
    moved = Measure("A and B", _off(first, between), a.p99, must_exceed=True, origin=a.origin)
    of_b = Measure("B and plain", _off(between, plain_other), b.largest, origin=b.origin)
    of_b_p99 = Measure("p99", _off(between, plain_other, quantile=0.99), b.p99, origin=b.origin)
    of_b_median = Measure(  # an old head moves all tokens a little, rounding a few of them far
        "median", _off(between, plain_other, quantile=0.5), b.median, origin=b.origin
    )
    of_a = Measure("A and plain", _off(again, plain), a.largest, origin=a.origin)
    back = Measure("A again", _off(first, again), a.largest, origin=a.origin)
    if not moved.is_ok:
        said = "after other weights are loaded the scores are still the old ones"
    elif not are_ok([of_b, of_b_p99, of_b_median]):
        said = "part of the weights, such as the output head, stays the old one when others are loaded"
    elif not are_ok([of_a, back]):
        said = "after loading other weights and back the scores are not what they were"
    else:
        said = "A the student, B a copy of it with other weights, and A again"
    return Outcome(said, (moved, of_b, of_b_p99, of_b_median, of_a, back))


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
            Measure("order", float(np.max(order)), 0.0, origin="sorted"),
            Measure("own token", float(np.max(own_token)), SAME_ANSWER, origin=_ONE_ANSWER),
            Measure("mass", float(np.max(mass)), SAME_ANSWER, origin=_ONE_ANSWER),
        ),
    )


def overlap(ours: Sequence[TokenScores], theirs: Sequence[TokenScores], k: int) -> Outcome:
    """How much of the k most probable ids of two models is the same, at the same tokens."""
    pairs = [(a.topk_ids, b.topk_ids) for a, b in zip(ours, theirs, strict=True)]
    same = [
        (a[:, :, None] == b[:, None, :]).any(axis=2).mean(axis=1)
        for a, b in pairs
        if a is not None and b is not None
    ]
    each = np.concatenate(same) if same else np.zeros(0)
    if not each.size:
        return skipped("there is no sampled token with the most probable ids of both")
    low = np.quantile(each, 0.1)
    return Outcome(
        f"{each.mean():.0%} of the teacher's {k} most probable ids are among the student's {k}, mean of "
        f"{each.size} sampled tokens; {low:.0%} or less at a tenth of them",
        verdict="ok",
    )


def hidden_states(scorer: Scorer, pairs: Sequence[Pair], turn: Turn, tolerance: Tolerance) -> Outcome:
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
    measures = _apart(ours, theirs, tolerance)
    return Outcome(f"{sum(map(len, ours))} tokens through the output head of the folder", measures)


def knows_the_task(scorer: Scorer, references: Sequence[Pair], own: Sequence[Pair] | None) -> Outcome:
    """Whether reference solutions are likelier than guessing; `own` are those in the teacher's template."""
    each = [logprobs for logprobs in scorer.logprobs(references) if len(logprobs)]
    if not each:
        raise EngineError("the reference solutions are empty", hint="look at the task's data")
    guess = -math.log(scorer.num_ids)
    mean = token_mean(([float(one.sum()) for one in each], [float(len(one)) for one in each]))
    gain = mean.estimate - guess
    origin = "more than random weights have"
    measure = Measure("over guessing", gain, BETTER_THAN_GUESSING, must_exceed=True, origin=origin)
    said = f"reference solutions have {mean.estimate:.2f} nats a token, guessing has {guess:.2f}"
    if own is not None:
        after_own = float(np.concatenate(scorer.logprobs(own)).mean())
        said += f"; after its own template's prompt {after_own:.2f}"
    if measure.is_ok:
        return Outcome(said, (measure,))
    if mean.high - guess > BETTER_THAN_GUESSING:
        said += (
            f": chance alone could explain it (95 % interval up to {mean.high:.2f} on {len(each)} problems)"
        )
        return Outcome(said, (measure,), verdict="warning")
    return Outcome(f"{said}: its weights look random", (measure,))
