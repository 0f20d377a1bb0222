"""Probes of text: do student and teacher mean the same by ids, turns and ends? No engine runs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kdpipe.data.rows import Problem
from kdpipe.doctor.finding import Measure, Outcome, failed, skipped
from kdpipe.doctor.lengths import OVERLONG, PromptReader, Split, described
from kdpipe.errors import KdpipeError
from kdpipe.models.prompting import Text, lost_turns, require_unlike
from kdpipe.models.tokenizer import compare_vocabularies
from kdpipe.recipe.objective import Objective
from kdpipe.recipe.schema import Recipe, Teacher
from kdpipe.recipe.task import QuestionTask

SPECIAL = ("bos", "eos", "pad", "unk")
_SHOWN = 60


def vocabulary(student: Text, teacher: Text, *, name: str) -> Outcome:
    """Whether ids that both have stand for equal strings, and how many the teacher lacks."""
    both = compare_vocabularies(
        student.tokenizer,
        teacher.tokenizer,
        names=("the student", f"teacher {name!r}"),
        num_ids=(student.num_ids, teacher.num_ids),
    )
    lacking = len(both.unscorable)
    shared = f"; {lacking} of the student's are not scorable" if lacking else ", all shared"
    return Outcome(f"{both.student_ids} ids in use, the teacher has {both.teacher_ids}{shared}")


def prompt(text: Text, problems: Sequence[Problem], own: str | None = None) -> Outcome:
    """Whether what goes into the prompts of these problems comes out of them."""
    prompts = [text.rendered(problem, own) for problem in problems]
    require_unlike(problems if own is None else (), [prompt.ids for prompt in prompts])
    warnings = [*text.warnings, *lost_turns(prompts)]
    lengths = [len(prompt.ids) for prompt in prompts]
    said = f"{len(prompts)} {text.style.kind} prompts of {min(lengths)} to {max(lengths)} tokens"
    return Outcome("; ".join([said, *warnings, *text.notes]), verdict="warning" if warnings else "ok")


def special_tokens(student: Text, teacher: Text, prompt: Sequence[int]) -> Outcome:
    """The special tokens of both, and whether the student's prompt begins as the teacher expects."""
    kinds = {kind: dict.fromkeys([_special(student, kind), _special(teacher, kind)]) for kind in SPECIAL}
    shown = ", ".join(f"{kind} {' and '.join(found)}" for kind, found in kinds.items())
    bos = student.tokenizer.bos_token_id
    if bos is not None and list(prompt[:2]) == [bos, bos]:
        return failed(
            f"the student's prompt begins with two beginning-of-sequence tokens (id {bos}); {shown}"
        )
    if _begins_with_bos(student) != _begins_with_bos(teacher):
        who = "student" if _begins_with_bos(student) else "teacher"
        return Outcome(
            f"only the {who}'s tokenizer puts a beginning-of-sequence token before a text, and the teacher reads the "
            f"student's ids; {shown}",
            verdict="warning",
        )
    return Outcome(shown)


def _special(text: Text, kind: str) -> str:
    """A special token with its id, `none` where the tokenizer has none."""
    token = text.tokenizer.special_tokens_map.get(f"{kind}_token")
    return "none" if token is None else f"{token!r} {text.tokenizer.convert_tokens_to_ids(token)}"


def _begins_with_bos(text: Text) -> bool:
    bos = text.tokenizer.bos_token_id
    return bos is not None and text.tokenizer.encode("1")[:1] == [bos]


def template(
    student: Text, teacher: Text, settings: Teacher, problem: Problem, *, reads_own: bool
) -> Outcome:
    """The same problem in the template of either, side by side.

    With `reads_own` the teacher reads its own rendering; else it reads the student's ids, and a form that differs from
    that of its own chat template is worth a warning.
    """
    ours = student.prompt(problem)
    if reads_own:
        own = teacher.prompt(problem, settings.prompt)
        return Outcome(
            f"the teacher reads a prompt of its own, {len(own)} tokens: {_shown(teacher, own)}; "
            f"the student {len(ours)}: {_shown(student, ours)}"
        )
    style = replace(teacher.style, kind="chat") if teacher.tokenizer.chat_template else teacher.style
    try:
        own = replace(teacher, style=style).prompt(problem)
    except KdpipeError as error:
        said = f"the teacher reads the student's prompt; its own tokenizer cannot render one: {error.message}"
        return Outcome(said, verdict="warning")
    if own == ours:
        return Outcome(f"both render the same {len(ours)} tokens: {_shown(student, ours)}")
    pairs = zip(ours, own, strict=False)
    place = next((i for i, (one, two) in enumerate(pairs) if one != two), min(len(ours), len(own)))
    return Outcome(
        f"the teacher reads the student's prompt of {len(ours)} tokens, and its own template writes {len(own)} that "
        f"differ from token {place} on: student {_shown(student, ours[place:])}, teacher "
        f"{_shown(teacher, own[place:])}; set teachers[].prompt_style to {style.kind} if it should read its own form",
        verdict="warning",
    )


def _shown(text: Text, ids: Sequence[int]) -> str:
    """The text of ids with its special tokens, shortened in the middle."""
    string: str = text.tokenizer.decode(list(ids), skip_special_tokens=False)
    half = _SHOWN // 2
    return repr(string if len(string) <= _SHOWN else f"{string[:half]} ... {string[-half:]}")


def end_of_sequence(student: Text, teacher: Text, objective: Objective) -> Outcome:
    """Whether the teacher ends its turns with the id that the student's completions end with."""

    def named(text: Text, ids: Sequence[int]) -> str:
        return ", ".join(f"{token} {text.tokenizer.decode([token])!r}" for token in ids)

    said = (
        f"student ends with {named(student, student.end_ids)}; teacher with {named(teacher, teacher.end_ids)}"
    )
    if student.end_id in teacher.end_ids:
        return Outcome(said)
    if objective.end_token != "keep":  # noqa: S105 (no password)
        return Outcome(f"{said}; end_token is {objective.end_token}")
    return failed(
        f"{said}: the teacher finds id {student.end_id} unlikely at every end, and would teach the student never to "
        "stop; set train.objective.end_token to alias (the two ids trade places) or mask"
    )


def context(reader: PromptReader, recipe: Recipe, splits: Mapping[Split, Sequence[Problem]]) -> Outcome:
    """Whether every prompt, with what follows it, fits a model whose config tells its context."""
    if reader.limit is None:
        return skipped("its config tells no end of its context")
    counted = {split: reader.lengths(recipe, split, problems) for split, problems in splits.items()}
    longest = max((one for lengths in counted.values() for one in lengths), key=lambda one: one.total)
    said = f"longest prompt {longest.prompt} + {longest.following} {longest.after} in a context of {reader.limit}"
    measure = Measure("tokens", float(longest.total), float(reader.limit), origin="its context")
    unfit = [
        described(reader, split, found, len(lengths))
        for split, lengths in counted.items()
        if (found := reader.overlong(lengths))
    ]
    if not unfit:
        return Outcome(said, (measure,))
    if isinstance(recipe.task, QuestionTask) and recipe.task.drop_overlong:
        return Outcome(f"{'; '.join(unfit)}: they are left out (task.drop_overlong)", verdict="ok")
    return Outcome(f"{said}; {'; '.join(unfit)}; {OVERLONG}", (measure,))
