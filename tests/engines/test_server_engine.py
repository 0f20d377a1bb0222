"""The engine of servers before servers that fail, lie, hang, or want a key: what it repeats, refuses and never says."""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import math
import ssl
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdpipe.engines.protocol import SampleRequest, Sampling, ScoreRequest, Scoring, TokenScores
from kdpipe.engines.server.engine import SEQUENCE, ServerEngine
from kdpipe.engines.server.http import MAX_RETRY_AFTER_SECONDS
from kdpipe.engines.server.replies import TAIL_FLOOR
from kdpipe.errors import EngineError, ModelError
from kdpipe.models.source import ModelSource
from kdpipe.recipe.runtime import ServerRuntime
from kdpipe.recipe.teacher import Server
from tests.fakes import FakeEngine
from tests.serving import MODEL, Reply, Served, Twist, honest, serve

NUM_IDS = 12
PROMPT, COMPLETION = [2, 6, 4], [7, 3, 9, 2, 5]
KEY = "sk-canary-0123456789"


def behind(folder: Path, digest: str = "a") -> FakeEngine:
    engine = FakeEngine(num_rows=16)
    engine.load(ModelSource(folder, digest))
    return engine


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(behind(tmp_path), rows=NUM_IDS) as found:
        yield found


class Asker:
    """An engine that sleeps by writing down for how long."""

    def __init__(self, folder: Path, *urls: str, key: str | None = None, **settings: Any) -> None:
        self.slept: list[float] = []
        server = Server(urls=list(urls), model=MODEL, tokenizer="unused", api_key_env=key)
        bundle = settings.pop("ca_bundle", None)
        runtime = ServerRuntime(**{"timeout_seconds": 20.0, **settings})
        self.engine = ServerEngine(server, runtime, ca_bundle=bundle, sleep=self.slept.append)
        self.source = ModelSource(folder, "a")

    def load(self) -> Asker:
        self.engine.load(self.source)
        return self

    def score(self, *completions: list[int], top_k: int = 0, num_ids: int = NUM_IDS) -> list[TokenScores]:
        return self.engine.score(
            [ScoreRequest(PROMPT, completion) for completion in completions or (COMPLETION,)],
            Scoring(temperature=1.0, num_ids=num_ids, top_k=top_k),
            progress=lambda _: None,
        )

    def sample(self, **changes: Any) -> Any:
        settings = {"temperature": 1.0, "max_new_tokens": 9, "end_ids": (1,), "num_ids": NUM_IDS, **changes}
        request = SampleRequest(PROMPT, (5,))
        [[drawn]] = self.engine.sample([request], Sampling(**settings), progress=lambda _: None)
        return drawn


def truth(folder: Path, *completions: list[int], top_k: int = 0) -> list[TokenScores]:
    return behind(folder).score(
        [ScoreRequest(PROMPT, completion) for completion in completions or (COMPLETION,)],
        Scoring(temperature=1.0, num_ids=NUM_IDS, top_k=top_k),
        progress=lambda _: None,
    )


def first(count: int, reply: Callable[[Reply], Reply]) -> Twist:
    """Answers so the first `count` times, and honestly after."""
    return lambda number, honest_reply: reply(honest_reply) if number < count else honest_reply


# ------------------------------------------------------------------------------------ what is repeated

PASSING: dict[str, Callable[[Reply], Reply]] = {
    "500": lambda _: Reply({"error": {"message": "boom"}}, 500),
    "503 without a text": lambda _: Reply(b"", 503),
    "408": lambda _: Reply(b"slow", 408),
    "429": lambda _: Reply(b"busy", 429),
    "a reply cut short": lambda reply: Reply(reply.body, how="cut"),
    "JSON cut short": lambda reply: Reply(json.dumps(reply.body).encode()[:-3]),
    "a broken connection": lambda reply: Reply(reply.body, how="reset"),
    "no reply in time": lambda reply: Reply(reply.body, how="late"),
}


