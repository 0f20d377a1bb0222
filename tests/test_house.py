"""The rooms of the house: who may import whom, which module is the door to which library, and what stays light."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kdpipe
from kdpipe.data import payload
from kdpipe.store.stage import Stage

PACKAGE = Path(kdpipe.__file__).parent

# Each package imports only from those before it, also for type checking: a type that a module names is something it
# knows about. `execution` is started by name, and nothing imports it.
ORDER = [
    "errors",
    "recipe",
    "store",
    "workers",
    "data",
    "models",
    "method",
    "engines",
    "training",
    "stages",
    "pipeline",
    "doctor",
    "results",
    "report",
    "execution",
    "tracking",
    "cli",
]
OPEN = {"kdpipe", "__main__"}
"""The door to the library and the program's door: before and after all packages."""

# The packages, or single modules, that may import a library; some name a model's type and call nothing of the library.
DOORS = {
    "vllm": {"engines.vllm.process"},
    "transformers": {"models", "engines.hf", "training"},
    "peft": {"models.adapters"},
    "mlflow": {"tracking.run"},
    "typer": {"cli"},
    "click": {"cli.app"},
    "rich": {"cli"},
    "tokenizers": {"results.detokenizer", "models.tokenizer"},
    "huggingface_hub": {"pipeline.hub"},
    "yaml": {"recipe.yaml_source"},
    "filelock": set[str](),
    "fcntl": {"store.locks"},
    "urllib3": set[str](),
    "jinja2": {"models.template", "report.template"},
    "markupsafe": {"report.template", "report.figure"},
    "requests": set[str](),
    "subprocess": {"workers.worker", "store.environment", "tracking.page", "engines.vllm.process"},
    "pickle": set[str](),
    "marshal": set[str](),
    "shelve": set[str](),
    "dill": set[str](),
    "cloudpickle": set[str](),
    "joblib": set[str](),
    "copyreg": set[str](),
    "dbm": set[str](),
    "pandas": set[str](),
    "scipy": {"method.statistics"},
    "multiprocessing": {"engines.vllm.process"},  # only asks which of the processes that vLLM starts live
}
TYPES_ONLY = {("training.local", "transformers"), ("models.adapters", "transformers")}
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


def each_module(*without: str) -> Callable[[Callable[[str], None]], Callable[[], None]]:
    """Makes one test of a check of a module: a case for each would cost more than the checks."""

    def made(check: Callable[[str], None]) -> Callable[[], None]:
        def test() -> None:
            for name in sorted(set(MODULES) - set(without)):
                check(name)

        return test

    return made


def package_of(name: str) -> str:
    return name.partition(".")[0]


def test_every_module_stands_in_a_package_of_the_line() -> None:
    assert {package_of(name) for name in MODULES} == {*ORDER, *OPEN}


@each_module(*OPEN)
def test_a_package_imports_only_from_those_before_it(name: str) -> None:
    own = package_of(name)
    for dotted, line in imports(MODULES[name]):
        target = own_module(dotted)
        if target is not None and target not in OPEN and (other := package_of(target)) != own:
            assert ORDER.index(other) < ORDER.index(own), f"{name}, line {line}: imports {target}"
            assert other != "execution", f"{name}, line {line}: execution is started by name"


@pytest.mark.parametrize("package", ORDER)
def test_no_package_has_a_circle_inside(package: str) -> None:
    inside = {name for name in MODULES if package_of(name) == package}
    needs = {
        name: {own_module(dotted) for dotted, _ in imports(MODULES[name])} & inside - {name}
        for name in inside
    }
    while free := {name for name, needed in needs.items() if not needed & needs.keys()}:
        needs = {name: needed for name, needed in needs.items() if name not in free}
    assert not needs, f"these import one another: {sorted(needs)}"


@each_module()
def test_a_library_is_imported_only_by_its_door(name: str) -> None:
    for dotted, line in imports(MODULES[name]):
        library = dotted.partition(".")[0]
        if library in DOORS:
            doors = DOORS[library]
            assert any(name == door or name.startswith(f"{door}.") for door in doors), (
                f"{name}, line {line}: imports {dotted}"
            )


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


@each_module()
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
    assert not {"models.folder", "engines.hf.engine"} & imported_with("models.devices")
    assert "models.folder" in imported_with("execution.executor"), "and yet those are found that do wait"


def texts(name: str) -> Iterator[tuple[str, int]]:
    """Every string constant of a module, with its line."""
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, node.lineno


@each_module("data.payload")
def test_the_name_of_a_payload_file_is_spelled_in_one_module(name: str) -> None:
    known = {value for key, value in vars(payload).items() if key.endswith("_FILE")}
    assert [(text, line) for text, line in texts(name) if text in known] == []


