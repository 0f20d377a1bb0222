"""docs/data.md: its lines of data are read as it says, and its two tasks run from an empty folder to a report."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from kdpipe.data.rows import Turn
from kdpipe.data.tasks import read_problems
from kdpipe.recipe.task import JsonlTask
from tests.models.test_prompting import byte_tokenizer

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]}
CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 257,
}


def block(section: str, kind: str) -> str:
    return re.search(rf"```{kind}\n(.*?)```", SECTIONS[section], re.DOTALL)[1]  # type: ignore[index]


def test_the_lines_of_the_page_are_read_as_it_says(tmp_path: Path) -> None:
    for section in ("Prompts without answers", "Conversations"):
        (tmp_path / "data.jsonl").write_text(block(section, "json"))
        task = JsonlTask(kind="jsonl", train="data.jsonl", test="data.jsonl", grader="none")
        [problem], _ = read_problems(task, tmp_path)
        if section == "Conversations":
            assert [turn.role for turn in problem.turns] == ["system", "user", "assistant"]
            assert problem.turns[1] == Turn("user", "Is it open today?")
            assert (problem.question, problem.solution) == ("And tomorrow?", "Until noon.")
        else:
            assert (problem.question, problem.solution) == ("Write a poem about rain.", None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "name", "word"),
    [("Prompts without answers", "poems", "rain"), ("Conversations", "shop", "today")],
)
def test_a_task_of_the_page_goes_from_an_empty_folder_to_a_report(
    tmp_path: Path, section: str, name: str, word: str
) -> None:
    line, recipe = block(section, "json"), block(section, "yaml")
    assert word in line
    task = yaml.safe_load(recipe)["task"]
    for split, start, count in (("train", 0, 200), ("test", 200, 40)):
        lines = [line.replace(word, f"{word} {number}") for number in range(start, start + count)]
        (tmp_path / task[split]).write_text("".join(lines))
    (tmp_path / f"{name}.yaml").write_text(recipe)
    tokenizer = byte_tokenizer(chat_template=CHAT)
    for seed, model in enumerate(("my-student", "my-teacher")):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer))).save_pretrained(tmp_path / model)
        tokenizer.save_pretrained(tmp_path / model)
    said = ""
    for command in re.findall(r"^kdpipe .*", SECTIONS[section], re.MULTILINE):
        done = subprocess.run(
            [sys.executable, "-m", *shlex.split(command)],
            cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said += done.stdout
    assert "200 train, 40 test problems; first prompt:" in said
    assert "held-out reverse KL" in said
    assert "accuracy" not in said
    [report] = tmp_path.glob("kdpipe-out/runs/*/report.html")
    page = report.read_text(encoding="utf-8")
    assert "reverse KL" in page
    assert name in page