@pytest.mark.parametrize("kind", PASSING)
def test_what_passes_is_asked_again_after_a_growing_delay(kind: str, served: Served, tmp_path: Path) -> None:
    slow = kind == "no reply in time"
    asker = Asker(tmp_path, served.url, **({"timeout_seconds": 0.2} if slow else {})).load()
    served.twist = first(1 if slow else 3, PASSING[kind])
    [found] = asker.score()
    [expected] = truth(tmp_path)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-6)
    assert len(asker.slept) == len(served.bodies) - 1 == (1 if slow else 3)
    for number, seconds in enumerate(asker.slept):
        assert 0.25 * 2**number <= seconds <= 0.75 * 2**number


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("7", 7, 7),
        ("999999", MAX_RETRY_AFTER_SECONDS, MAX_RETRY_AFTER_SECONDS),
        (lambda: format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True), 50, 60),
        ("soon", 0.25, 0.75),
        ("-5", 0.25, 0.75),
    ],
)
def test_a_server_that_says_when_to_come_back_is_left_alone_until_then(
    value: Any, least: float, most: float, served: Served, tmp_path: Path
) -> None:
    asker = Asker(tmp_path, served.url).load()
    header = value if isinstance(value, str) else value()
    served.twist = first(1, lambda _: Reply(b"busy", 429, {"Retry-After": header}))
    asker.score()
    [seconds] = asker.slept
    assert least <= seconds <= most


def test_a_request_is_given_up_after_its_retries_with_what_is_kept(served: Served, tmp_path: Path) -> None:
    asker = Asker(tmp_path, served.url, retries=2).load()
    served.twist = lambda _number, _reply: Reply({"error": {"message": "out of blocks"}}, 500)
    with pytest.raises(EngineError, match=r"failed 3 times, at last: HTTP 500: out of blocks") as caught:
        asker.score()
    assert served.url in caught.value.message
    assert "parts are kept" in caught.value.hint
    assert len(served.bodies) == 3


def test_so_many_failures_in_a_row_of_all_requests_end_it(served: Served, tmp_path: Path) -> None:
    asker = Asker(tmp_path, served.url, retries=1000, max_failures=7, concurrency=3).load()
    served.twist = lambda _number, _reply: Reply(b"", 500)
    with pytest.raises(EngineError, match="7 requests in a row failed") as caught:
        asker.score(*[[token] for token in range(12)])
    assert "parts are kept" in caught.value.hint
    assert "max_failures" in caught.value.hint
    assert 7 <= len(served.bodies) <= 7 + 3  # those that were under way


def test_a_success_between_failures_begins_the_count_anew(served: Served, tmp_path: Path) -> None:
    asker = Asker(tmp_path, served.url, max_failures=3, concurrency=1).load()
    served.twist = lambda number, reply: reply if number % 3 == 2 else Reply(b"", 500)
    found = asker.score(*[[token] for token in range(8)])
    assert len(found) == 8
    assert len(served.bodies) == 24


def test_requests_are_repeated_with_the_seed_that_they_had(served: Served, tmp_path: Path) -> None:
    asker = Asker(tmp_path, served.url).load()
    honest_one = asker.sample()
    served.twist = lambda number, reply: reply if number > 1 else Reply(b"", 503)
    served.bodies.clear()
    assert asker.sample() == honest_one
    assert served.bodies[0] == served.bodies[1] == served.bodies[2]


# --------------------------------------------------------------------------------------- several servers


def test_of_two_servers_both_are_asked_in_turn(tmp_path: Path) -> None:
    with serve(behind(tmp_path), rows=NUM_IDS) as one, serve(behind(tmp_path), rows=NUM_IDS) as two:
        asker = Asker(tmp_path, one.url, two.url + "/", concurrency=2).load()
        asker.score(*[[token] for token in range(12)])
        assert len(one.bodies) == len(two.bodies) == 6


def test_of_two_servers_a_dead_one_costs_no_request_and_no_wait(tmp_path: Path) -> None:
    with serve(behind(tmp_path), rows=NUM_IDS) as dead:
        pass
    with serve(behind(tmp_path), rows=NUM_IDS) as alive:
        asker = Asker(tmp_path, dead.url, alive.url, retries=1).load()
        completions = [[token, 3] for token in range(12)]
        found = asker.score(*completions)
        for row, expected in zip(found, truth(tmp_path, *completions), strict=True):
            np.testing.assert_allclose(row.logprobs, expected.logprobs, atol=1e-6)
        assert len(alive.bodies) == 12
        assert asker.slept == []


def test_of_two_servers_one_that_begins_to_fail_is_left_to_the_other(tmp_path: Path) -> None:
    with serve(behind(tmp_path), rows=NUM_IDS) as bad, serve(behind(tmp_path), rows=NUM_IDS) as good:
        asker = Asker(tmp_path, bad.url, good.url, concurrency=1).load()
        bad.twist = lambda _number, _reply: Reply(b"", 500)
        assert len(asker.score(*[[token] for token in range(12)])) == 12
        assert len(good.bodies) == 12
        assert 1 <= len(bad.bodies) <= 2
        assert asker.slept == []