@each_module("store.stage")
def test_nothing_is_compared_with_a_stage_or_a_step_by_its_spelling(name: str) -> None:
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.match_case):
            compared: list[ast.AST] = [node.pattern]
        elif isinstance(node, ast.Compare) and "stage" in ast.unparse(node):
            compared = [node.left, *node.comparators]
        else:
            continue
        found = [each.value for part in compared for each in ast.walk(part) if isinstance(each, ast.Constant)]
        assert not set(found) & set(Stage), f"{name}, line {compared[0].lineno}"  # type: ignore[attr-defined]
    step_ids = re.compile(rf"({'|'.join(Stage)})[:@]")  # `rollout@3`, `evaluate:student@3`
    assert [(text, line) for text, line in texts(name) if step_ids.match(text)] == []


def test_only_the_command_line_and_the_terminal_print() -> None:
    printing = {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write")
    }
    assert {name.partition(".")[0] for name in printing} <= {"cli"}


# --------------------------------------------------------------------------------------- sizes and names

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.Module) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def lines_of(node: Function) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_at_most_three_modules_stand_flat_beside_the_packages() -> None:
    assert len([path for path in PACKAGE.glob("*.py") if path.stem != "__init__"]) <= 3


def test_functions_are_short() -> None:
    sizes = sorted(
        (lines_of(node), f"{name}.{node.name}") for name, tree in MODULES.items() for node in functions(tree)
    )
    assert sizes[len(sizes) * 9 // 10][0] <= 24
    assert [size for size in sizes if size[0] > 55] == []


def test_files_are_short() -> None:
    sizes = {path: path.read_text(encoding="utf-8").count("\n") for path in PACKAGE.rglob("*.py")}
    assert {path: size for path, size in sizes.items() if size > 450} == {}


def test_a_class_name_means_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name.lstrip("_"), []).append(name)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def signature(node: Function) -> str:
    """The annotations of a function's arguments and of what it returns."""
    arguments = ast.unparse(node.args)
    return f"{arguments} -> {ast.unparse(node.returns)}" if node.returns else arguments


UNTYPED = "dict[str, Any]"


def test_no_untyped_mapping_crosses_a_package() -> None:
    used = {
        (own_module(f"{node.module}"), alias.name)
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith("kdpipe.")
        and package_of(str(own_module(str(node.module)))) != package_of(name)
        for alias in node.names
    }
    found = []
    for name, tree in MODULES.items():
        for node in tree.body:
            members = node.body if isinstance(node, ast.ClassDef) else [node]
            if not isinstance(node, ast.ClassDef | Function) or (name, node.name) not in used:
                continue
            found += [
                f"{name}.{member.name}"
                for member in members
                if isinstance(member, Function) and not (member.name.startswith("_") and member is not node)
                if UNTYPED in signature(member)
            ]
    assert found == []


def test_untyped_mappings_are_few() -> None:
    counts = {name: ast.unparse(tree).count(UNTYPED) for name, tree in MODULES.items()}
    assert sum(counts.values()) <= 15, {name: count for name, count in counts.items() if count}


def strings(tree: ast.Module) -> set[str]:
    """The texts of a module, but for those that only say something."""
    said = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said
    }


def test_the_names_of_stages_are_told_apart_in_one_file() -> None:
    names = {stage.value for stage in Stage}
    found = set()
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            told = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            told += [node.value] if isinstance(node, ast.MatchValue) else []
            if any(
                isinstance(one, ast.Constant) and one.value in names for one in told
            ) and "stage" in ast.unparse(node):
                found.add(f"{name}, line {node.lineno}")
        if "teacher-score" in strings(tree) and name != "store.stage":
            found.add(name)
    assert found == set()


def test_the_names_of_payload_files_stand_in_one_file_each() -> None:
    places: dict[str, set[str]] = {}
    for name, tree in MODULES.items():
        for text in strings(tree):
            if re.fullmatch(r"\w[\w-]*\.(parquet|safetensors|jsonl)", text):
                places.setdefault(text, set()).add(name)
    assert {text: found for text, found in places.items() if len(found) > 1} == {}


def test_first_lines_of_docstrings_are_short() -> None:
    found = [
        f"{name}.{getattr(node, 'name', '')}: {text.splitlines()[0]}"
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | Function) and (text := ast.get_docstring(node))
        if len(text.splitlines()[0]) > 100
    ]
    assert found == []


LIGHT_PACKAGES = ("errors", "recipe", "store", "pipeline", "results", "report", "tracking", "cli")


def test_light_packages_never_import_torch(tmp_path: Path) -> None:
    names = [f"kdpipe.{name}" for name in MODULES if package_of(name) in LIGHT_PACKAGES]
    script = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert not {'torch', 'transformers', 'vllm'} & set(sys.modules), name\n"
    )
    result = python("-c", script, workspace=tmp_path)
    assert result.returncode == 0, result.stderr


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
        "from kdpipe.cli.app import main\n"
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
        result = python("-c", "from kdpipe.cli.app import main; main()", *command, workspace=tmp_path)
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
