"""What the page's terms mean, told where they stand."""

from __future__ import annotations

from collections.abc import Iterable

TERMS = {
    "accuracy": "The share of the held-out problems that are answered right.",
    "95% interval": "If the evaluation were repeated on other problems of the same kind, 95 of 100 such intervals "
    "would hold the true value. It covers the choice of problems; that of the seed only where several seeds are "
    "one row of a comparison.",
    "paired difference": "Both students answered the same problems, so the difference is taken problem by problem. "
    "That makes its interval narrower than those of the two levels suggest.",
    "reverse KL": "How far the student's own text is from what the teacher would say: the student's log-prob of "
    "a token less the teacher's, averaged over text that the student writes. 0 means that they "
    "agree; it is in nats a token.",
    "held out": "Measured on problems that are never trained on.",
    "truncated": "The share of answers that were cut at the length limit before the model ended them.",
    "pass@k": "The chance that at least one of k samples of a problem is right.",
    "maj@k": "Whether the most frequent answer of k samples is right.",
    "headroom": "How much better the teacher is than the student before training: the room there is to learn.",
    "gate": "The check before round 1: a run stops there where a teacher clearly has nothing to teach, as "
    "training would be wasted. runtime.allow_weak_teacher lets it go on.",
    "nats": "The unit of log-probs by the natural logarithm: 1 nat is a factor of e, 2.7, in probability.",
    "p99": "99 of 100 tokens are below it.",
    "gradient norm": "How large the update would be that a minibatch asks for; large or growing values mean "
    "unstable training.",
    "reward": "What the grader gives a sample; 1 for a right answer where it only tells right from wrong.",
    "a control acts on": "Tokens whose weight in the loss is changed because sampler and trainer disagree about them: "
    "an importance ratio that is clipped, or a token that is masked. 0 is normal.",
    "seeds": "Runs of one recipe that differ in their seed alone. Their spread shows how far a result "
    "depends on chance in training.",
    "p": "How often a difference this large would be seen if the two were equally good.",
}


def explained(*names: str) -> Iterable[tuple[str, str]]:
    """These terms, each with its meaning."""
    return [(name, TERMS[name]) for name in names]
