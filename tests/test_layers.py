"""The rooms of the house: who may import whom, which module is the door to which library, and what stays light."""

from __future__ import annotations

import ast
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdpipe

PACKAGE = Path(kdpipe.__file__).parent

# Imports go to strictly lower levels only, also those made for type checking: a type that a module names is
# something it knows about. The whole number is the level of the house, the fraction an order inside it.
LEVELS = {
    "kdpipe": 0,
    "errors": 0,
    "rows": 1,
    "pulse": 1,
    "seeds": 1,
    "losses": 1,
    "statistics": 1,
    "environment": 1,
    "recipes_shipped": 1,
    "yaml_source": 1,
    "recipe.section": 1.01,
    "recipe.task": 1.02,
    "recipe.models": 1.02,
    "recipe.objective": 1.02,
    "recipe.runtime": 1.02,
    "recipe.stages": 1.03,
    "recipe.fields": 1.04,
    "recipe.checks": 1.05,
    "recipe": 1.1,
    "recipe_words": 0,
    "duration": 0,
    "sweep": 1.1,
    "recipe_reference": 1.2,
    "recipe_file": 1.2,
    "model_folder": 1,
    "engine": 2,
    "plan": 2,
    "tables": 2,
    "batching": 2,
    "objective": 2,
    "trainer": 2,
    "tasks.answers": 2,
    "tasks.arithmetic": 2,
    "tasks.jsonl": 2.1,
    "tasks.gsm8k": 2.2,
    "tasks": 2.3,
    "prompting": 2.4,
    "routing": 2.5,
    "sampling": 2.1,
    "forward": 2.1,
    "adapters": 2.1,
    "checkpoints": 2.2,
    "shelf": 2.3,
    "average": 2.3,
    "devices": 2.05,
    "hidden": 2,
    "estimate": 2.6,
    "plain": 2.2,
    "micro_batch": 2.2,
    "mismatch": 2,
    "teachers": 2.3,
    "seals": 2.1,
    "store": 3,
    "workers": 3,
    "engines": 3,
    "engines.decoding": 3,
    "engines.hf": 3.1,
    "engines.http": 3,
    "engines.replies": 3,
    "engines.server": 3.2,
    "signatures": 3.1,
    "engines.vllm": 3.2,
    "engines.vllm_guard": 3,
    "engines.vllm_output": 3,
    "engines.vllm_process": 3.1,
    "engines.vllm_worker": 3,
    "engines.remote": 3.3,
    "sources": 3.1,
    "job": 3.1,
    "small_world": 3,
    "small_transformer": 3.1,
    "claim": 3.1,
    "check_loss": 4,
    "doctor_finding": 4,
    "doctor_machine": 4,
    "doctor_text": 4.1,
    "doctor_engine": 4.1,
    "doctor_case": 4.2,
    "doctor_student": 4.3,
    "doctor_teacher": 4.4,
    "doctor": 4.5,
    "runs": 4,
    "studies": 4.1,
    "survey": 4.1,
    "stages": 4,
    "stages.sft": 4,
    "stages.rollout": 4,
    "stages.teacher_score": 4,
    "stages.teacher_text": 4.1,
    "stages.train": 4.1,
    "stages.held_out": 4.1,
    "stages.evaluate": 4.2,
    "project": 4.2,
    "roles": 4,
    "report": 4,
    "report.markup": 4,
    "report.pieces": 4,
    "report.alternatives": 4,
    "report.stamp": 4,
    "report.figure": 4.1,
    "report.figure_file": 4.2,
    "report.completions": 4.3,
    "report.measures": 4.3,
    "report.charts": 4.4,
    "comparison": 4.4,
    "comparison_lines": 4.45,
    "report.verdict": 4.4,
    "report.tokens_data": 4.4,
    "report.sets": 4.5,
    "report.against": 4.5,
    "report.headline": 4.5,
    "report.ledgers": 4.5,
    "report.token_view": 4.5,
    "report.page": 4.6,
    "report.writing": 4.7,
    "progress": 4,
    "runner": 5,
    "warm": 4.6,
    "inputs": 4.7,
    "training": 4.8,
    "patients": 4.9,
    "perform": 5,
    "terminal": 5,
    "before_lines": 5.1,
    "examination": 5.1,
    "overview": 5.1,
    "arms": 5.2,
    "housekeeping": 5.1,
    "samples": 5.1,
    "transcript": 5.2,
    "tracking.record": 5.1,
    "tracking.contents": 5.1,
    "tracking.page": 5.2,
    "tracking.standing": 5.2,
    "tracking.mlflow_run": 5.2,
    "tracking.findings": 5.2,
    "tracking.sample_tables": 5.2,
    "tracking.mirrored_study": 5.3,
    "tracking.mirror": 5.3,
    "tracking.synchronizer": 5.4,
    "tracking": 5.5,
    "commands": 6,
    "commands.parameters": 6,
    "commands.printing": 6,
    "commands.one_run": 6.1,
    "commands.several_runs": 6.2,
    "commands.run": 6.3,
    "commands.before": 6.3,
    "commands.study": 6.3,
    "commands.look": 6.3,
    "commands.keep": 6.3,
    "commands.start": 6.3,
    "cli": 6.4,
    "__main__": 7,
}

