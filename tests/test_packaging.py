"""What is built from the sources: the wheel, the images, and the installed program under a foreign user id."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from kdpipe.cli.app import app

ROOT = Path(__file__).parent.parent
HERE = Path(sys.executable).parent
CI = os.environ.get("CI") == "true"
USER_ID = 12345
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["lora"]]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RELEASED = (
    "(unreleased)" not in re.findall(r"^## .*", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[0]
)


def require(condition: bool, reason: str) -> None:
    """Skips when a prerequisite is missing; in CI, where it must be there, fails."""
    if not condition:
        (pytest.fail if CI else pytest.skip)(reason)


# ----------------------------------------------------------------------------------------------- wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources so that nothing is left in them."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for name in ("kdpipe", "recipes", "docs"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(sources)], check=True, capture_output=True)
    [path] = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_every_module_the_pages_the_recipes_the_type_marker_and_the_licence(
    wheel: Path,
) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "kdpipe").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    page = {f"kdpipe/report/{name}" for name in ("page.html.j2", "style.css", "script.js")}
    recipes = {f"kdpipe/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    docs = {f"kdpipe/docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert recipes
    assert docs
    assert modules | recipes | docs | page | {"kdpipe/py.typed"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    strangers = [name for name in names if not name.startswith(("kdpipe/", "kdpipe-"))]
    assert strangers == [], "a wheel that installs top-level packages of other names would shadow a user's"


def test_every_library_that_is_imported_is_declared() -> None:
    optional = PROJECT["optional-dependencies"]
    lines = [*REQUIREMENTS, *optional["vllm"], *optional["data"], *optional["math"]]
    declared = {re.split(r"[\[<>=; ]", line)[0].lower().replace("_", "-") for line in lines}
    imported = {
        name.partition(".")[0]
        for path in (ROOT / "kdpipe").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    libraries = imported - sys.stdlib_module_names - {"kdpipe", "_typeshed"}
    assert {"torch", "jinja2"} < libraries
    distributed = {"yaml": "pyyaml", "pydantic_core": "pydantic"}  # pydantic asks for one version of its core
    assert {distributed.get(name, name).replace("_", "-") for name in libraries} - declared == set()


def test_every_library_has_an_upper_bound() -> None:
    """A new major may change what a call does in silence, as filelock 4 did where a file system has no locks."""
    bounded = {line for line in REQUIREMENTS if any(s.operator == "<" for s in Requirement(line).specifier)}
    assert set(REQUIREMENTS) == bounded


def test_a_release_names_the_project_s_addresses() -> None:
    assert not RELEASED or {"Repository", "Documentation", "Issues", "Changelog"} <= PROJECT["urls"].keys()


def strings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_name_pages_that_the_wheel_can_print() -> None:
    texts = [text for path in (ROOT / "kdpipe").rglob("*.py") for text in strings(path)]
    texts += [path.read_text(encoding="utf-8") for path in (ROOT / "recipes").glob("*.yaml")]
    named = {text for text in texts if re.search(r"\b(docs/|README|CONTRIBUTING)", text)}
    assert named <= {"README.md"}, "which data sets of the hub have too"
    pages = {page for text in texts for page in re.findall(r"kdpipe docs ([\w-]+)", text)}
    assert {"doctor", "objectives", "vllm"} <= pages
    for page in pages:
        shown = CliRunner().invoke(app, ["docs", page])
        assert (shown.exit_code, shown.stdout) == (0, (ROOT / f"docs/{page}.md").read_text(encoding="utf-8"))


def test_docs_lists_the_pages_and_names_them_when_one_is_wrong() -> None:
    names = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert json.loads(CliRunner().invoke(app, ["docs", "--json"]).stdout).keys() == names
    wrong = CliRunner().invoke(app, ["docs", "objective"])
    assert wrong.exit_code == 2
    assert "objectives" in wrong.output


# ---------------------------------------------------------------------------------------------- images


@dataclass(slots=True)
class Stage:
    """One FROM of the Dockerfile, with its variables filled in."""

    image: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def values(self, instruction: str) -> list[str]:
        return [value for name, value in self.instructions if name == instruction]

    def environment(self) -> dict[str, str]:
        pairs = [pair.partition("=") for value in self.values("ENV") for pair in shlex.split(value)]
        return {name: value for name, _, value in pairs}


def dockerfile() -> list[Stage]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(str.strip, text.splitlines()):
        instruction, value = line.split(maxsplit=1)
        if instruction == "ARG" and not stages:
            name, _, default = value.partition("=")
            arguments[name] = default
        elif instruction == "FROM":
            image, _, name = value.partition(" AS ")
            filled = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], image)
            stages.append(Stage(filled, name))
        else:
            stages[-1].instructions.append((instruction, value))
    return stages


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets `path` into the build: its last matching line decides."""
    sent = True
    parts = Path(path).parts
    prefixes = ["/".join(parts[: length + 1]) for length in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            places = parts if "**/" in line else prefixes
            if any(fnmatch(place, pattern) for place in places):
                sent = line.startswith("!")
    return sent


def test_the_images_are_the_last_two_stages_and_gpu_is_the_default() -> None:
    stages = dockerfile()
    assert [stage.name for stage in stages] == ["wheel", "cpu", "gpu"]
    assert stages[-1].image == "vllm/vllm-openai:v0.32.0"


def test_base_images_are_pinned_those_of_a_release_by_digest_too() -> None:
    digest = "(@sha256:[0-9a-f]{64})" + ("" if RELEASED else "?")
    for stage in dockerfile():
        assert re.search(rf":v?\d+\.\d+[\w.-]*{digest}$", stage.image), stage.image


def locked() -> dict[str, list[tuple[Requirement, int]]]:
    """The locked requirements by name, each with the number of its hashes."""
    text = re.sub(r"^#.*\n", "", (ROOT / "requirements-image.txt").read_text(encoding="utf-8"), flags=re.M)
    found: dict[str, list[tuple[Requirement, int]]] = {}
    for entry in re.split(r"\n(?=\S)", text.replace("\\\n", "").strip()):
        line, *hashes = entry.split(" --hash=sha256:")
        requirement = Requirement(line)
        found.setdefault(requirement.name, []).append((requirement, len(hashes)))
    return found


def test_the_lock_has_a_hashed_version_of_every_dependency_within_its_bounds() -> None:
    lock = locked()
    assert len(lock) > 100
    for name, entries in lock.items():
        for entry, num_hashes in entries:
            assert [s.operator for s in entry.specifier] == ["=="], name
            assert num_hashes > 0, name
    for line in REQUIREMENTS:
        wanted = Requirement(line)
        for entry, _ in lock[wanted.name.lower().replace("_", "-")]:
            [version] = (s.version for s in entry.specifier)
            assert version in wanted.specifier, f"{line}: locked at {version}; renew the lock (CONTRIBUTING)"


def test_the_command_that_renews_the_lock_is_the_one_that_made_it() -> None:
    text = (ROOT / "requirements-image.txt").read_text(encoding="utf-8")
    [made] = re.findall(r"^#\s+(uv pip compile .*)$", text, re.M)
    assert made.replace("compile", "compile --upgrade") in CONTRIBUTING
    assert "://" not in text


@pytest.mark.slow
def test_the_sbom_of_a_release_names_the_locked_versions(tmp_path: Path) -> None:
    program = HERE / "cyclonedx-py"
    require(program.exists(), "cyclonedx-bom comes with the dev extra")
    [command] = re.findall(r"^ *(cyclonedx-py .*)$", CONTRIBUTING, re.M)
    *arguments, name = shlex.split(command)[1:]
    subprocess.run([program, *arguments, tmp_path / name], cwd=ROOT, check=True, capture_output=True)
    bill = json.loads((tmp_path / name).read_text(encoding="utf-8"))
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "kdpipe")
    found = {f"{part['name']}=={part['version']}" for part in bill["components"]}
    assert {str(entry).partition(";")[0].strip() for rows in locked().values() for entry, _ in rows} == found
    assert {"torch", "transformers"} <= {line.partition("==")[0] for line in found}


