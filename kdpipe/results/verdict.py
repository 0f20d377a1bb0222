"""What a run's numbers say, in words: did it work, how sure is that, and what weakens it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kdpipe.method.interval import Interval
from kdpipe.pipeline.headline import ACCURACY, KEPT_MASS, REVERSE_KL, Headline
from kdpipe.pipeline.headroom import Distance, Headroom
from kdpipe.recipe.roles import STUDENT
from kdpipe.recipe.schema import ModelTeacher, ScratchTeacher, SelfTeacher, ServedTeacher
from kdpipe.results.attribution import controls_of
from kdpipe.results.effect import Effect, Tone, Way, ending, way_of
from kdpipe.results.evaluations import Evaluation
from kdpipe.results.measures import FEW_FOR_A_MEAN, Measures, last
from kdpipe.results.studies import TABLE

FEW_PROBLEMS = 100
MUCH_TRUNCATION = 0.1
MUCH_MISMATCH_NATS = {"float32": 2e-3, "float16": 0.05, "bfloat16": 0.2}
"""The p99 that rounding alone may reach between two engines, by what they compute in."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict: a headline, the sentences that carry it, and whether it is good."""

    tone: Tone
    headline: str
    sentences: tuple[str, ...]


def percent(value: float) -> str:
    """A share, to a tenth of a percent."""
    return f"{100 * value:.1f}%"


def shown(measure: Headline, value: float) -> str:
    """A level of a measure without its unit."""
    return measure.show(value).replace("-", "−")


def delta(measure: Headline, value: float) -> str:
    """A difference of a measure with its sign."""
    return measure.show_change(value).replace("-", "−")


def points(value: float) -> str:
    """A difference of shares in signed percentage points."""
    return delta(ACCURACY, value)


def nats(value: float) -> str:
    """A log-prob or a divergence, to a thousandth."""
    return f"{value:.3f}".replace("-", "−")


def signed(value: float) -> str:
    """A difference in nats, to a thousandth."""
    return delta(REVERSE_KL, value)


def interval_text(measure: Headline, difference: Interval) -> str:
    """The interval of a paired difference, as it is told in sentences."""
    return f"paired 95% interval {delta(measure, difference.low)} to {delta(measure, difference.high)}"


def share_text(share: Interval) -> str:
    """A share of a gap with its interval."""
    low, high = (f"{100 * bound:.0f}".replace("-", "−") for bound in (share.low, share.high))
    return f"{share.estimate:.0%} (95% interval {low} to {high}%)"


def verdict(measures: Measures) -> Verdict:
    """Whether the student gained anything on held-out problems, and whether chance could explain it."""
    before, after, rounds = measures.before, measures.after, measures.project.recipe.rounds
    then = ending(measures.project.run, measures.states)
    if after is None:
        told = "No trained student was evaluated yet, so nothing can be said about what it gained."
        closer = _training_sentence(measures)
        headline = f"No verdict yet; {measures.rounds_done} of {rounds} rounds are trained{then}."
        return Verdict("open", headline, (told, *filter(None, [closer])))
    if before is None or (effect := after.effect(rounds, then=then)) is None:
        level = after.headline.told.format(shown(after.headline, after.level.estimate))
        effect = Effect("open", level).by_round(after.round, of=rounds, then=then)
        told = "Student 0 was not evaluated, so it cannot be said what of that was gained."
        return Verdict(effect.tone, effect.headline, (told,))
    sentences = (
        *_change_sentences(measures, before, after),
        _divergence_sentence(measures, before, after),
        _attribution_sentence(measures, after),
    )
    return Verdict(effect.tone, effect.headline, tuple(filter(None, sentences)))


def _chance(after: Evaluation, change: Interval) -> str:
    """What of the headline's change chance or rounding could explain."""
    match way_of(after.headline, after.summary):
        case Way.FEW:
            return "too few problems to tell"
        case Way.UNCLEAR if change.low <= 0 <= change.high:
            return "chance alone could explain it"
        case Way.UNCLEAR:
            return "rounding alone could explain it"
        case _:
            return "chance alone hardly explains it"


def _change_sentences(measures: Measures, before: Evaluation, after: Evaluation) -> Iterator[str | None]:
    """How the headline went, and what that means."""
    measure, change = after.headline, after.change
    assert change is not None
    first, last = (shown(measure, one.level.estimate) for one in (before, after))
    problems = "held-out problem" if after.problems == 1 else f"{after.problems} held-out problems"
    yield (
        f"On the same {problems} {measure.name.removeprefix('held-out ')} went from {first} "
        f"to {last}{measure.unit} by round {after.round}: {delta(measure, change.estimate)} {measure.change_unit}, "
        f"{interval_text(measure, change)}{after.p_text}; {_chance(after, change)}."
    )
    if measure is ACCURACY:
        if (flips := measures.flips(after, before)) is not None:
            yield f"Answered right only now: {flips[0]}; only before: {flips[1]}."
        yield _gap_sentence(measures, before, after)
    else:
        if way_of(measure, after.summary) is Way.BETTER and (share := measures.approached(before, after)):
            yield f"That closes {share_text(share)} of the distance to the teacher."
        yield "Nothing says whether its answers are good: task.grader is none."


