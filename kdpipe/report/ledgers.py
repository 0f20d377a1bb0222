"""The end of the page: where time and tokens went, the mismatch ledger, recipe and provenance."""

from __future__ import annotations

from collections.abc import Sequence

from kdpipe.pipeline.progress import duration
from kdpipe.report.figure import shares_svg
from kdpipe.report.markup import Child, Html, element, joined, paragraph, section, table
from kdpipe.results.measures import Measures, token_totals
from kdpipe.results.verdict import percent
from kdpipe.store.step import Stage

MAX_RECIPE_CHARACTERS = 60_000
COLOURS: dict[Stage, int] = {
    Stage.ROLLOUT: 0,
    Stage.TEACHER_SCORE: 1,
    Stage.TRAIN: 2,
    Stage.EVALUATE: 3,
    Stage.SFT: 4,
}
"""As in the charts."""


def costs_section(measures: Measures) -> Html:
    """Time and tokens by stage."""
    costs = measures.costs()
    if not costs:
        return section("costs", "Where the time and the tokens went", paragraph("No step is done yet."))
    around = measures.seconds_around()
    shares: list[tuple[str, float, int]] = [(cost.stage, cost.seconds, COLOURS[cost.stage]) for cost in costs]
    shares += [("loading and saving", around, 5)] if around else []
    total = sum(value for _, value, _ in shares)
    rows: list[list[Child]] = [
        [
            _keyed(cost.stage, COLOURS[cost.stage]),
            str(cost.steps),
            duration(cost.seconds),
            f"{cost.seconds / total:.0%}" if total else "",
            f"{cost.tokens:,.0f}",
            f"{cost.tokens / cost.seconds:,.0f}" if cost.seconds and cost.tokens else "",
        ]
        for cost in costs
    ]
    if around:
        rows.append(
            [
                _keyed("loading and saving around them", 5),
                "",
                duration(around),
                f"{around / total:.0%}",
                "",
                "",
            ]
        )
    steps = str(sum(cost.steps for cost in costs))
    rows.append(["together", steps, duration(total), "", f"{token_totals(costs):,.0f}", ""])
    columns = ("stage", "steps", "time", "share", "tokens", "tokens a second")
    note = "A token counts in every stage that handles it. Steps reused from another run count what they took there."
    return section(
        "costs",
        "Where the time and the tokens went",
        paragraph(note, "note"),
        shares_svg(shares, label="; ".join(f"{name} {value / total:.0%}" for name, value, _ in shares)),
        element("div", {"class": "scroll"}, table(columns, rows)),
    )


def _keyed(name: str, style: int) -> Html:
    """A name after the colour that it has in the bar."""
    return joined([element("span", {"class": f"key s{style}"}, ""), name])


def mismatch_section(measures: Measures) -> Html:
    """What sampler and trainer disagree about in the first, worst and last round."""
    title = "Sampler against trainer"
    mean, p99, most = (measures.by_round(f"train/mismatch_nats_{name}") for name in ("mean", "p99", "max"))
    acted = measures.by_round("train/mismatch_acted_fraction")
    if not most:
        return section("mismatch", title, paragraph("No round was trained on the student's own samples yet."))
    note = (
        "The same weights twice: the log-probs that the sampler gave its tokens, less those that the trainer "
        "computes for them before the first update. It is all the engines' doing, and should be far below the KL."
    )
    shown = {"first": min(most), "worst": max(most, key=lambda number: most[number]), "last": max(most)}
    rows = [
        [
            name,
            str(number),
            power(mean[number], sign="+"),
            power(p99[number]),
            power(most[number]),
            percent(acted[number]),
        ]
        for name, number in shown.items()
    ]
    columns = ("", "round", "mean, nats", "p99", "largest", "tokens that a control acts on")
    content = element("div", {"class": "scroll"}, table(columns, rows))
    return section("mismatch", title, paragraph(note, "note"), content)


def power(value: float, *, sign: str = "") -> str:
    """A small number as a power of ten."""
    return f"{value:{sign}.1e}".replace("-", "−")


def provenance_section(measures: Measures, commands: Sequence[str]) -> Html:
    """Recipe, versions, digests, and the commands that make it again."""
    loaded = measures.project.loaded
    overrides = "".join(f"\n# --set {override}" for override in loaded.overrides)
    text = (
        loaded.text
        if len(loaded.text) <= MAX_RECIPE_CHARACTERS
        else loaded.text[:MAX_RECIPE_CHARACTERS] + "\n# ..."
    )
    facts = [(name, ", ".join(values)) for name, values in measures.provenance().items()]
    digests = [
        (step.id, measures.manifests[step.id].payload_digest)
        for step in measures.done
        if step.round in (0, measures.rounds_done) and step.id in measures.manifests
    ]
    return section(
        "provenance",
        "Recipe and provenance",
        paragraph(
            "The same recipe, models and data give the same artifacts: with the hf engine on one machine, to the byte.",
            "note",
        ),
        element("pre", None, "\n".join(commands)),
        _details("The recipe", element("pre", None, f"{text.rstrip()}{overrides}"), opened=False),
        _details("What it was made with", _facts(facts), opened=False),
        _details(
            f"Digests of round 0 and round {measures.rounds_done}", _facts(digests, mono=True), opened=False
        ),
    )


def _details(title: str, content: Html, *, opened: bool) -> Html:
    return element("details", {"class": "print", "open": opened}, element("summary", None, title), content)


def _facts(facts: Sequence[tuple[str, str]], *, mono: bool = False) -> Html:
    name = "mono" if mono else None
    return element(
        "dl",
        None,
        *(joined([element("dt", None, key), element("dd", {"class": name}, value)]) for key, value in facts),
    )