def test_no_server_at_all_is_told_after_some_patience(tmp_path: Path) -> None:
    with serve(behind(tmp_path), rows=NUM_IDS) as dead:
        pass
    asker = Asker(tmp_path, dead.url, retries=2)
    with pytest.raises(EngineError, match=r"/v1/models: failed 3 times.*(refused|Connection)"):
        asker.load()
    assert len(asker.slept) == 2


def test_no_more_requests_are_under_way_than_allowed_and_order_is_kept(
    served: Served, tmp_path: Path
) -> None:
    together = threading.Barrier(3)
    lock, now, most = threading.Lock(), 0, 0

    def twist(_number: int, reply: Reply) -> Reply:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        together.wait(20)  # nobody goes on before three are here
        with lock:
            now -= 1
        return reply

    served.twist = twist
    completions = [[token, token] for token in range(12)]
    found = Asker(tmp_path, served.url, concurrency=3).load().score(*completions)
    assert most == 3
    for row, expected in zip(found, truth(tmp_path, *completions), strict=True):
        np.testing.assert_allclose(row.logprobs, expected.logprobs, atol=1e-6)


# ------------------------------------------------------------------------- what is refused and not repeated


def refused(asker: Asker, served: Served, match: str, **asked: Any) -> EngineError:
    """The error of one score; there was one attempt only."""
    before = len(served.bodies)
    with pytest.raises(EngineError, match=match) as caught:
        asker.score(**asked)
    assert len(served.bodies) == before + 1
    assert asker.slept == []
    assert served.url in caught.value.message
    return caught.value


def edited(edit: Callable[[dict[str, Any]], None]) -> Twist:
    """Changes the body of every honest reply."""

    def twist(_number: int, reply: Reply) -> Reply:
        body = copy.deepcopy(reply.body)
        edit(body)
        return Reply(body)

    return twist


