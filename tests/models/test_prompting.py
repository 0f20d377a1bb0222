import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kdpipe.data.graders.number import grade_number
from kdpipe.data.rows import Problem, Turn
from kdpipe.data.tasks.arithmetic import read_problems, words
from kdpipe.errors import DataError, EngineError, PreflightError, RecipeError
from kdpipe.models import prompting
from kdpipe.models import tokenizer as tokenizers
from kdpipe.models.prompting import PromptStyle, Text, prompt_style, render_prompt
from kdpipe.recipe.task import ArithmeticTask, Gsm8kTask

PROBLEMS = [
    Problem(f"p/{row}", f"How many {row}?", str(row), f"It is {row}.\n#### {row}") for row in range(4)
]
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
THINKING = CHAT + "{% if not enable_thinking %}<think>\n\n</think>\n{% endif %}"
PLAIN = PromptStyle("plain", "", 0, (), {})


def byte_tokenizer(*added, chat_template=None, adds=None):
    """Every byte is a token; `added` are special tokens after them; `adds` is a post-processor's template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|start|>", "<|end|>"]
    tokenizer.add_special_tokens(special)
    if adds is not None:
        ids = [(token, tokenizer.token_to_id(token)) for token in special]
        tokenizer.post_processor = processors.TemplateProcessing(single=adds, special_tokens=ids)
    tokenizer.add_tokens(list(added))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def text_of(tokenizer, *end_ids):
    return Text(tokenizer, PLAIN, end_ids, tokenizers.num_ids_in_use(tokenizer))


def chat_style(**template_arguments):
    return PromptStyle("chat", "", 0, (), template_arguments)


@pytest.fixture(scope="module")
def arithmetic():
    return tokenizers.arithmetic_tokenizer(words())


# ------------------------------------------------------------------------------------------ tokenizers


def test_arithmetic_texts_come_back_as_they_were_and_are_graded_right(arithmetic):
    train, test = read_problems(ArithmeticTask(kind="arithmetic", max_operand=99, train_problems=1000))
    for problem in train + test:
        prompt = render_prompt(arithmetic, PLAIN, problem)
        completion = text_of(arithmetic).reference(problem)
        assert arithmetic.unk_token_id not in prompt + completion
        assert arithmetic.decode(prompt) == f"{problem.question}\n"
        text = text_of(arithmetic, 1).completion(completion, stop=())
        assert text == problem.solution
        assert grade_number(text, problem.expected, reader="strict").correct
        assert grade_number(text, problem.expected, reader="flexible").correct


def test_arithmetic_prompts_and_completions_are_short(arithmetic):
    train, _ = read_problems(ArithmeticTask(kind="arithmetic"))
    assert max(len(render_prompt(arithmetic, PLAIN, problem)) for problem in train) <= 26
    assert max(len(text_of(arithmetic).reference(problem)) for problem in train) <= 25
    assert 40 <= tokenizers.num_ids_in_use(arithmetic) <= 60


def test_digits_are_single_tokens_and_neighbours_join_to_a_number(arithmetic):
    token_ids = arithmetic.encode("#### 1 2")
    assert token_ids == arithmetic.encode("#### 12") == arithmetic.convert_tokens_to_ids(["####", "1", "2"])
    assert arithmetic.decode(token_ids) == "#### 12"
    assert arithmetic.decode(arithmetic.encode("7 + 12 = 19 pens\n#### 19")) == "7 + 12 = 19 pens\n#### 19"
    assert arithmetic.decode(arithmetic.encode("Tom has 5 pens. How many?")) == "Tom has 5 pens. How many?"


def test_a_saved_arithmetic_tokenizer_is_the_same_when_opened(arithmetic, tmp_path):
    arithmetic.save_pretrained(tmp_path)
    opened = tokenizers.open_tokenizer(tmp_path, trust_remote_code=False)
    text = "Ana has 12 pens.\n12 - 3 = 9 pens\n#### 9"
    assert opened.get_vocab() == arithmetic.get_vocab()
    assert opened.encode(text) == arithmetic.encode(text)
    assert opened.decode(opened.encode(text)) == text
    assert (opened.pad_token_id, opened.eos_token_id, opened.unk_token_id, opened.bos_token_id) == (
        0,
        1,
        2,
        None,
    )


def test_a_folder_without_a_tokenizer_is_an_error_that_names_it(tmp_path):
    for folder in (tmp_path / "gone", tmp_path):
        with pytest.raises(EngineError, match=str(folder)):
            tokenizers.open_tokenizer(folder, trust_remote_code=False)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for content in ("{}", "{", "[1]", '{"version": "1.0", "model": {"type": "None"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(EngineError, match="cannot be opened"):
            tokenizers.open_tokenizer(tmp_path, trust_remote_code=False)


# --------------------------------------------------------------------------------------------- prompts


def conversation(*turns):
    return Problem("c/0", "And now?", None, None, {}, tuple(Turn(*turn) for turn in turns))


def test_a_prompt_has_its_system_turn_its_examples_its_earlier_turns_and_the_question_in_this_order():
    tokenizer = byte_tokenizer(chat_template=CHAT)
    asked = conversation(("user", "Hello."), ("assistant", "Good day."))
    style = PromptStyle("chat", "Be brief.", 1, tuple(PROBLEMS[:2]), {}, system="You count.")
    turns = [
        ("system", "You count."),
        ("user", "Be brief.\n\nHow many 0?"),
        ("assistant", "It is 0.\n#### 0"),
        ("user", "Hello."),
        ("assistant", "Good day."),
        ("user", "And now?"),
    ]
    rendered = "".join(f"<|start|>{role}\n{content}<|end|>\n" for role, content in turns)
    assert tokenizer.decode(render_prompt(tokenizer, style, asked)) == f"<s>{rendered}<|start|>assistant\n"
    plain = "".join(f"{text}\n{'' if role == 'user' else chr(10)}" for role, text in turns)
    style = replace(style, kind="plain")
    assert tokenizer.decode(render_prompt(tokenizer, style, asked)) == plain


def test_a_record_with_a_system_turn_keeps_it_and_a_teachers_own_text_takes_the_place_of_the_question_alone():
    tokenizer = byte_tokenizer()
    asked = conversation(("system", "You sum."), ("user", "1"), ("assistant", "2"))
    style = replace(PLAIN, system="You count.")
    assert tokenizer.decode(render_prompt(tokenizer, style, asked)) == "You sum.\n\n1\n2\n\nAnd now?\n"
    own = tokenizer.decode(render_prompt(tokenizer, style, asked, own="Q: {question}"))
    assert own == "You sum.\n\n1\n2\n\nQ: And now?\n"


def test_a_problem_without_an_answer_is_no_example():
    task = Gsm8kTask(kind="gsm8k", few_shot=1)
    with pytest.raises(DataError, match="c/0 has no answer to show"):
        prompt_style(task, [conversation(), *PROBLEMS], {})


def test_a_chat_prompt_has_the_bos_of_its_template_and_no_second_one():
    tokenizer = byte_tokenizer(chat_template=CHAT, adds="<s> $A </s>")
    prompt = render_prompt(tokenizer, chat_style(), PROBLEMS[1])
    assert tokenizer.decode(prompt) == "<s><|start|>user\nHow many 1?<|end|>\n<|start|>assistant\n"
    assert prompt.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in prompt


def test_template_arguments_reach_the_chat_template():
    tokenizer = byte_tokenizer("<think>", "</think>", chat_template=THINKING)
    quiet = tokenizer.decode(render_prompt(tokenizer, chat_style(enable_thinking=False), PROBLEMS[1]))
    loud = tokenizer.decode(render_prompt(tokenizer, chat_style(enable_thinking=True), PROBLEMS[1]))
    assert quiet == loud + "<think>\n\n</think>\n"


def test_a_template_argument_that_the_template_does_not_use_is_refused():
    tokenizer = byte_tokenizer(chat_template=THINKING)
    with pytest.raises(PreflightError, match="does not use the argument 'enable_thinkng'"):
        render_prompt(tokenizer, chat_style(enable_thinkng=False), PROBLEMS[1])
    with pytest.raises(PreflightError, match="does not use the argument 'thinking'"):
        render_prompt(tokenizer, chat_style(thinking=False), PROBLEMS[1])


def test_a_template_that_refuses_is_an_error_with_its_message():
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PreflightError, match="roles must alternate"):
        render_prompt(byte_tokenizer(chat_template=refusing), chat_style(), PROBLEMS[1])


def test_a_tokenizer_without_chat_template_is_told_to_use_plain_prompts():
    with pytest.raises(PreflightError, match="has no chat template") as caught:
        render_prompt(byte_tokenizer(), chat_style(), PROBLEMS[1])
    assert "task.prompt to plain" in caught.value.hint


@pytest.mark.parametrize(
    ("adds", "text"),
    [
        (None, "How many 1?\n"),
        ("<s> $A", "<s>How many 1?\n"),
        ("<s> $A </s>", "<s>How many 1?\n"),
        ("$A </s>", "How many 1?\n"),
        ("</s> $A", "</s>How many 1?\n"),
    ],
)
def test_a_plain_prompt_keeps_the_tokens_before_the_text_and_drops_those_after(adds, text):
    tokenizer = byte_tokenizer(adds=adds)
    assert tokenizer.decode(render_prompt(tokenizer, PLAIN, PROBLEMS[1])) == text


def test_instruction_and_examples_come_first_in_both_kinds():
    task = Gsm8kTask(kind="gsm8k", few_shot=2, instruction="Solve.", prompt="plain")
    tokenizer = byte_tokenizer(chat_template=CHAT)
    plain = render_prompt(tokenizer, prompt_style(task, PROBLEMS, {}), PROBLEMS[3])
    assert tokenizer.decode(plain) == (
        "Solve.\n\nHow many 0?\nIt is 0.\n#### 0\n\nHow many 1?\nIt is 1.\n#### 1\n\nHow many 3?\n"
    )
    style = prompt_style(task.model_copy(update={"prompt": "chat"}), PROBLEMS, {})
    assert tokenizer.decode(render_prompt(tokenizer, style, PROBLEMS[3])) == (
        "<s><|start|>user\nSolve.\n\nHow many 0?<|end|>\n<|start|>assistant\nIt is 0.\n#### 0<|end|>\n"
        "<|start|>user\nHow many 1?<|end|>\n<|start|>assistant\nIt is 1.\n#### 1<|end|>\n"
        "<|start|>user\nHow many 3?<|end|>\n<|start|>assistant\n"
    )


def test_no_prompt_shows_its_own_solution_and_all_show_as_many_examples():
    style = prompt_style(Gsm8kTask(kind="gsm8k", few_shot=2, prompt="plain"), PROBLEMS, {})
    tokenizer = byte_tokenizer()
    for problem in PROBLEMS:
        text = tokenizer.decode(render_prompt(tokenizer, style, problem))
        assert problem.solution not in text
        assert text.count("It is") == 2


def test_a_problem_that_asks_the_same_in_other_writing_is_no_example_and_no_two_examples_are_one():
    same = replace(PROBLEMS[0], prompt_id="p/9", question=" how MANY\n0?")
    style = prompt_style(Gsm8kTask(kind="gsm8k", few_shot=2, prompt="plain"), [same, *PROBLEMS], {})
    assert [example.prompt_id for example in style.examples] == ["p/9", "p/1", "p/2"]
    for asked in (PROBLEMS[0], same):
        shown = byte_tokenizer().decode(render_prompt(byte_tokenizer(), style, asked)).splitlines()
        assert [line for line in shown if "any" in line.lower()][1:] == [
            "How many 2?",
            *asked.question.split("\n")[:1],
        ]
    system = replace(same, turns=(Turn("system", "Be brief."),))
    assert (
        system.normalized
        == PROBLEMS[0].normalized
        != replace(same, turns=(Turn("user", "Hello."),)).normalized
    )


def test_few_shot_needs_one_train_problem_more_than_examples():
    task = Gsm8kTask(kind="gsm8k", few_shot=4)
    with pytest.raises(DataError, match="train holds 4 problems of different texts, expected at least 5"):
        prompt_style(task, PROBLEMS, {})


def test_template_arguments_with_plain_prompts_are_refused():
    with pytest.raises(RecipeError, match=r"enable_thinking: .* prompts are plain"):
        prompt_style(Gsm8kTask(kind="gsm8k", prompt="plain"), PROBLEMS, {"enable_thinking": False})
    with pytest.raises(RecipeError, match="prompts are plain"):
        prompt_style(ArithmeticTask(kind="arithmetic"), PROBLEMS, {"enable_thinking": False})


def test_a_teachers_own_prompt_is_filled_in_literally():
    tokenizer = byte_tokenizer()
    problem = Problem("p", "Is {solution} {x}?", "1", r"\1 {question} #### 1")
    style = prompt_style(Gsm8kTask(kind="gsm8k", prompt="plain", few_shot=1), PROBLEMS, {})
    text = "{{y}} {question}\nHint: {solution}\n{ z} \\boxed{}"
    prompt = render_prompt(tokenizer, style, problem, text)
    assert tokenizer.decode(prompt) == "{y} Is {solution} {x}?\nHint: \\1 {question} #### 1\n{ z} \\boxed{}\n"
    assert render_prompt(tokenizer, style, problem, None) == render_prompt(tokenizer, style, problem)
    assert render_prompt(tokenizer, PLAIN, problem, "{question}") == render_prompt(tokenizer, PLAIN, problem)
    assert render_prompt(tokenizer, PLAIN, problem, "{question}\n") == render_prompt(
        tokenizer, PLAIN, problem
    )


def test_a_teachers_own_prompt_names_any_field_of_the_record():
    tokenizer = byte_tokenizer()
    fields = {"hint": "carry the {level}", "level": 3, "share": 0.5, "solution": "not this one"}
    problem = Problem("p", "Why?", "1", "#### 1", fields)
    text = "{{{level}}} {question} {hint} {share} {solution} {{level}} \\boxed{}"
    prompt = render_prompt(tokenizer, PLAIN, problem, text)
    expected = "{3} Why? carry the {level} 0.5 #### 1 {level} \\boxed{}\n"
    assert tokenizer.decode(prompt) == expected


def test_a_teachers_own_prompt_is_a_user_turn_of_its_chat_template():
    tokenizer = byte_tokenizer(chat_template=CHAT)
    prompt = render_prompt(tokenizer, chat_style(), PROBLEMS[1], "{question} ({solution})")
    assert tokenizer.decode(prompt) == (
        "<s><|start|>user\nHow many 1? (It is 1.\n#### 1)<|end|>\n<|start|>assistant\n"
    )


# ----------------------------------------------------------------------------------------- completions


def test_all_end_ids_of_configuration_and_tokenizer_are_found(tmp_path):
    tokenizer = byte_tokenizer()
    assert prompting.end_ids(tmp_path, tokenizer) == (tokenizer.eos_token_id,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 3, 7]}')
    assert prompting.end_ids(tmp_path, tokenizer) == (3, 7, 9, tokenizer.eos_token_id)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert prompting.end_ids(tmp_path, tokenizer) == (0, 3, tokenizer.eos_token_id)


def test_no_end_id_at_all_is_an_error(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    (tmp_path / "config.json").write_text('{"eos_token_id": null}')
    with pytest.raises(PreflightError, match="no end-of-sequence id"):
        prompting.end_ids(tmp_path, tokenizer)


@pytest.mark.parametrize(
    "content",
    ['{"eos_token_id": "</s>"}', '{"eos_token_id": [1, null]}', '{"eos_token_id": -1}'],
)
def test_end_ids_that_are_none_are_an_error_that_names_the_file(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(EngineError, match=r"generation_config\.json"):
        prompting.end_ids(tmp_path, byte_tokenizer())


@pytest.mark.parametrize("content", ['{"eos', "\xff"])
def test_a_configuration_that_is_no_json_is_refused_before_anything_is_opened(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(EngineError, match=r"generation_config\.json: cannot be read as JSON"):
        tokenizers.open_tokenizer(tmp_path, trust_remote_code=False)


def test_completion_text_lacks_the_end_token_special_tokens_and_what_follows_a_stop_string():
    tokenizer = byte_tokenizer("<think>")
    token_ids = tokenizer.encode("<think> a , b\n\nQuestion: c<|start|>")
    end = (tokenizer.convert_tokens_to_ids("d"), tokenizer.eos_token_id)

    def text(token_ids, *stop):
        return text_of(tokenizer, *end).completion(token_ids, stop=stop)

    assert text([*token_ids, tokenizer.eos_token_id]) == "<think> a , b\n\nQuestion: c"
    assert text([*token_ids, end[0]]) == "<think> a , b\n\nQuestion: c"
    assert text(token_ids[:-1]) == "<think> a , b\n\nQuestion: c"  # cut: its last token is of the answer
    assert text([end[0], *token_ids]).startswith("d<think>")
    assert text(token_ids, "Question:", "\n\n", "nowhere") == "<think> a , b"
    assert text([end[1]]) == ""
    assert text([]) == ""


def test_a_reference_completion_is_the_solution_and_one_end_token():
    tokenizer = byte_tokenizer(adds="<s> $A </s>")
    completion = text_of(tokenizer, 7).reference(PROBLEMS[1])
    assert completion[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(completion[:-1]) == PROBLEMS[1].solution


# ---------------------------------------------------------------------------------------- vocabularies


def test_ids_that_only_the_student_has_are_not_scorable():
    qwen2 = byte_tokenizer("<tool_call>", "</tool_call>")
    qwen3 = byte_tokenizer(
        "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"
    )
    assert (tokenizers.num_ids_in_use(qwen2), tokenizers.num_ids_in_use(qwen3)) == (262, 266)
    found = tokenizers.compare_vocabularies(qwen3, qwen2, names=("student", "teacher"))
    assert (found.student_ids, found.teacher_ids) == (266, 262)
    assert found.unscorable == {262, 263, 264, 265}
    assert (
        tokenizers.compare_vocabularies(qwen2, qwen3, names=("student", "teacher")).unscorable == frozenset()
    )
    assert tokenizers.compare_vocabularies(qwen3, qwen3, names=("a", "b")).unscorable == frozenset()


def test_different_vocabularies_are_refused_with_the_first_differing_ids():
    student = byte_tokenizer("<a>", "<b>", "<c>", "<d>", "<e>")
    teacher = byte_tokenizer("<a>", "<x>", "<y>", "<z>", "<w>")
    with pytest.raises(PreflightError) as caught:
        tokenizers.compare_vocabularies(student, teacher, names=("mini", "maxi"))
    assert caught.value.message == (
        "mini and maxi have different vocabularies: 4 of 265 shared ids stand for different strings; "
        "id 261 is '<b>' in mini and '<x>' in maxi; id 262 is '<c>' in mini and '<y>' in maxi; "
        "id 263 is '<d>' in mini and '<z>' in maxi"
    )


def test_an_id_without_a_string_inside_the_students_range_is_not_scorable():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "d": 3}, unk_token="a"))
    student = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    found = tokenizers.compare_vocabularies(student, student, names=("student", "teacher"))
    assert (found.student_ids, found.unscorable) == (4, {2})


def test_opening_a_tokenizer_reads_the_files_it_was_given(tmp_path):
    tokenizer = byte_tokenizer("<think>", chat_template=CHAT, adds="<s> $A")
    tokenizer.save_pretrained(tmp_path)
    assert json.loads(Path(tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    opened = tokenizers.open_tokenizer(tmp_path, trust_remote_code=False)
    for style in (PLAIN, chat_style()):
        assert render_prompt(opened, style, PROBLEMS[1]) == render_prompt(tokenizer, style, PROBLEMS[1])