def test_what_the_images_copy_exists_and_is_not_ignored() -> None:
    names = {stage.name for stage in dockerfile()}
    for stage in dockerfile():
        for value in stage.values("COPY"):
            *sources, _ = value.split()
            if sources[0].startswith("--from="):
                assert sources[0].removeprefix("--from=") in names
                continue
            for source in sources:
                assert (ROOT / source).exists(), source
                if source == "docs":  # its pages only, as the next test says
                    continue
                files = list((ROOT / source).rglob("*.*")) or [ROOT / source]
                for file in files:
                    name = str(file.relative_to(ROOT))
                    assert is_sent(name) is ("__pycache__" not in name), name


def test_nothing_else_is_sent_to_the_build() -> None:
    for path in ROOT.iterdir():
        allowed = {"LICENSE", "README.md", "pyproject.toml", "requirements-image.txt", "kdpipe", "recipes"}
        assert is_sent(path.name) is (path.name in allowed), path.name
    assert {path.name for path in (ROOT / "docs").iterdir() if is_sent(f"docs/{path.name}")} == {
        "__init__.py",
        *(path.name for path in (ROOT / "docs").glob("*.md")),
    }


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_an_image_runs_kdpipe_as_anyone_and_caches_under_one_folder(name: str) -> None:
    [stage] = [stage for stage in dockerfile() if stage.name == name]
    assert [json.loads(value) for value in stage.values("ENTRYPOINT")] == [["kdpipe"]]
    assert stage.values("USER") == ["1000:1000"]
    assert stage.values("WORKDIR") == ["/work"]
    assert any("chmod 1777 /cache /work" in value for value in stage.values("RUN"))
    environment = stage.environment()
    for variable in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        assert Path(environment[variable]).is_relative_to("/cache"), variable
    assert environment["USER"], "an id without an account has no name, and libraries ask for one"
    assert ("VLLM_CACHE_ROOT" in environment) is (name == "gpu")