def at(position: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    """Changes what is said of the id at a position of the prompt."""

    def edit(body: dict[str, Any]) -> None:
        choice = body["choices"][0]
        choice["prompt_logprobs"][position][str(choice["prompt_token_ids"][position])] |= values

    return edit


def choice(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["choices"][0].update(values)


def rows(change: Callable[[list[Any]], Any]) -> Callable[[dict[str, Any]], None]:
    def edit(body: dict[str, Any]) -> None:
        body["choices"][0]["prompt_logprobs"] = change(body["choices"][0]["prompt_logprobs"])

    return edit


def drop(position: int, which: Callable[[str, Any], bool]) -> Callable[[dict[str, Any]], None]:
    """Leaves out entries of a position."""

    def edit(body: dict[str, Any]) -> None:
        row = body["choices"][0]["prompt_logprobs"][position]
        for key in [key for key, value in row.items() if which(key, value)]:
            del row[key]

    return edit


def swap_ranks(body: dict[str, Any]) -> None:
    values = sorted(body["choices"][0]["prompt_logprobs"][5].values(), key=lambda value: value["rank"])
    values[0]["rank"], values[1]["rank"] = 2, 1


def too_heavy(body: dict[str, Any]) -> None:
    """Each of them alone could be."""
    for value in body["choices"][0]["prompt_logprobs"][5].values():
        value["logprob"] = math.log({1: 0.9, 2: 0.45, 3: 0.3, 4: 0.2}.get(value["rank"], 1e-9))


LAST = len(PROMPT) + len(COMPLETION) - 1
WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another model": (
        lambda body: body.update(model="other"),
        "answers as model 'other', asked was 'served'",
    ),
    "no model": (lambda body: body.pop("model"), "answers as model None"),
    "no choice": (lambda body: body.update(choices=[]), "expected one choice"),
    "two choices": (lambda body: body.update(choices=body["choices"] * 2), "expected one choice"),
    "no echo": (choice(prompt_token_ids=None), "does not repeat the ids"),
    "other ids": (choice(prompt_token_ids=[*PROMPT, *COMPLETION[:-1], 6]), "read other ids than it was sent"),
    "an id more": (choice(prompt_token_ids=[0, *PROMPT, *COMPLETION]), "9 of them, sent were 8"),
    "no scores": (choice(prompt_logprobs=None), "no prompt_logprobs"),
    "a score less": (rows(lambda found: found[:-1]), "of 7 positions with nothing for the first, expected 8"),
    "a score more": (rows(lambda found: [*found, found[-1]]), "of 9 positions"),
    "a score for the first": (rows(lambda found: [found[1], *found[1:]]), "with something for the first"),
    "scores a position late": (
        rows(lambda found: [None, *found[:-1]]),
        "position 1 has no log-prob of its own id",
    ),
    "scores a position early": (
        rows(lambda found: [None, *found[2:], found[1]]),
        "position 1 has no log-prob of its own id 6",
    ),
    "nothing for a token": (drop(LAST, lambda *_: True), "position 7 has no log-prob of its own id 5"),
    "the token is missing": (
        drop(5, lambda key, _: key == "9"),
        "position 5 has no log-prob of its own id 9",
    ),
    "nan": (at(5, logprob=math.nan), "id 9: its log-prob is nan, expected a finite number"),
    "null": (at(5, logprob=None), "its log-prob is None"),
    "text": (at(5, logprob="-1.0"), "its log-prob is '-1.0'"),
    "minus infinity": (at(5, logprob=-math.inf), "its log-prob is -inf"),
    "vLLM's minus infinity": (at(5, logprob=-9999.0), "has no probability at all"),
    "a positive log-prob": (at(4, logprob=0.01), "its log-prob is 0.01, expected 0 or less"),
    "no rank": (at(4, rank=None), "id 3 has no rank"),
    "a rank that cannot be": (
        at(4, rank=2, logprob=-0.2),
        "at rank 2: so many ids as probable|of the 4 most",
    ),
    "no id": (rows(lambda found: [*found[:-1], {**found[-1], "w5.": {}}]), "no id with its log-prob"),
}
WRONG_TOP: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a top id is missing": (
        drop(5, lambda key, value: value["rank"] == 3 and key != "9"),
        r"position 5: of the 4 most probable ids it gives ranks \[1, 2, 4\]",
    ),
    "all top ids are missing": (drop(5, lambda key, _: key != "9"), "of the 4 most probable ids"),
    "ranks out of order": (swap_ranks, "a less probable rank has the higher log-prob"),
    "more than all mass": (too_heavy, "its probabilities sum to more than 1"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("top_k", [0, 4])
def test_a_reply_that_cannot_be_right_is_refused(
    case: str, top_k: int, served: Served, tmp_path: Path
) -> None:
    edit, match = WRONG[case]
    asker = Asker(tmp_path, served.url).load()
    asker.score(top_k=top_k)  # the honest reply is taken
    served.twist = edited(edit)
    refused(asker, served, match, top_k=top_k)


@pytest.mark.parametrize("case", WRONG_TOP)
def test_top_ids_that_cannot_be_right_are_refused(case: str, served: Served, tmp_path: Path) -> None:
    edit, match = WRONG_TOP[case]
    asker = Asker(tmp_path, served.url).load()
    asker.score(top_k=4)
    served.twist = edited(edit)
    refused(asker, served, match, top_k=4)


def test_rounding_above_zero_is_zero(served: Served, tmp_path: Path) -> None:
    served.twist = edited(at(4, logprob=5e-5, rank=1))
    [found] = Asker(tmp_path, served.url).load().score()
    assert found.logprobs[1] == 0


WRONG_SAMPLES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another model": (lambda body: body.update(model="other"), "answers as model 'other'"),
    "other ids": (choice(prompt_token_ids=[1]), "read other ids"),
    "no ids": (choice(token_ids=None), "no token_ids"),
    "no log-probs": (choice(logprobs=None), "its log-probs are not of the"),
    "log-probs of other ids": (choice(token_ids=[3] * 9), "its log-probs are not of the"),
    "a reason that is none": (choice(finish_reason="repetition"), "ended for 'repetition'"),
    "stopped at no end": (choice(finish_reason="stop"), "ended for 'stop' after 9 tokens"),
    "a log-prob too few": (
        lambda body: body["choices"][0]["logprobs"]["token_logprobs"].pop(),
        "8 log-probs for 9 ids",
    ),
    "nan": (
        lambda body: body["choices"][0]["logprobs"].update(token_logprobs=[math.nan] * 9),
        "token 0: its log-prob is nan",
    ),
}


@pytest.mark.parametrize("case", WRONG_SAMPLES)
def test_a_sample_that_was_not_drawn_as_asked_is_refused(case: str, served: Served, tmp_path: Path) -> None:
    edit, match = WRONG_SAMPLES[case]
    asker = Asker(tmp_path, served.url).load()
    assert asker.sample(end_ids=()).finish_reason == "length"
    served.twist = edited(edit)
    with pytest.raises(EngineError, match=match):
        asker.sample(end_ids=())