# The modules that may import a library; some name a model's type and call nothing of the library.
DOORS = {
    "vllm": {"engines.vllm_process"},
    "transformers": {
        "engines.hf",
        "engines.decoding",
        "prompting",
        "checkpoints",
        "shelf",
        "average",
        "trainer",
        "adapters",
        "plain",
    },
    "peft": {"adapters"},
    "mlflow": {"tracking.mlflow_run"},
    "typer": {
        "cli",
        "commands.parameters",
        "commands.run",
        "commands.before",
        "commands.study",
        "commands.look",
        "commands.keep",
        "commands.start",
    },
    "click": {"cli"},
    "rich": {"terminal"},
    "tokenizers": {"report.pieces", "prompting"},
    "huggingface_hub": {"sources"},
    "yaml": {"yaml_source"},
    "filelock": {"store", "tracking.mlflow_run"},
    "urllib3": {"engines.http"},
    "requests": set[str](),
    "subprocess": {"workers", "environment", "tracking.page", "engines.vllm_process"},
    "pickle": set[str](),
    "marshal": set[str](),
    "shelve": set[str](),
    "dill": set[str](),
    "cloudpickle": set[str](),
    "joblib": set[str](),
    "copyreg": set[str](),
    "dbm": set[str](),
    "pandas": set[str](),
    "scipy": {"comparison"},
    "multiprocessing": {"engines.vllm_process"},  # only asks which of the processes that vLLM starts live
}
TYPES_ONLY = {("trainer", "transformers"), ("adapters", "transformers")}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "torch.load",
    "torch.save",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "torch.hub.load",
    "torch.jit.load",
    "torch.export.load",
}
# Whatever they are called on: readers of pickles, of any library.
FORBIDDEN_METHODS = {"read_pickle", "loads_pickle", "Unpickler", "find_class", "unsafe_load", "full_load"}
SAFE_WORDS = {"allow_pickle": False, "weights_only": True, "use_safetensors": True, "local_files_only": True}
"""What a call may say of these, if anything, and only as it stands here: no variable decides it."""

REFERENCE_SECONDS = 0.115
HEAVY = ("torch", "transformers", "vllm", "mlflow", "pyarrow", "numpy")
LIGHT_COMMANDS = (
    ["--help"],
    ["run", "--help"],
    ["check", "quickstart"],
    ["plan", "quickstart"],
    ["status", "quickstart"],
    ["recipes"],
    pytest.param(["check-loss", "quickstart"], marks=pytest.mark.slow),
)


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__") or "kdpipe"
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


MODULES = modules()


def imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Dotted name and line of everything imported, at any depth; `from a import b` may name the module a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def own_module(dotted: str) -> str | None:
    """The kdpipe module that an imported name belongs to."""
    first, _, rest = dotted.partition(".")
    if first != "kdpipe":
        return None
    parts = rest.split(".")
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or "kdpipe"


def test_every_module_has_a_level_and_every_level_a_module() -> None:
    # A door may stand for a module that is still to come, a level may not.
    assert set(MODULES) == set(LEVELS)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_from_strictly_lower_levels(name: str) -> None:
    for dotted, line in imports(MODULES[name]):
        target = own_module(dotted)
        if target is not None and target != name:
            assert LEVELS[target] < LEVELS[name], f"{name}, line {line}: imports {target}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_library_is_imported_only_by_its_door(name: str) -> None:
    for dotted, line in imports(MODULES[name]):
        library = dotted.partition(".")[0]
        if library in DOORS:
            assert name in DOORS[library], f"{name}, line {line}: imports {dotted}"


