"""What a run's numbers say, in words: did it work, how sure is that, and what weakens it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kdpipe.method.interval import Interval
from kdpipe.pipeline.headline import ACCURACY, REVERSE_KL, Headline
from kdpipe.pipeline.headroom import Distance, Headroom
from kdpipe.recipe.roles import STUDENT
from kdpipe.recipe.schema import ModelTeacher, ScratchTeacher, SelfTeacher, ServedTeacher
from kdpipe.results.evaluations import Evaluation, Tone
from kdpipe.results.measures import Measures, last

FEW_PROBLEMS = 100
FEW_FOR_A_MEAN = 30
MUCH_TRUNCATION = 0.1
MUCH_MISMATCH_NATS = 0.05


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


def verdict(measures: Measures) -> Verdict:
    """Whether the student gained anything on held-out problems, and whether chance would explain it."""
    before, after = measures.before, measures.after
    if after is None:
        told = "No trained student was evaluated yet, so nothing can be said about what it gained."
        closer = _training_sentence(measures)
        return Verdict("open", "No verdict yet.", (told, *filter(None, [closer])))
    if before is None or (effect := after.effect) is None:
        return Verdict(
            "open",
            after.headline.told.format(shown(after.headline, after.level.estimate)),
            ("Student 0 was not evaluated, so it cannot be said what of that was gained.",),
        )
    sentences = (*_change_sentences(measures, before, after), _divergence_sentence(after))
    return Verdict(*effect, tuple(filter(None, sentences)))


def _change_sentences(measures: Measures, before: Evaluation, after: Evaluation) -> Iterator[str | None]:
    """How the headline went, and what that means."""
    measure, change = after.headline, after.change
    assert change is not None
    if change.low <= 0 <= change.high:
        chance = "chance alone would explain it"
    elif abs(change.estimate) <= measure.least:
        chance = "rounding alone would explain it"
    else:
        chance = "chance does not explain it"
    first, last = (shown(measure, one.level.estimate) for one in (before, after))
    yield (
        f"On the same {after.problems} held-out problems {measure.name.removeprefix('held-out ')} went from {first} "
        f"to {last}{measure.unit} by round {after.round}: {delta(measure, change.estimate)} {measure.change_unit}, "
        f"{interval_text(measure, change)}{after.p_text}; {chance}."
    )
    if measure is ACCURACY:
        if (flips := measures.flips(after, before)) is not None:
            yield f"{flips[0]} problems are right now that were wrong, {flips[1]} the other way round."
        yield _gap_sentence(measures, before, after)
    else:
        had, left = before.level.estimate, after.level.estimate
        if change.high < -measure.least and left >= 0:
            yield f"That closes {1 - left / had:.0%} of the distance to the teacher."
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
    closed = 1 - left.estimate / had.estimate
    if left.low > 0:
        rest = (
            f"the teacher is still {100 * left.estimate:.1f} points ahead ({interval_text(ACCURACY, left)})"
        )
    elif left.high < 0:
        rest = f"the student is now ahead of the teacher ({interval_text(ACCURACY, left)})"
    else:
        rest = f"the teacher is not clearly ahead any more ({interval_text(ACCURACY, left)})"
    share = (
        f"That closes {closed:.0%} of the gap to the teacher" if 0 < closed <= 1 else "Against the teacher"
    )
    return f"{share}: {rest}."


def _divergence_sentence(after: Evaluation) -> str | None:
    change, now = after.reverse_kl_change, after.reverse_kl
    if after.headline is REVERSE_KL or change is None or now is None:
        return None
    size = nats(abs(change.estimate))
    moved = (
        f"fell by {size}"
        if change.high < 0
        else f"rose by {size}"
        if change.low > 0
        else "did not clearly change: it went"
    )
    return (
        f"Held-out reverse KL {moved} to {nats(now.estimate)} nats a token "
        f"(paired 95% interval of the change {signed(change.low)} to {signed(change.high)})."
    )


def _training_sentence(measures: Measures) -> str | None:
    values = measures.by_round("score/reverse_kl_nats")
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
        yield f"Only {problems} problems were evaluated: the interval of the accuracy is {width:.0f} points wide."
    if after.headline is REVERSE_KL and problems < FEW_FOR_A_MEAN:
        yield (
            f"Held-out reverse KL was measured on {problems} problems only, too few to trust its interval: raise "
            "evaluate.reverse_kl_problems."
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
    kept = last(measures.by_round("rollout/kept_mass_mean"))
    if kept is not None:
        yield f"Top-p or top-k cut sampling: {percent(kept)} of the mass was kept, so importance ratios are biased."
    unscorable = sum(measures.by_round("score/unscorable_tokens").values())
    if unscorable:
        yield f"{unscorable:,.0f} sampled tokens have no counterpart in the teacher's vocabulary and were not scored."
    if measures.project.recipe.reproduce:
        yield "The recipe says reproduce: true: an objective that fails check-loss may have been run."


def _engines(measures: Measures) -> Iterator[str]:
    p99 = measures.by_round("train/mismatch_nats_p99")
    if p99 and max(p99.values()) > MUCH_MISMATCH_NATS:
        worst = max(p99, key=lambda number: p99[number])
        yield (
            f"Sampler and trainer disagree about the same weights: p99 of {p99[worst]:.2g} nats in round {worst}. "
            "kdpipe doctor finds out why."
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