def test_an_id_out_of_use_that_was_sampled_is_named(served: Served, tmp_path: Path) -> None:
    asker = Asker(tmp_path, served.url).load()
    with pytest.raises(EngineError, match="only ids below 3 count"):
        asker.sample(num_ids=3, end_ids=())


def test_another_refusal_is_told_at_once_in_short_and_without_control_codes(
    served: Served, tmp_path: Path
) -> None:
    asker = Asker(tmp_path, served.url).load()
    said = "no\x1b[2J such\n\tthing\x00 " + "x" * 5000
    served.twist = lambda _number, _reply: Reply({"error": {"message": said}}, 400)
    error = refused(asker, served, r"HTTP 400: no \[2J such thing xxx.*\.\.\.$")
    assert len(error.message) < 450
    assert error.message.isprintable()
    served.twist = lambda _number, _reply: Reply(b"\xff\xfe plain", 422)
    refused(asker, served, "HTTP 422: .* plain")


@pytest.mark.parametrize("concurrency", [1, 4])
def test_after_a_refusal_nothing_more_is_sent_and_the_refusal_is_told(
    concurrency: int, served: Served, tmp_path: Path
) -> None:
    asker = Asker(tmp_path, served.url, concurrency=concurrency).load()
    refusal = Reply({"error": {"message": "the third"}}, 400)
    served.twist = lambda number, reply: refusal if number == 2 else reply
    with pytest.raises(EngineError, match="HTTP 400: the third"):
        asker.score(*[[token % 12] for token in range(40)])
    if concurrency == 1:  # with more, others may have begun while the refusal was on its way
        assert len(served.bodies) == 3
    served.twist = honest
    assert len(asker.score()) == 1


def test_a_reply_that_cannot_be_right_is_told_with_its_request(served: Served, tmp_path: Path) -> None:
    asker = Asker(tmp_path, served.url, concurrency=1).load()
    wrong = edited(lambda body: body["choices"][0].pop("prompt_logprobs"))
    served.twist = lambda number, reply: wrong(number, reply) if number == 1 else reply
    with pytest.raises(EngineError, match=r"^request 1: http.*: no prompt_logprobs") as caught:
        asker.score([1], [2], [3])
    assert caught.value.request == 1


def test_what_a_failure_left_under_way_ends_nothing_that_is_asked_later(
    served: Served, tmp_path: Path
) -> None:
    asker = Asker(tmp_path, served.url, concurrency=2).load()
    both_came, late = threading.Barrier(2), threading.Event()

    def refusing(number: int, _reply: Reply) -> Reply:
        both_came.wait(20)
        if number == 0:
            late.wait(20)
        return Reply({"error": {"message": f"number {number}"}}, 400)

    served.twist = refusing
    with pytest.raises(EngineError, match="HTTP 400: number 1"):
        asker.score([1], [2])
    left = [thread for thread in threading.enumerate() if thread.name.startswith("kdpipe-server")]
    assert left

    def honest_after_it(_number: int, reply: Reply) -> Reply:
        late.set()
        for thread in left:
            thread.join(20)
        return reply

    served.twist = honest_after_it
    assert len(asker.score([1], [2], [3], [4])) == 4


def test_a_redirect_is_not_followed(served: Served, tmp_path: Path) -> None:
    with serve(behind(tmp_path), rows=NUM_IDS) as elsewhere:
        asker = Asker(tmp_path, served.url).load()
        for status in (301, 302, 307, 308):
            target = {"Location": f"{elsewhere.url}/completions"}
            served.twist = lambda _n, _r, status=status, target=target: Reply(b"", status, target)
            error = refused(asker, served, f"redirects elsewhere .HTTP {status}")
            assert "not followed" in error.hint
        assert elsewhere.paths == []


def test_a_reply_larger_than_it_can_be_is_refused(served: Served, tmp_path: Path) -> None:
    asker = Asker(tmp_path, served.url).load()
    served.twist = edited(lambda body: body.update(more="x" * (2 << 20)))
    refused(asker, served, "its reply is over .* bytes")