@pytest.mark.parametrize(("name", "library"), sorted(TYPES_ONLY))
def test_a_module_let_in_for_types_imports_nothing_at_run_time(name: str, library: str) -> None:
    guarded = {
        id(child)
        for node in ast.walk(MODULES[name])
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = [
        node
        for node in ast.walk(MODULES[name])
        if isinstance(node, ast.Import | ast.ImportFrom) and library in ast.unparse(node)
    ]
    assert found
    assert all(id(node) in guarded for node in found)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_is_unpickled_evaluated_or_run_by_a_shell(name: str) -> None:
    for node in ast.walk(MODULES[name]):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in FORBIDDEN_CALLS, f"{name}, line {node.lineno}: {called}"
        assert called.rpartition(".")[2] not in FORBIDDEN_METHODS, f"{name}, line {node.lineno}: {called}"
        for keyword in node.keywords:
            assert keyword.arg != "shell", f"{name}, line {node.lineno}: shell="
            if keyword.arg in SAFE_WORDS:
                assert isinstance(keyword.value, ast.Constant)
                assert keyword.value.value is SAFE_WORDS[keyword.arg], f"{name}, line {node.lineno}"
            if keyword.arg == "trust_remote_code":  # the recipe's word, passed on
                is_fixed = isinstance(keyword.value, ast.Constant)
                assert not is_fixed or keyword.value.value is False, f"{name}, line {node.lineno}"  # type: ignore[attr-defined]
        if called.endswith("from_pretrained"):
            said = {keyword.arg for keyword in node.keywords}
            assert said >= {"trust_remote_code", "local_files_only"}, f"{name}, line {node.lineno}"
            assert "use_safetensors" in said or "ModelForCausalLM" not in called, (
                f"{name}, line {node.lineno}"
            )
        if called in ("np.load", "np.save", "numpy.load"):
            assert any(keyword.arg == "allow_pickle" for keyword in node.keywords), (
                f"{name}, line {node.lineno}"
            )


def imported_with(name: str) -> set[str]:
    """The modules of ours whose import is part of that one's: what stands in functions or is for types is not."""
    found: set[str] = set()
    pending = [name]
    while pending:
        at = pending.pop()
        if at not in found:
            found.add(at)
            body = [node for node in MODULES[at].body if isinstance(node, ast.Import | ast.ImportFrom)]
            targets = (own_module(dotted) for dotted, _ in imports(ast.Module(body, [])))
            pending += [target for target in targets if target is not None]
    return found


def test_what_doctor_asks_of_torch_waits_for_no_library_of_models() -> None:
    assert imported_with("doctor_machine") & DOORS["transformers"] == set()
    assert "checkpoints" in imported_with("perform"), "and yet those are found that do wait"


def test_only_the_command_line_and_the_terminal_print() -> None:
    printing = {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write")
    }
    assert {name.partition(".")[0] for name in printing} <= {"cli", "commands", "terminal"}


# -------------------------------------------------------------------------------------- light commands


def python(*args: str, workspace: Path) -> subprocess.CompletedProcess[str]:
    # Byte code may be written: an installed kdpipe has it, and compiling at every start is no part of the claim.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, cwd=workspace, env=environment, check=False
    )


@pytest.mark.parametrize("command", LIGHT_COMMANDS, ids=" ".join)
def test_a_light_command_imports_no_heavy_library(command: list[str], tmp_path: Path) -> None:
    script = (
        "import atexit, json, sys\n"
        f"atexit.register(lambda: print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]), file=sys.stderr))\n"
        f"sys.argv = ['kdpipe', *{command!r}]\n"
        "from kdpipe.cli import main\n"
        "main()\n"
    )
    result = python("-c", script, workspace=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert json.loads(result.stderr.splitlines()[-1]) == []


@pytest.mark.parametrize("command", [["--help"], ["plan", "quickstart"]], ids=" ".join)
def test_a_light_command_takes_less_than_half_a_second_of_cpu_time(
    command: list[str], tmp_path: Path
) -> None:
    # A slower core, or one shared with others, takes longer for everything, so each attempt is held against a sum
    # that takes REFERENCE_SECONDS on the core that half a second is meant for.
    attempts = []
    for _ in range(8):
        pace = max(1.0, min(seconds_of_a_sum() for _ in range(3)) / REFERENCE_SECONDS)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = python("-c", "from kdpipe.cli import main; main()", *command, workspace=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert result.returncode == 0, result.stderr
        attempts.append((after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime) / pace)
        if attempts[-1] < 0.5:
            return
    pytest.fail(f"CPU seconds: {', '.join(f'{value:.2f}' for value in attempts)}, expected below 0.5")


def seconds_of_a_sum() -> float:
    before = time.process_time()
    sum(number * number for number in range(1_000_000))
    return time.process_time() - before
