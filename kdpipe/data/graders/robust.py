r"""The robust reader of numbers: better than lm-evaluation-harness's two, and so equal to neither.

It reads the last `\boxed{...}`, else what stands after the last `####`, else the last number. What is no plain number
(`3:18`, `2^18`) is read whole and is then none, instead of its last digits; `18%` is 0.18 and `18k` is 18000. Every
step takes time in the length of the text only.
"""

from __future__ import annotations

import re
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal

from kdpipe.data.graders.marking import after_thinking, last_box

_LETTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013\u2010\u2011\ufe63\uff0d", "-"),
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
        "\uff05": "%",
        "\u2019": "'",
        "\u2215": "/",
        "\u2044": "/",
    }
)
_WRITINGS = (
    (re.compile(r"\\(?:text\w*|math\w+|mbox)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\times\b"), "×"),
    (re.compile(r"\\cdot\b"), "·"),
    (re.compile(r"\\div\b"), "÷"),
    (re.compile(r"\\sqrt\b\{?"), "√"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;: ]"), "\u2009"),
    (re.compile(r"\\!|\\left\b|\\right\b"), ""),
    (re.compile(r"\\[()\[\]]"), " "),
)
_NEGATIVE = re.compile(r"(?i)\b(?:minus|negative)[ \t]+(?=[$€£¥₹]?[0-9])")
_MARKED = re.compile(r"#{4,}\s*([^\n]*)")
_NUMBERED = re.compile(r"\W*[0-9]+[.)]\s+[A-Za-z]")
_BEFORE_ANSWER = re.compile(r"(?i)(?:.*(?:=|\b(?:answer|result|total|is)\b))?\W*")
_REMARK = re.compile(r"\([^()\n]*[0-9][^()\n]*\)")
_AFTER_NUMBER = re.compile(r"[0-9]\S*(?:[ \t]+[A-Za-z$€£%]+){0,2}[ \t]*$")
_DENIED = re.compile(r"(?i)(?:\bnot|n't|\brather than|\binstead of)[ \t]+[^\w\s]{0,4}[0-9][0-9.,]*")

_SPACES = " \u00a0\u2009\u202f"
_GROUPED = rf"[0-9]{{1,3}}(?:[{_SPACES}][0-9]{{3}}(?![0-9]))++(?:\.[0-9]++)?"
_ATOM = rf"(?:{_GROUPED}|\.?[0-9]++(?:[.,_'][0-9]++)*+(?:[eE][+-]?[0-9]{{1,3}}\b)?)"
_JOIN = r"(?:[:x\-]|[ \t]?(?:\^\{?|\*\*?|[×·÷/+√])[ \t]?|[ \t](?:x|or)[ \t])"
_SCALES = {"%": -2, "percent": -2, "per cent": -2, "k": 3, "K": 3, "M": 6, "B": 9}
_WORDS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SUFFIX = (
    r"(?:[ \t]?(?:%|percent\b|per cent\b)|[kKMB](?![A-Za-z0-9])|[½¼¾⅓⅔⅛²³¹⁰⁴-⁹]|"
    rf"[ \t](?:{'|'.join(_WORDS)})\b)"
)
_MONEY = "[$€£¥₹]"
_NUMBER = re.compile(
    rf"(?:(?<![A-Za-z0-9)\]}}\-])-)?(?:{_MONEY}-?)?√?"
    rf"(?<![A-Za-z0-9])(?<![0-9][.,_'])(?<![A-Za-z]_)(?<!_\{{){_ATOM}(?:{_JOIN}-?{_ATOM})*+{_SUFFIX}?"
)
_PLAIN = (
    rf"(?:(?:[0-9]{{1,3}}(?:,[0-9]{{2,3}})*,[0-9]{{3}}|[0-9]{{1,3}}(?:[{_SPACES}_'][0-9]{{3}})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][+-]?[0-9]{1,3})?"
)
_VALUE = re.compile(rf"(-?){_MONEY}?(-?)({_PLAIN})(?:[ \t]?/[ \t]?({_PLAIN}))?({_SUFFIX})?")
_SEPARATORS = re.compile(rf"[{_SPACES}_',]")


def robust_answer(text: str) -> str | None:
    """What is read as the number of the answer, signs and digits as ASCII has them; None without any."""
    text = after_thinking(text)
    if (boxed := last_box(text)) is not None and (found := _marked_number(_plain(boxed))):
        return found[0]
    for line in reversed(_MARKED.findall(text)):
        plain = _plain(line)
        if (
            (found := _marked_number(plain))
            and _BEFORE_ANSWER.fullmatch(plain[max(0, found.start() - 60) : found.start()])
            and not _NUMBERED.match(plain)
        ):
            return found[0]
    for line in reversed(text.splitlines()):
        if numbers := _NUMBER.findall(_plain(line)):
            return str(numbers[-1])
    return None


def robust_value(answer: str) -> Decimal | None:
    """The number in what `robust_answer` read; a fraction is rounded; None if it is no single number."""
    match = _VALUE.fullmatch(answer)
    if match is None:
        return None
    *signs, numerator, denominator, suffix = match.groups()
    scale = (_SCALES | _WORDS).get((suffix or "").strip(), 0)
    if suffix and not scale:
        return None
    value = Decimal(("-" if any(signs) else "") + _SEPARATORS.sub("", numerator))
    exact = Context(prec=max(100, len(answer)), Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])
    if denominator is not None:
        below = Decimal(_SEPARATORS.sub("", denominator))
        if not below:
            return None
        value = exact.divide(value, below)
    return exact.scaleb(value, scale)


def _marked_number(plain: str) -> re.Match[str] | None:
    """The first number after the last `=` of a marked answer, or the first of all."""
    return _NUMBER.search(plain, plain.rfind("=") + 1) or _NUMBER.search(plain)


def _plain(text: str) -> str:
    """The text in plain characters, less what is not the answer: `18 (2 dozen minus 6)`, `18, not 17`."""

    def remark(match: re.Match[str]) -> str:
        before = match.string[max(0, match.start() - 40) : match.start()]
        return "" if _AFTER_NUMBER.search(before) else match[0]

    text = text.translate(_LETTERS)
    for pattern, plain in _WRITINGS if "\\" in text or "{" in text else ():
        text = pattern.sub(plain, text)
    return _DENIED.sub("", _REMARK.sub(remark, _NEGATIVE.sub("-", text)))