NO_JSON: dict[str, tuple[Reply, str]] = {
    "a login page": (
        Reply(b"\n<!DOCTYPE html>\x1b[2J<p>Sign in", 200, {"Content-Type": "text/html"}),
        r"HTTP 200 with 30 bytes of text/html, no JSON: <!DOCTYPE html> \[2J<p>Sign in$",
    ),
    "compressed by a proxy": (
        Reply(gzip.compress(b"{}"), 200, {"Content-Type": "application/json", "Content-Encoding": "gzip"}),
        "of application/json gzip, no JSON: ",
    ),
    "compressed, though it begins as JSON": (
        Reply(b"{]", 200, {"Content-Encoding": "br"}),
        "no content type br",
    ),
    "a long text": (Reply(b"x" * 5000), "5000 bytes of no content type, no JSON: x{50,150}$"),
    "nothing at all": (Reply(b""), "0 bytes of no content type"),
    "UTF-16": (Reply('{"a": 1'.encode("utf-16")), "16 bytes of no content type"),
}


@pytest.mark.parametrize("case", NO_JSON)
def test_a_whole_reply_that_is_no_json_is_shown_and_not_asked_for_again(
    case: str, served: Served, tmp_path: Path
) -> None:
    asker = Asker(tmp_path, served.url).load()
    served.twist = lambda _number, _reply: NO_JSON[case][0]
    assert refused(asker, served, NO_JSON[case][1]).message.isprintable()


def test_a_reply_that_is_no_object_is_refused(served: Served, tmp_path: Path) -> None:
    asker = Asker(tmp_path, served.url).load()
    served.twist = lambda _number, _reply: Reply([1])
    refused(asker, served, "a JSON list, expected an object")


def test_a_name_that_is_not_served_is_told_with_those_that_are(served: Served, tmp_path: Path) -> None:
    served.names = ("one", "two")
    with pytest.raises(EngineError, match="serves one, two, not 'served'"):
        Asker(tmp_path, served.url).load()


def test_another_name_of_the_same_weights_is_taken(served: Served, tmp_path: Path) -> None:
    served.names, served.says = ("first", MODEL), "first"
    asker = Asker(tmp_path, served.url).load()
    np.testing.assert_allclose(asker.score()[0].logprobs, truth(tmp_path)[0].logprobs, atol=1e-6)
    assert asker.sample().finish_reason


@pytest.mark.parametrize(
    ("names", "roots"),
    [
        (("first", MODEL), ("path/of/it", "path/of/an/adapter")),
        (("first", MODEL), (None,)),
        ((MODEL,), ("path/of/it",)),
    ],
    ids=["other weights", "a list that does not tell", "a proxy that renames"],
)
def test_a_reply_under_another_name_is_refused_with_the_name_to_write(
    names: tuple[str, ...], roots: tuple[str | None, ...], served: Served, tmp_path: Path
) -> None:
    served.names, served.roots, served.says = names, roots, "first"
    with pytest.raises(EngineError, match="answers as model 'first', asked was 'served'") as caught:
        Asker(tmp_path, served.url).load()
    assert caught.value.hint.endswith("teachers[].server.model: first")


def test_each_server_has_to_serve_the_model(served: Served, tmp_path: Path) -> None:
    with serve(behind(tmp_path), rows=NUM_IDS, names=("other",)) as second:
        with pytest.raises(EngineError, match="serves other, not 'served'") as caught:
            Asker(tmp_path, served.url, second.url).load()
        assert second.url in caught.value.message


def test_servers_of_other_weights_under_one_name_are_refused(served: Served, tmp_path: Path) -> None:
    with serve(behind(tmp_path), rows=NUM_IDS) as same, serve(behind(tmp_path, "b"), rows=NUM_IDS) as other:
        engine = Asker(tmp_path, served.url, same.url).load().engine
        assert engine.signature == pytest.approx(
            behind(tmp_path)
            .score(
                [ScoreRequest(SEQUENCE[:1], SEQUENCE[1:])],
                Scoring(temperature=1.0, num_ids=NUM_IDS),
                progress=lambda _: None,
            )[0]
            .logprobs.tolist()
        )
        with pytest.raises(EngineError, match="serve other weights as 'served'") as caught:
            Asker(tmp_path, served.url, same.url, other.url).load()
        assert other.url in caught.value.message


def test_what_does_not_fit_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    with serve(behind(tmp_path), rows=NUM_IDS, context=8) as small:
        asker = Asker(tmp_path, small.url).load()
        assert len(asker.score([7, 3, 9, 2])[0].logprobs) == 4  # 3 + 4 and the one that it must generate
        before = len(small.bodies)
        with pytest.raises(ModelError, match="request 0: 8 tokens and 1 new do not fit") as caught:
            asker.score([7, 3, 9, 2, 5])
        assert "--max-model-len" in caught.value.hint
        assert len(small.bodies) == before