def _gap_sentence(measures: Measures, before: Evaluation, after: Evaluation) -> str | None:
    """What is left to the teacher, for one teacher that is clearly better than student 0."""
    if len(measures.teachers) != 1:
        return None
    [teacher] = measures.teachers
    left = measures.difference(teacher, after)
    had = measures.difference(teacher, before)
    if left is None or had is None or had.low <= 0:
        return None
    if left.low > 0:
        rest = (
            f"the teacher is still {100 * left.estimate:.1f} points ahead ({interval_text(ACCURACY, left)})"
        )
    elif left.high < 0:
        rest = f"the student is now ahead of the teacher ({interval_text(ACCURACY, left)})"
    else:
        rest = f"the teacher is not clearly ahead any more ({interval_text(ACCURACY, left)})"
    share = measures.closed(teacher, before, after)
    if share is None or way_of(ACCURACY, after.summary) is not Way.BETTER:
        return f"Against the teacher: {rest}."
    return f"That closes {share_text(share)} of the gap to the teacher: {rest}."


def _divergence_sentence(measures: Measures, before: Evaluation, after: Evaluation) -> str | None:
    change, had, now = after.reverse_kl_change, before.reverse_kl, after.reverse_kl
    if after.headline is REVERSE_KL or change is None or had is None or now is None:
        return None
    moved = {
        Way.BETTER: "fell",
        Way.WORSE: "rose",
        Way.UNCLEAR: "did not clearly change: it went",
        Way.FEW: "was measured on too few problems to tell: it went",
    }
    way = way_of(REVERSE_KL, after.summary)
    share = measures.approached(before, after) if way is Way.BETTER else None
    closed = "" if share is None else f"; that closes {share_text(share)} of the distance to the teacher"
    return (
        f"Held-out reverse KL {moved[way]} from {nats(had.estimate)} to {nats(now.estimate)} nats a token: "
        f"{signed(change.estimate)}, {interval_text(REVERSE_KL, change)}{closed}."
    )


def _attribution_sentence(measures: Measures, after: Evaluation) -> str:
    """What other runs tell about how much of it is due to the seed, and to the teacher."""
    controls, train = controls_of(measures.project, after.round), measures.project.recipe.train
    count = len(controls.seeds)
    seeds = "One seed" if count == 1 else f"{count} seeds (kdpipe compare {' '.join(controls.runs)})"
    if train.control != "none":
        return f"{seeds}. This run is itself a control arm: train.control {train.control}."
    if not train.objective.has_kd:
        return f"{seeds}: another one may do better or worse." if count == 1 else f"{seeds}."
    due = "how much of this is due to the teacher" + (
        ", and how much to the reward," if train.objective.has_rl else ""
    )
    if controls.study is None:
        return f"{seeds}; no control arm was run: {due} is not known (kdpipe arms shows it)."
    arms = ", ".join(controls.arms)
    return f"{seeds}; control arms were run ({arms}): {due} stands in {controls.study}/{TABLE}."


def _training_sentence(measures: Measures) -> str | None:
    values = measures.own_reverse_kl()
    if len(values) < 2:
        return None
    first, final = values[min(values)], values[max(values)]
    return (
        f"On its own training samples the reverse KL went from {nats(first)} to {nats(final)} nats a token, "
        f"rounds {min(values)} to {max(values)}."
    )


def warnings(measures: Measures) -> list[str]:
    """What weakens the result, each in a sentence or two."""
    return [
        *_unfinished(measures),
        *_evaluation(measures),
        *_headroom(measures),
        *_sampling(measures),
        *_engines(measures),
    ]


def _unfinished(measures: Measures) -> Iterator[str]:
    left = [state for state in measures.states if not state.done]
    damaged = [state.step.id for state in left if state.verdict == "damaged"]
    if left:
        rounds = measures.project.recipe.rounds
        yield (
            f"The run is not finished: {len(left)} of {len(measures.states)} steps are not done, "
            f"{measures.rounds_done} of {rounds} rounds are trained; next is {left[0].step.id}."
        )
    if damaged:
        force = " ".join(f"--force {name}" for name in damaged)
        yield f"Damaged: {', '.join(damaged)}. Nothing here is read from there; kdpipe run {force} rebuilds it."