def test_dependencies_are_installed_before_the_sources_are_copied() -> None:
    for stage in dockerfile()[-2:]:
        order = [
            "requirements" if "requirements.txt" in value else "wheel"
            for instruction, value in stage.instructions
            if instruction in ("COPY", "RUN")
        ]
        assert order == ["requirements", "requirements", "wheel", "wheel"], stage.name
        [install] = [value for value in stage.values("RUN") if "-r /opt/locked.txt" in value]
        assert "--require-hashes" in install


def test_hadolint_finds_nothing() -> None:
    program = HERE / "hadolint"
    require(program.exists(), "hadolint comes with the dev extra on Linux x86-64")
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


# ----------------------------------------------------------------------------- installed, as someone else


def readable_python() -> Path | None:
    """An interpreter of this version that any user can start; this one may lie in root's home."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for path in (
        Path(sys.executable).resolve(),
        Path("/usr/local/bin") / version,
        Path("/usr/bin") / version,
    ):
        if path.exists() and all(place.stat().st_mode & 0o005 == 0o005 for place in (path, *path.parents)):
            return path
    return None


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everyone may read; pytest's own are closed to other users."""
    with tempfile.TemporaryDirectory(prefix="kdpipe-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.mark.slow
def test_the_installed_program_runs_as_a_user_without_home_or_name(wheel: Path, open_folder: Path) -> None:
    require(os.geteuid() == 0 and shutil.which("setpriv") is not None, "needs root and setpriv")
    python = readable_python()
    require(python is not None, "needs a Python of this version that other users can start")
    venv, cache, work = (open_folder / name for name in ("venv", "cache", "work"))
    subprocess.run([str(python), "-m", "venv", "--without-pip", venv], check=True)
    # The dependencies of this environment, but not its own kdpipe: a .pth inside a folder named by a .pth is not read.
    [site] = venv.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = ["--python", str(venv / "bin" / "python"), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([sys.executable, "-m", "pip", *install, str(wheel)], check=True)
    for folder in (cache, work):
        folder.mkdir()
        os.chown(folder, USER_ID, USER_ID)

    [image] = [stage for stage in dockerfile() if stage.name == "cpu"]
    environment = {
        name: value.replace("/cache", str(cache), 1)
        for name, value in image.environment().items()
        if name not in ("HOME", "USER")
    }
    environment |= {"PATH": f"{venv / 'bin'}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}

    def kdpipe(*arguments: str) -> str:
        user = ["setpriv", f"--reuid={USER_ID}", f"--regid={USER_ID}", "--clear-groups"]
        done = subprocess.run(
            [*user, str(venv / "bin" / "kdpipe"), *arguments],
            cwd=open_folder,  # not writable, as any folder but those two
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
        return done.stdout

    assert "gsm8k-qwen3-kdrl" in kdpipe("recipes")
    settings = (
        "student.sft.steps=4",
        "teachers.0.sft.steps=4",
        "task.train_problems=64",
        "task.test_problems=8",
        "rollout.prompts=4",
        "train.minibatches=1",
        "evaluate.problems=4",
        "evaluate.reverse_kl_problems=2",
        "runtime.threads=1",
        "runtime.allow_weak_teacher=true",
        "tracking.enabled=true",
    )
    place = ["--workspace", str(work / "kdpipe-out")]
    sets = [part for setting in settings for part in ("--set", setting)]
    kdpipe("run", "quickstart", "--rounds", "1", *place, *sets)
    kdpipe("status", "quickstart", *place, *sets)
    kdpipe("samples", "quickstart", "--limit", "1", *place, *sets)
    [run] = (work / "kdpipe-out" / "runs").iterdir()
    logs = "".join(path.read_text(encoding="utf-8") for path in (run / "logs").iterdir())
    assert "Creating initial MLflow database tables" in logs
    assert "Traceback" not in logs, logs[-3000:]
    written = [path for path in open_folder.rglob("*") if path.stat().st_uid == USER_ID]
    assert written
    assert all(path.is_relative_to(cache) or path.is_relative_to(work) for path in written)