@pytest.mark.parametrize("top_k", [0, 3])
def test_other_temperatures_than_1_are_refused_where_they_would_be_ignored(
    served: Served, tmp_path: Path, top_k: int
) -> None:
    asker = Asker(tmp_path, served.url).load()
    request = [ScoreRequest(PROMPT, COMPLETION)]
    with pytest.raises(ModelError, match=r"at temperature 1, asked for was 0\.7"):
        asker.engine.score(
            request, Scoring(temperature=0.7, num_ids=NUM_IDS, top_k=top_k), progress=lambda _: None
        )
    with pytest.raises(EngineError, match="no hidden states"):
        asker.engine.score(
            request,
            Scoring(temperature=1, num_ids=NUM_IDS, top_k=top_k, hidden=True),
            progress=lambda _: None,
        )
    with pytest.raises(ModelError, match=r"asked for was temperature 0\.7"):
        asker.sample(temperature=0.7)
    assert served.bodies == []


def test_nothing_is_asked_of_a_model_that_is_not_loaded(served: Served, tmp_path: Path) -> None:
    asker = Asker(tmp_path, served.url)
    with pytest.raises(EngineError, match="call load first"):
        asker.score()
    asker.load().engine.sleep()
    with pytest.raises(EngineError, match="call load first"):
        asker.sample()


# ---------------------------------------------------------------------------------- ids, supports and tails


def test_ids_that_do_not_count_give_their_places_in_the_top_k_to_those_that_do(tmp_path: Path) -> None:
    count, k = 6, 4
    with serve(behind(tmp_path), rows=NUM_IDS) as served:
        [found] = Asker(tmp_path, served.url).load().score([3, 5, 1, 2], num_ids=count, top_k=k)
    [every] = truth(tmp_path, [3, 5, 1, 2], top_k=NUM_IDS)
    assert every.topk_ids is not None
    assert every.topk_logprobs is not None
    assert found.topk_ids is not None
    assert found.tail_logprobs is not None
    assert (every.topk_ids[:, :k] >= count).any()
    for t in range(4):
        order = [i for i in range(NUM_IDS) if every.topk_ids[t, i] < count][:k]
        assert found.topk_ids[t].tolist() == every.topk_ids[t, order].tolist()
        rest = 1 - np.exp(every.topk_logprobs[t, order].astype(np.float64)).sum()
        assert found.tail_logprobs[t] == pytest.approx(math.log(rest), abs=1e-5)
    assert sorted({body["prompt_logprobs"] for body in served.bodies})[0] == k
    assert len(served.bodies) > 1


def test_a_tail_of_nothing_is_floored_and_finite(served: Served, tmp_path: Path) -> None:
    def sure(body: dict[str, Any]) -> None:
        for row in body["choices"][0]["prompt_logprobs"][1:]:
            for value in row.values():
                value["logprob"] = {1: -1e-9}.get(value["rank"], -60.0 - value["rank"])

    served.twist = edited(sure)
    [found] = Asker(tmp_path, served.url).load().score(top_k=3)
    np.testing.assert_allclose(found.tail_logprobs, np.full(5, math.log(TAIL_FLOOR)), rtol=1e-6)


def test_every_setting_that_a_server_may_have_its_own_default_for_is_sent(
    served: Served, tmp_path: Path
) -> None:
    asker = Asker(tmp_path, served.url).load()
    asker.sample()
    asker.score(top_k=3)
    for body in served.bodies:
        assert (body["top_p"], body["top_k"], body["min_p"]) == (1, 0, 0)
        assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (1, 0, 0)
        assert body["ignore_eos"] is True
        assert (body["n"], body["stream"], body["echo"]) == (1, False, False)
        assert body["prompt"][:3] == PROMPT


# --------------------------------------------------------------------------------------------- secrets


def texts(error: BaseException) -> str:
    """All that an error may show anywhere, with what it came from."""
    shown = [*traceback.format_exception(error), repr(error), str(vars(error))]
    return "\n".join(shown)


LEAKS: dict[str, Callable[[Reply], Reply]] = {
    "400": lambda _: Reply({"error": {"message": f"bad header Bearer {KEY}"}}, 400),
    "401": lambda _: Reply({"error": {"message": f"'{KEY}' is not valid"}}, 401),
    "403": lambda _: Reply(f"no entry for {KEY}".encode(), 403),
    "404": lambda _: Reply({"message": KEY}, 404),
    "cut in the key": lambda _: Reply(("x " * 145 + KEY).encode(), 400),
    "with control codes": lambda _: Reply(f"{KEY[:4]}{KEY[4:]}\x07".encode(), 400),
    "redirect": lambda _: Reply(b"", 302, {"Location": f"http://127.0.0.1:9/{KEY}"}),
    "500": lambda _: Reply({"error": {"message": f"crashed on {KEY}"}}, 500),
    "another model": lambda reply: Reply({**reply.body, "model": f"m {KEY}"}),
    "a long name cut in the key": lambda reply: Reply({**reply.body, "model": "m" * 225 + KEY}),
    "a broken connection": lambda reply: Reply(reply.body, how="reset"),
}