def _evaluation(measures: Measures) -> Iterator[str]:
    after = measures.after
    if not measures.evaluations:
        yield "Nothing was evaluated: there is no accuracy and no held-out reverse KL."
        return
    if after is None:
        return
    if after.round < measures.rounds_done:
        yield (
            f"The last evaluation is of round {after.round}, and {measures.rounds_done} rounds are trained: "
            "set evaluate.every so that the last one is evaluated."
        )
    problems = after.problems
    if after.headline is ACCURACY and problems < FEW_PROBLEMS:
        width = 100 * (after.level.high - after.level.low)
        count = "1 problem was" if problems == 1 else f"{problems} problems were"
        yield f"Only {count} evaluated: the interval of the accuracy is {width:.0f} points wide."
    if after.headline is REVERSE_KL and problems < FEW_FOR_A_MEAN:
        yield (
            f"Held-out reverse KL was measured on {problems} problems only: raise evaluate.reverse_kl_problems for an "
            "interval that goes by more."
        )
    truncated = after.summary["truncated_fraction"]
    if truncated > MUCH_TRUNCATION:
        compared = "accuracies" if after.headline is ACCURACY else "answers"
        advice = f"raise max_new_tokens before comparing {compared}."
        if truncated == 1:
            advice = (
                "none holds an end token, so see first whether the model's is known (kdpipe doctor, prompt)."
            )
        yield f"{percent(truncated)} of the held-out answers were cut at the length limit and could not end: {advice}"


def _headroom(measures: Measures) -> Iterator[str]:
    for headroom in measures.headrooms:
        if not headroom.is_weak:
            continue
        who = "the teacher" if headroom.teacher == "teacher" else f"teacher {headroom.teacher}"
        exempt = "" if headroom.exempt is None else f" It need not be: {headroom.exempt}."
        match headroom:
            case Headroom(change=change, low=low, high=high):
                yield (
                    f"Weak headroom: {who} is not clearly better than the untrained student "
                    f"({points(change)} points, {points(low)} to {points(high)}).{exempt}"
                )
            case Distance(reverse_kl_nats=level, low=low, high=high):
                yield (
                    f"Weak headroom: {who} is not clearly another than the untrained student: held-out reverse KL "
                    f"{nats(level)} nats a token ({nats(low)} to {nats(high)}), and up to {REVERSE_KL.least} may be "
                    f"rounding.{exempt}"
                )


def _sampling(measures: Measures) -> Iterator[str]:
    truncated = last(measures.by_round("rollout/truncated_fraction")) or 0.0
    if truncated > MUCH_TRUNCATION:
        yield f"{percent(truncated)} of the last round's samples were cut at the length limit."
    kept = last(measures.by_round(KEPT_MASS))
    if kept is not None:
        yield f"Top-p or top-k cut sampling: {percent(kept)} of the mass was kept, so importance ratios are biased."
    if measures.project.recipe.rollout.is_cut and any(one.is_sampled for one in measures.evaluations):
        yield (
            "Held-out reverse KL is that of the cut distribution, from sampled tokens: minus the logarithm of the "
            "mass that was kept is part of it, even where the teacher is the student."
        )
    unscorable = sum(measures.by_round("score/unscorable_tokens").values())
    if unscorable:
        yield f"{unscorable:,.0f} sampled tokens have no counterpart in the teacher's vocabulary and were not scored."
    if measures.project.recipe.reproduce:
        yield "The recipe says reproduce: true: an objective that fails check-loss may have been run."


def _engines(measures: Measures) -> Iterator[str]:
    p99 = measures.by_round("train/mismatch_nats_p99")
    dtypes = measures.provenance().get("dtype", ["bfloat16"])
    limit, dtype = max((MUCH_MISMATCH_NATS.get(name, 2e-3), name) for name in dtypes)
    if p99 and max(p99.values()) > limit:
        worst = max(p99, key=lambda number: p99[number])
        yield (
            f"Sampler and trainer disagree about the same weights: p99 of {p99[worst]:.2g} nats in round {worst}, and "
            f"rounding in {dtype} explains {limit:g} at most. kdpipe doctor finds out why."
        )
    for name in ("kdpipe", "git_commit", "torch", "transformers", "vllm", "device", "dtype"):
        values = measures.provenance().get(name, [])
        if len(values) > 1:
            yield f"Steps were made with different values of {name}: {', '.join(values)}."


def model_name(measures: Measures, role: str) -> str:
    """What the recipe says that a model is."""
    recipe = measures.project.recipe
    if role == STUDENT:
        return recipe.student.model or "from scratch"
    teacher = next(teacher for teacher in recipe.teachers if teacher.name == role)
    match teacher:
        case ModelTeacher(model=model):
            return model
        case ScratchTeacher():
            return "from scratch"
        case SelfTeacher(self_=which):
            return f"the student itself ({which})"
        case ServedTeacher(server=server):
            return f"{server.model}, behind a server"
