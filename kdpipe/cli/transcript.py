"""Completions in a terminal, token by token, coloured by what each adds to the reverse KL.

Where piped, the largest are listed with their numbers.
Orange backgrounds: the student is surer than the teacher; blue: the teacher is. Lines are broken between tokens. Model
and data text passes through `visible` before anything of ours is put around it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence

from rich.cells import cell_len, chop_cells

from kdpipe.cli.terminal import COLUMNS, Paint, counted, indented
from kdpipe.results.completions import Change, GradedCompletion, Token
from kdpipe.results.samples import Sample, Samples
from kdpipe.results.visible_text import visible

EDGES = (0.1, 0.5, 1.5, 4.0)
"""Nats from which a shade begins, as on the page."""
# Of the 256 colours: foreground and background, readable on dark and light terminals alike.
STUDENT_SURER = ("38;5;16;48;5;230", "38;5;16;48;5;222", "38;5;16;48;5;214", "38;5;16;48;5;208")
TEACHER_SURER = ("38;5;16;48;5;195", "38;5;16;48;5;153", "38;5;16;48;5;111", "38;5;16;48;5;75")
MARK = "  > "
MOST = 5
"""How many tokens are listed with their numbers."""
NOTABLE_NATS = 0.1


def transcript_lines(found: Samples, paint: Paint, *, coloured: bool) -> list[str]:
    """All of it as lines of at most 80 columns."""
    counted = f"{len(found.shown)} of {found.matching} completions"
    rest = "" if found.matching == found.total else f", of {found.total} altogether"
    lines = [f"{paint(visible(found.step), 'bold')}: {counted}{rest}"]
    if coloured and any(token.gap is not None for one in found.shown for token in one.completion.tokens):
        less = [_shaded(f" -{edge:g} ", -edge) for edge in reversed(EDGES)]
        more = [_shaded(f" +{edge:g} ", edge) for edge in EDGES]
        lines.append(f"teacher surer {''.join(less)} 0 {''.join(more)} student surer, nats")
    for sample in found.shown:
        lines += ["", *_sample_lines(sample, paint, coloured=coloured)]
    return lines


def _sample_lines(sample: Sample, paint: Paint, *, coloured: bool) -> list[str]:
    completion = sample.completion
    lines = [*_heading(completion, paint), *_wrapped(completion.question, paint("  | ", "dim"))]
    is_scored = any(token.gap is not None for token in completion.tokens)
    if is_scored:
        lines += [paint(MARK, "dim") + line for line in _token_lines(completion.tokens, coloured=coloured)]
    else:
        lines += _wrapped(completion.text, paint(MARK, "dim"))
    lines += [paint(line, "dim") for line in indented(visible(_outcome(completion)), "  ", "    ")]
    if is_scored:
        lines += _disagreements(completion.tokens, paint)
    if completion.change is not None:
        lines += _change_lines(completion.change, paint)
    if sample.mismatch:
        lines += [paint(line, "dim") for line in indented(_mismatch_line(sample), "  ", "    ")]
    return lines


def _outcome(completion: GradedCompletion) -> str:
    """What was read in the text, and whether it was cut; empty where there is nothing to say."""
    cut = "cut at the length limit" if completion.is_truncated else ""
    if completion.is_right is None:
        return cut
    found = "no answer" if completion.answer is None else f"found {completion.answer}"
    return f"expected {completion.expected or '?'}, {found}{cut and ', '}{cut}"


def _heading(completion: GradedCompletion, paint: Paint) -> list[str]:
    which = "reference text" if completion.source == "reference" else f"sample {completion.sample}"
    which += " of the teacher" if completion.source == "teacher" else ""
    return [
        f"{paint(f'{visible(completion.prompt_id)} {which}', 'bold')}{_grade(completion.is_right, paint)}"
    ]


def _grade(is_right: bool | None, paint: Paint) -> str:
    """The end of a heading that says whether an answer is right; empty where nothing is graded."""
    return "" if is_right is None else f": {paint('right', 'green') if is_right else paint('wrong', 'red')}"


def _change_lines(change: Change, paint: Paint) -> list[str]:
    lines = []
    for title, right, text in (
        ("at first", change.was_right, change.before),
        ("now", change.is_right, change.after),
    ):
        what = "answer" if right is None else "graded"
        lines += [f"  {what} {title}{_grade(right, paint)}", *_wrapped(text, paint("  : ", "dim"))]
    return lines


def _mismatch_line(sample: Sample) -> str:
    mean, most = sample.mismatch["mismatch_nats_mean"], sample.mismatch["mismatch_nats_max"]
    tokens = f"{sample.mismatch['mismatch_acted_tokens']:.0f} of {counted(sample.num_tokens, 'token')}"
    return f"sampler minus trainer: mean {mean:+.1e}, at most {most:.1e} nats; controls act on {tokens}"


def _token_lines(tokens: Sequence[Token], *, coloured: bool) -> Iterator[str]:
    """The text of the tokens, broken between them where a line is full, and where they hold newlines."""
    width = COLUMNS - len(MARK)
    line, used = "", 0
    for token in tokens:
        pieces = visible(token.piece.text).split("\n")
        for number, piece in enumerate(pieces):
            if number:
                yield line + (_shaded("↵", token.gap) if coloured else "")
                line, used = "", 0
            for part in chop_cells(piece, width):
                if used + _columns(part) > width and used:
                    yield line
                    line, used = "", 0
                line += _shaded(part, token.gap) if coloured else part
                used += _columns(part)
    if line:
        yield line


def _columns(text: str) -> int:
    """The columns that a terminal gives to a text, at most."""
    return cell_len(text) + 8 * text.count("\t")


def _shaded(text: str, gap: float | None) -> str:
    """A text with the background of what its token adds to the reverse KL."""
    level = 0 if gap is None else sum(abs(gap) >= edge for edge in EDGES)
    if not level or gap is None or not text:
        return text
    codes = STUDENT_SURER if gap > 0 else TEACHER_SURER
    return f"\x1b[{codes[level - 1]}m{text}\x1b[0m"


def _disagreements(tokens: Sequence[Token], paint: Paint) -> list[str]:
    """The tokens of largest disagreement, with their numbers and what the teacher would have said."""
    gaps = {index: gap for index, token in enumerate(tokens) if (gap := token.gap) is not None}
    notable = sorted(gaps, key=lambda index: (abs(gaps[index]), index), reverse=True)[:MOST]
    mean = sum(gaps.values()) / max(1, len(gaps))
    lines = [paint(f"  reverse KL {mean:+.3f} nats a token, mean of {len(gaps)}", "dim")]
    for index in sorted(index for index in notable if abs(gaps[index]) >= NOTABLE_NATS):
        token = tokens[index]
        assert token.student is not None
        assert token.teacher is not None
        shown = (
            f"{index:>5}  {_quoted(token.piece.text):<14} {gaps[index]:+8.3f} nats  "
            f"{_chance(token.student)} against {_chance(token.teacher)}"
        )
        others = [
            f"{_quoted(text)} {_chance(logprob).strip()}"
            for text, logprob in token.alternatives[:2]
            if text.strip() != token.piece.text.strip()
        ]
        instead = f"  teacher: {others[0]}" if others else ""
        lines.append(paint((shown + instead)[:COLUMNS], "dim"))
    return lines


def _quoted(text: str) -> str:
    shown = visible(text.replace("\n", "\\n").replace("\t", "\\t"))
    return f"'{shown}'" if len(shown) <= 12 else f"'{shown[:11]}…'"


def _chance(logprob: float) -> str:
    share = 100 * math.exp(logprob)
    return f"{share:5.1f}%" if share >= 0.1 else f"{share:5.1g}%"


def _wrapped(text: str, mark: str) -> list[str]:
    """Each line of a text after a mark, so that model text cannot pass for ours."""
    lines: list[str] = []
    for line in visible(text).split("\n"):
        lines += [
            f"{mark}{piece}"
            for piece in textwrap.wrap(line, COLUMNS - len(MARK), drop_whitespace=False) or [""]
        ]
    return lines