@pytest.mark.parametrize("case", LEAKS)
def test_the_key_is_sent_and_never_said(
    case: str, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", KEY)
    served.key = KEY
    asker = Asker(tmp_path, served.url, key="CANARY", retries=1).load()
    asker.score()  # without the key the server would refuse
    served.twist = lambda _number, reply: LEAKS[case](reply)
    with pytest.raises(EngineError) as caught:
        asker.score()
    shown = texts(caught.value)
    assert all(KEY[i : i + 8] not in shown for i in range(len(KEY) - 7)), shown
    for held in (asker.engine, vars(asker.engine), asker.engine._client):
        assert KEY not in repr(held)


def test_a_key_of_digits_leaves_the_digits_of_scores_alone(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", "1")
    served.key = "1"
    [found] = Asker(tmp_path, served.url, key="CANARY").load().score()
    np.testing.assert_allclose(found.logprobs, truth(tmp_path)[0].logprobs, atol=1e-6)


def test_a_wrong_key_is_told_by_the_name_of_its_variable(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", KEY)
    served.key = "another"
    with pytest.raises(EngineError, match="HTTP 401") as caught:
        Asker(tmp_path, served.url, key="CANARY").load()
    assert "CANARY" in caught.value.hint
    assert KEY not in texts(caught.value)
    with pytest.raises(EngineError, match="HTTP 401") as caught:
        Asker(tmp_path, served.url).load()
    assert "api_key_env" in caught.value.hint


def test_neither_proxies_nor_accounts_of_the_environment_are_used(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login me password {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    asker = Asker(tmp_path, served.url, retries=0).load()
    asker.score()
    assert {name: value for name, value in served.headers[-1].items() if name == "Authorization"} == {}


@pytest.mark.parametrize("value", [None, "", "  ", f"{KEY}\nX-More: 1", f"{KEY} {KEY}", f"{KEY}\u20ac"])
def test_a_key_that_is_none_is_refused_without_being_shown(
    value: str | None, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CANARY", raising=False)
    if value is not None:
        monkeypatch.setenv("CANARY", value)
    with pytest.raises(EngineError, match="CANARY") as caught:
        Asker(tmp_path, served.url, key="CANARY")
    assert KEY not in texts(caught.value)


# ------------------------------------------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths


@contextmanager
def serve_tls(folder: Path, certificate: tuple[Path, Path]) -> Iterator[Served]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with serve(behind(folder), rows=NUM_IDS, tls=context) as served:
        yield served


def test_a_certificate_that_nobody_vouches_for_is_refused_and_a_named_one_is_taken(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    with serve_tls(tmp_path, certificate) as served:
        asker = Asker(tmp_path, served.url)
        with pytest.raises(EngineError, match="CERTIFICATE_VERIFY_FAILED") as caught:
            asker.load()
        assert "ca_bundle" in caught.value.hint
        assert asker.slept == []
        assert served.paths == []
        [found] = Asker(tmp_path, served.url, ca_bundle=certificate[0]).load().score()
        [expected] = truth(tmp_path)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-6)


def test_a_bundle_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("no certificate\n")
    for name, why in (("nowhere.pem", "no such file"), ("empty.pem", "holds no certificates")):
        with pytest.raises(EngineError, match=f"{name}: {why}"):
            Asker(tmp_path, "https://127.0.0.1:9/v1", ca_bundle=tmp_path / name)


def test_honest_replies_are_the_engines_behind(served: Served, tmp_path: Path) -> None:
    assert served.twist is honest
    asker = Asker(tmp_path, served.url).load()
    for top_k, length in itertools.product((0, 1, 5, NUM_IDS), (0, 1, 5)):
        [found], [expected] = (
            asker.score(COMPLETION[:length], top_k=top_k),
            truth(tmp_path, COMPLETION[:length], top_k=top_k),
        )
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-6)
        if top_k:
            assert found.topk_ids is not None
            assert expected.topk_ids is not None
            assert found.topk_ids.tolist() == expected.topk_ids.tolist()
