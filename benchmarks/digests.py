"""The sha256 of every payload of the quickstart (6 rounds) and of the twelve tiny runs of digests.yaml, as JSON.

    python benchmarks/digests.py -o benchmarks/results/digests-COMMIT.json
    python benchmarks/digests.py --tree ANOTHER-CHECKOUT -o after.json
    python benchmarks/digests.py --compare before.json after.json

Works on any commit: it uses kdpipe's command line and the files of its store (docs/artifacts.md), none of its modules.
All in float32 on the CPU with one thread and the hf engine: a commit that changes no behaviour changes no digest.
Another CPU or version of torch may. Of metrics.jsonl the rows are digested, sorted, without those named `time/` and
`speed/`. Manifests and fingerprints are left out: they hold times, and ids of steps, which differ between commits.
Exit status 1 where --compare finds a difference, or a run or a payload is not whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from http.server import ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from digests_world import BigramServer, write_world

ROOT = Path(__file__).parent.parent
TIMED = ("time/", "speed/")
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile")
CPU_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
ALWAYS = ("tracking.enabled=false", "runtime.keep.weights=99", "runtime.keep.optimizer=99")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(recipe: str, workspace: Path, tree: Path, *overrides: str) -> dict[str, dict[str, str]]:
    """Runs a recipe with the kdpipe of `tree`; the digests of each step, by the names of its links in the run."""
    sets = [word for override in (*ALWAYS, *overrides) for word in ("--set", override)]
    command = [sys.executable, "-m", "kdpipe", "run", recipe, "--workspace", str(workspace), *sets]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{recipe}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    links = sorted(workspace.glob("runs/*/round-*/*"))
    if not links:
        sys.exit(f"{workspace}/runs: holds no steps, expected runs/NAME/round-NNN/STEP")
    return {f"{link.name}@{int(link.parent.name[6:])}": digests_of(link.resolve()) for link in links}


def digests_of(artifact: Path) -> dict[str, str]:
    """sha256 of every file that the manifest of a step lists, each compared with the manifest."""
    listed = files_of(json.loads((artifact / "manifest.json").read_bytes()))
    if not listed:
        sys.exit(f"{artifact}/manifest.json: lists no files")
    for path, expected in listed.items():
        if sha256_of(artifact / path) != expected:
            sys.exit(f"{artifact / path}: its sha256 is not what its manifest says")
    return {path: untimed(artifact / path) if path == "metrics.jsonl" else listed[path] for path in listed}


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_of(document: Any) -> dict[str, str]:
    """The paths with their sha256 in a manifest, however deep its list `files` lies."""
    if not isinstance(document, dict):
        return {}
    if "files" in document:
        return {file["path"]: file["sha256"] for file in document["files"]}
    return {path: sha256 for value in document.values() for path, sha256 in files_of(value).items()}


def untimed(path: Path) -> str:
    """sha256 of a metrics file's rows, sorted, without what a clock decides."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    kept = sorted(json.dumps(row, sort_keys=True) for row in rows if not row["name"].startswith(TIMED))
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()


def measure(folder: Path, tree: Path, only: list[str]) -> dict[str, Any]:
    """The digests of all runs, or of those in `only`."""
    document = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    names = ["quickstart", *document["recipes"]]
    if unknown := set(only) - set(names):
        sys.exit(f"--only {min(unknown)}: no such recipe, expected one of {', '.join(names)}")
    write_world(folder / "world")
    server = ThreadingHTTPServer(("127.0.0.1", 0), BigramServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found = {}
    for name in only or names:
        print(name, file=sys.stderr, flush=True)
        if name == "quickstart":
            found[name] = run(name, folder / "workspace", tree, "rounds=6")
            continue
        recipe = written(name, document, f"http://127.0.0.1:{server.server_port}/v1", folder / name)
        found[name] = run(str(recipe), folder / name / "workspace", tree)
    return found


def written(name: str, document: dict[str, Any], url: str, folder: Path) -> Path:
    """The file of the recipe called `name`, in a new folder. JSON, which is YAML without anchors: kdpipe takes none."""
    recipe = {"name": name, **document["all"]}
    for section, value in document["recipes"][name].items():
        recipe[section] = recipe.get(section, {}) | value if isinstance(value, dict) else value
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe).replace("SERVER", url))
    return path


def machine(tree: Path) -> dict[str, Any]:
    """What digests depend on beside the recipes: the commit, the versions and the CPU."""
    packages = ("torch", "transformers", "tokenizers", "pyarrow", "peft")
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    flags = Path("/proc/cpuinfo").read_text().split()
    return {
        "commit": subprocess.check_output(command, cwd=tree, text=True).strip(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_limits": {name: os.environ[name] for name in CPU_LIMITS if name in os.environ},
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "versions": {name: version(name) for name in packages},
    }


def compare(before: Path, after: Path) -> int:
    """Prints what differs, and the surroundings where these do; 1 where any digest differs."""
    documents = [json.loads(path.read_bytes()) for path in (before, after)]
    for name in documents[0].keys() - {"commit", "digests"}:
        if documents[0][name] != documents[1].get(name):
            print(f"{name}: {documents[0][name]} and {documents[1].get(name)}")
    first, second = (flat(document["digests"]) for document in documents)
    different = [key for key in sorted({*first, *second}) if first.get(key) != second.get(key)]
    for key in different:
        print(*key, first.get(key, "missing")[:16], second.get(key, "missing")[:16])
    print(f"{len(different)} of {len({*first, *second})} payloads differ")
    return int(bool(different) or not first)


def flat(digests: dict[str, Any]) -> dict[tuple[str, str, str], str]:
    """The digests by recipe, step and file."""
    return {
        (recipe, step, file): sha256
        for recipe, steps in digests.items()
        for step, files in steps.items()
        for file, sha256 in files.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout whose kdpipe is run")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a recipe; repeatable")
    parser.add_argument("--folder", type=Path, help="an empty folder, in which the runs stay")
    parser.add_argument("-o", "--output", type=Path, help="a file; - or none is stdout")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="of two outputs; runs nothing"
    )
    arguments = parser.parse_args()
    if arguments.compare:
        return compare(*arguments.compare)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tree = arguments.tree.resolve()
    if not (tree / "kdpipe" / "__main__.py").is_file():
        sys.exit(f"{tree}: holds no kdpipe, expected a checkout of it")
    surroundings = machine(tree)
    with tempfile.TemporaryDirectory(prefix="kdpipe-digests-") as temporary:
        digests = measure((arguments.folder or Path(temporary)).resolve(), tree, arguments.only)
    text = json.dumps({**surroundings, "digests": digests}, indent=1, sort_keys=True) + "\n"
    if arguments.output not in (None, Path("-")):
        arguments.output.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
