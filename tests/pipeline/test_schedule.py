"""The order in which steps may run, and what those ahead open, over made-up plans of every shape."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.pipeline.plan import Plan
from kdpipe.pipeline.schedule import Schedule, must_restore
from kdpipe.store.step import Input, Step

Links = list[dict[int, bool]]
"""For each step: the earlier steps that it reads, and whether it opens their model."""


def made_plan(links: Links) -> Plan:
    steps = []
    for number, reads in enumerate(links):
        inputs: Any = {
            f"role{source}": Input(f"step@{source}", ("model",) if opens else ())
            for source, opens in reads.items()
        }
        steps.append(Step(f"step@{number}", "train", number, "", 1, inputs, {}, f"print{number}"))  # type: ignore[arg-type]
    return Plan(tuple(steps))


@st.composite
def plans(draw: st.DrawFn) -> Links:
    size = draw(st.integers(1, 8))
    return [
        draw(st.dictionaries(st.integers(0, number - 1), st.booleans(), max_size=3)) if number else {}
        for number in range(size)
    ]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(links=plans(), data=st.data())
def test_each_step_comes_once_and_after_all_that_it_reads(links: Links, data: st.DataObject) -> None:
    """Steps at work are finished in any order; a step comes only when all that it reads is finished."""
    plan = made_plan(links)
    schedule = Schedule(plan, plan.steps, [step.id for step in plan.steps])
    at_work: list[Step] = []
    seen: list[str] = []
    finished: set[str] = set()
    while len(finished) < len(plan.steps):
        while (step := schedule.next()) is not None:
            assert {source.step_id for source in step.inputs.values()} <= finished
            at_work.append(step)
            seen.append(step.id)
        assert at_work, "there is always something to do"
        done = at_work.pop(data.draw(st.integers(0, len(at_work) - 1)))
        finished.add(done.id)
        schedule.finish(done)
    assert sorted(seen) == sorted(step.id for step in plan.steps)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(links=plans(), asked=st.sets(st.integers(0, 7)))
def test_one_step_at_a_time_is_the_order_of_the_plan(links: Links, asked: set[int]) -> None:
    plan = made_plan(links)
    steps = [step for step in plan.steps if step.round in asked]
    schedule = Schedule(plan, steps, [])
    found = []
    while (step := schedule.next()) is not None:
        found.append(step)
        schedule.finish(step)
    assert found == steps


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(links=plans(), pending=st.sets(st.integers(0, 7)), changed=st.sets(st.integers(0, 7)))
def test_what_a_step_ahead_opens_is_awaited_until_that_step_is_finished(
    links: Links, pending: set[int], changed: set[int]
) -> None:
    """Ahead are those that were pending, and all that read, directly or not, what came out differently."""
    plan = made_plan(links)
    expected = {step.id for step in plan.steps if step.round in pending}
    schedule = Schedule(plan, plan.steps, expected)
    for step in plan.steps:
        assert schedule.next() == step
        schedule.finish(step, changed=step.round in changed)
        expected.discard(step.id)
        reached = {step.id} if step.round in changed else set[str]()
        for later in plan.steps[step.round + 1 :]:
            if reached & {source.step_id for source in later.inputs.values()}:
                reached.add(later.id)
        expected |= reached - {step.id}
        opened = {
            source.step_id
            for later in plan.steps
            if later.id in expected
            for source in later.inputs.values()
            if source.opens
        }
        for origin in plan.steps:
            assert schedule.awaits(origin.fingerprint, "model") == (origin.id in opened)


@pytest.mark.parametrize(
    ("dropped", "wanted", "expected"),
    [
        ({0, 1, 2}, 3, {0, 1, 2}),
        ({0, 2}, 3, {2}),
        ({0, 1}, 3, set[int]()),
        ({2}, 1, set[int]()),
    ],
)
def test_only_what_is_opened_on_the_way_is_restored(
    dropped: set[int], wanted: int, expected: set[int]
) -> None:
    plan = made_plan([{}, {0: True}, {1: True, 0: False}, {2: True, 0: False}])
    found = must_restore(
        plan, {f"step@{wanted}"}, lambda step: {"model"} if step.round in dropped else set[str]()
    )
    assert found == {f"step@{number}" for number in expected}
