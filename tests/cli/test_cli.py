"""The command line: help with examples, exit codes, what goes where, and every command on a tiny finished run."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import kdpipe
import kdpipe.pipeline.request
from kdpipe.cli.app import app
from tests.worlds import NearWorker, write_recipe

COMMAND = typer.main.get_command(app)
NAMES = sorted(COMMAND.commands)  # type: ignore[attr-defined]
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x9b]")
EXAMPLE = re.compile(r"Example: kdpipe (.+)", re.DOTALL)
STORY = ("run", "rollout", "sft", "teacher-score", "train", "evaluate")


@pytest.fixture(scope="module")
def near() -> Iterator[None]:
    """Workers in this process: what is tested here is the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kdpipe.pipeline.request, "Worker", NearWorker)
        patch.setattr(sys, "argv", ["kdpipe", "run", "recipe.yaml"])
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, near: None) -> dict[str, Any]:
    """A finished run of two rounds, and what the command that made it printed. Tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("world")
    recipe = write_recipe(folder, rounds=2)
    result = CliRunner().invoke(app, ["run", str(recipe), "--workspace", str(folder / "out")])
    return {"folder": folder, "recipe": str(recipe), "workspace": folder / "out", "result": result}


def invoke(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert not CONTROL.search(result.output)
    return result


def on(world: dict[str, Any], command: str, *args: str, code: int = 0, workspace: Path | None = None) -> Any:
    place = str(workspace or world["workspace"])
    return invoke(command, world["recipe"], *args, "--workspace", place, code=code)


@pytest.fixture
def copied(world: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the finished workspace."""
    shutil.copytree(world["workspace"], tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


# ----------------------------------------------------------------------------------------------- help


def test_there_is_a_command_for_every_line_of_the_documentation() -> None:
    wanted = "run sft rollout teacher-score train evaluate check plan status samples export verify gc"
    assert {*wanted.split(), "recipes", "init", "schema", "doctor", "ui"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_a_help_text_that_ends_with_an_example_that_parses(name: str) -> None:
    command = COMMAND.commands[name]  # type: ignore[attr-defined]
    match = EXAMPLE.search(command.help)
    assert match, f"{name}: no example"
    words = shlex.split(match[1].partition(">")[0])
    assert words[0] == name
    assert match[1] in command.help.rstrip()[-len(match[1]) :], f"{name}: the example comes last"
    # Parsing alone: options and arguments are understood, and nothing runs.
    command.make_context(name, words[1:])
    shown = " ".join(invoke(name, "--help").stdout.split())
    assert f"Example: kdpipe {' '.join(match[1].split())}" in shown


def test_help_without_a_command_lists_them_all() -> None:
    shown = invoke("--help").stdout
    assert all(re.search(rf"^ *{re.escape(name)} ", shown, re.MULTILINE) for name in NAMES)
    assert "Example: kdpipe run" in shown


def test_every_option_and_argument_is_explained() -> None:
    for name in NAMES:
        for parameter in COMMAND.commands[name].params:  # type: ignore[attr-defined]
            assert getattr(parameter, "help", None) or getattr(parameter, "hidden", False), (
                name,
                parameter.name,
            )


def test_every_command_on_a_recipe_takes_set_workspace_and_json() -> None:
    for name in NAMES:
        flags = {flag for parameter in COMMAND.commands[name].params for flag in parameter.opts}  # type: ignore[attr-defined]
        if "recipe" in {parameter.name for parameter in COMMAND.commands[name].params} & {"recipe"}:  # type: ignore[attr-defined]
            takes = {"--json"} if name in ("gc", "init", "check") else {"--set", "--workspace", "--json"}
            assert takes <= flags, name


@pytest.mark.parametrize(
    "args", [["nonsense"], ["run"], ["run", "quickstart", "--nonsense"], ["plan", "a", "b"]]
)
def test_wrong_usage_exits_with_2_and_says_where_help_is(args: list[str]) -> None:
    result = invoke(*args, code=2)
    assert result.stdout == ""
    assert "--help" in result.stderr


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("kdpipe run quick", ["quickstart"]),
        ("kdpipe run ./", []),  # the shell's own files
        ("kdpipe teach", ["teacher-score"]),
        ("kdpipe plan gsm8k-qwen3", ["gsm8k-qwen3-kdrl", "gsm8k-qwen3-opd"]),
    ],
)
def test_the_shell_completes_commands_and_shipped_recipes(words: str, offered: list[str]) -> None:
    asked = {"_KDPIPE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = CliRunner().invoke(app, prog_name="kdpipe", env=asked)
    assert result.stdout.split() == offered


def test_version() -> None:
    assert invoke("--version").stdout == f"kdpipe {kdpipe.__version__}\n"


# ------------------------------------------------------------------------------------------------ run


def test_run_tells_progress_on_stderr_and_the_outcome_on_stdout(world: dict[str, Any]) -> None:
    result = world["result"]
    assert result.exit_code == 0, result.output
    out, err = result.stdout, result.stderr
    assert re.search(r"^tiny-\w{8}: 12 steps to do$", err, re.MULTILINE)
    for number in (1, 2):
        line = next(line for line in err.splitlines() if line.startswith(f"round {number}/2"))
        assert re.search(r"reverse KL +-?\d+\.\d+ +reward \d\.\d+ +accuracy +\d+\.\d% ", line)
    assert "round" not in out.partition("artifacts")[0].replace("student after round 2", "")
    table = [line for line in out.splitlines() if re.search(r"\d% to", line)]
    assert [re.split(r"  +", line)[0] for line in table] == [
        "student before",
        "student after round 2",
        "teacher",
    ]
    assert re.search(r"accuracy [+-]\d+\.\d points, paired 95 % interval", out)
    assert re.search(r"held-out reverse KL [+-]\d+\.\d+ nats, paired 95 % interval", out)
    assert f"artifacts  {world['workspace']}/runs/tiny-" in out
    assert re.search(r"^report     \S+/runs/tiny-\w+/report\.html$", out, re.MULTILINE)
    assert re.search(r"kdpipe samples \S+recipe.yaml --wrong --workspace ", out)
    assert max(map(len, [*table, *err.splitlines()])) <= 80
    assert not CONTROL.search(out + err)


def test_repeating_run_finds_everything_done(world: dict[str, Any], copied: Path) -> None:
    result = on(world, "run", workspace=copied)
    assert "0 steps to do, 12 done already" in result.stderr
    assert "student after round 2" in result.stdout


def test_run_in_json_is_json_lines_on_stdout_and_nothing_else(world: dict[str, Any], copied: Path) -> None:
    result = on(world, "run", "--force", "train@2", "--json", workspace=copied)
    events = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert (kinds[0], kinds[-1]) == ("begin", "end")
    assert events[1]["step"] == "train@2"
    assert kinds.count("step begins") == kinds.count("step ends") >= 1
    assert events[-1]["evaluations"]["student before"]["accuracy"] <= 1
    assert result.stderr == ""


@pytest.mark.parametrize("stage", STORY[1:])
def test_a_stage_command_runs_what_it_lacks_and_finds_the_rest_done(
    world: dict[str, Any], copied: Path, stage: str
) -> None:
    assert "0 steps to do" in on(world, stage, workspace=copied).stderr


def test_a_stage_command_runs_the_first_step_that_is_not_done(world: dict[str, Any], tmp_path: Path) -> None:
    first = on(world, "rollout", "--json", workspace=tmp_path / "w").stdout
    begun = [json.loads(line)["step"] for line in first.splitlines() if '"step begins"' in line]
    assert begun == ["sft:student@0", "rollout@1"]
    second = on(world, "rollout", "--json", workspace=tmp_path / "w").stdout
    begun = [json.loads(line)["step"] for line in second.splitlines() if '"step begins"' in line]
    assert begun[-1] == "rollout@2"
    assert "rollout@1" not in begun


def test_the_first_rounds_of_a_plan_can_be_run_alone(world: dict[str, Any], tmp_path: Path) -> None:
    on(world, "run", "--rounds", "0", workspace=tmp_path / "w")
    states = json.loads(on(world, "plan", "--json", workspace=tmp_path / "w").stdout)["steps"]
    assert {state["round"] for state in states if state["state"] == "done"} == {0}
    assert on(world, "status", "--check", code=6, workspace=tmp_path / "w").exit_code == 6


# ------------------------------------------------------------------------------------- plan and status


def test_plan_says_what_a_changed_field_costs(world: dict[str, Any]) -> None:
    shown = on(world, "plan", "--set", "train.optimizer.learning_rate=0.5").stdout
    assert re.search(r"^tiny-\w{8}: 12 steps, 6 to run$", shown.splitlines()[0])
    assert re.search(r"^  rollout@1 +done$", shown, re.MULTILINE)
    assert re.search(r"^  train@1 +stale +train.optimizer.learning_rate: 0.001 -> 0.5$", shown, re.MULTILINE)


def test_plan_tells_rounds_that_are_alike_in_one_line(world: dict[str, Any], tmp_path: Path) -> None:
    shown = on(world, "plan", "--set", "rounds=50", workspace=tmp_path / "w").stdout
    told = [line for line in shown.splitlines() if re.match(r"  rounds? |  \S+@\d+ ", line)]
    assert told[-1] == "  rounds 2 to 50: the same"
    assert {line.split()[0].partition("@")[2] for line in told[:-1]} == {"0", "1"}


def test_plan_says_where_a_schedule_ends(world: dict[str, Any]) -> None:
    shown = on(world, "plan", "--set", "train.optimizer.schedule=linear").stdout
    assert "\nthe linear schedule ends after round 2" in shown


@pytest.mark.parametrize(
    ("kd", "line"),
    [
        ("rkl", "the sampled token, 4 bytes"),
        ("{term: jsd, support: {teacher_top_k: 8}}", "8 ids and a tail, 72 bytes"),
        ("{term: jsd, support: {union_top_k: 8}}", "16 ids and a tail, 136 bytes"),
        ("{term: jsd, support: vocabulary}", "its hidden state, 132 bytes"),
    ],
)
def test_plan_says_how_much_is_kept_of_the_teacher(world: dict[str, Any], kd: str, line: str) -> None:
    lines = on(world, "plan", "--set", f"train.objective.kd={kd}").stdout.splitlines()
    [at] = [number for number, text in enumerate(lines) if text.startswith("kept of the teacher")]
    assert lines[at] == f"kept of the teacher for each token: {line}"
    assert lines[at + 1].startswith("  the other choices: ")
    assert max(map(len, lines[at : at + 2])) <= 100


def test_plan_and_check_write_nothing(world: dict[str, Any], tmp_path: Path) -> None:
    on(world, "plan", workspace=tmp_path / "w")
    on(world, "status", workspace=tmp_path / "w")
    invoke("check", world["recipe"])
    assert not (tmp_path / "w").exists()


def test_status_of_a_finished_run(world: dict[str, Any]) -> None:
    lines = on(world, "status", "--check").stdout.splitlines()
    assert re.fullmatch(r"tiny-\w{8}: not running", lines[0])
    assert lines[1] == "12 of 12 steps, 2 of 2 rounds done"
    number, headroom, result = lines[-3:]
    assert number.startswith("round 2/2  reverse KL")
    assert re.match(
        r"teacher teacher: accuracy \S+, headroom \S+ points \(paired 95 % interval \S+ to ", headroom
    )
    assert "accuracy" in result or "effect" in result
    assert "  rollout            ##" in lines
    [found] = json.loads(on(world, "status", "--json").stdout)["headroom"]
    assert found["low"] <= found["change"] <= found["high"]
    assert found["exempt"] is None


def test_status_check_exits_with_6_while_work_is_left(world: dict[str, Any]) -> None:
    result = on(world, "status", "--check", "--set", "rounds=3", code=6)
    assert "next: rollout@3" in result.stdout
    assert on(world, "status", "--set", "rounds=3").exit_code == 0


# ----------------------------------------------------------------------------------------- reading it


def test_samples_shows_questions_answers_and_grades(world: dict[str, Any]) -> None:
    shown = on(world, "samples", "--round", "0", "--limit", "2").stdout
    assert shown.startswith("evaluate:student@0: 2 of 8 completions\n")
    assert shown.count("\n  | ") >= 2
    assert shown.count("  expected ") == 2
    found = json.loads(on(world, "samples", "--limit", "3", "--wrong", "--json").stdout)
    assert found["step"] == "rollout@2"
    assert not any(row["correct"] for row in found["samples"])
    for row in found["samples"]:  # they were trained on
        assert 0 <= row["mismatch_nats_max"] < 1e-4
        assert row["mismatch_acted_tokens"] == 0
    text = on(world, "samples", "--limit", "3", "--wrong").stdout
    assert text.count("  sampler minus trainer: mean ") == len(found["samples"])


def test_verify_finds_nothing_wrong_with_a_finished_run(world: dict[str, Any]) -> None:
    assert re.match(r"12 steps, \d+ files, .* MB: sha256 compared\n$", on(world, "verify", "--full").stdout)


def damage(workspace: Path, *, same_size: bool) -> None:
    path = next(workspace.glob("runs/*/round-001/rollout/rollouts.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data) if same_size else bytes(data[:-1]))


def test_verify_exits_with_5_and_says_how_to_rebuild(world: dict[str, Any], copied: Path) -> None:
    damage(copied, same_size=False)
    for args in ([], ["--full"]):
        result = on(world, "verify", *args, code=5, workspace=copied)
        assert "rollouts.parquet" in result.stderr
        assert "1 of 12 steps are damaged" in result.stderr
        assert "--force rollout@1" in result.stderr
    document = json.loads(on(world, "verify", "--json", code=5, workspace=copied).stdout)
    assert list(document["damaged"]) == ["rollout@1"]


def test_damage_that_keeps_the_size_is_found_by_sha256(world: dict[str, Any], copied: Path) -> None:
    damage(copied, same_size=True)
    assert on(world, "verify", workspace=copied).exit_code == 0
    assert "sha256" in on(world, "verify", "--full", code=5, workspace=copied).stderr


def test_a_damaged_step_is_rebuilt_by_the_command_that_verify_names(
    world: dict[str, Any], copied: Path
) -> None:
    damage(copied, same_size=False)
    result = on(world, "run", code=5, workspace=copied)
    assert "--force rollout@1" in result.stderr
    on(world, "run", "--force", "rollout@1", workspace=copied)
    assert on(world, "verify", "--full", workspace=copied).exit_code == 0


def test_a_step_that_is_linked_and_was_not_begun_is_no_damage(world: dict[str, Any], copied: Path) -> None:
    """As a kill leaves it between the link and the first file of its entry."""
    [place] = copied.glob("runs/*/round-002/evaluate-student")
    for path in place.resolve().iterdir():
        path.unlink()
    shown = on(world, "compare", "--json", workspace=copied).stdout
    assert [row["before"] for row in json.loads(shown)["rows"]] == [True, False]
    assert on(world, "verify", workspace=copied).stdout.startswith("11 steps")


def test_gc_says_what_could_go_and_removes_it_only_when_told(world: dict[str, Any], copied: Path) -> None:
    assert invoke("gc", "--workspace", str(copied)).stdout == "nothing to remove\n"
    for run in (copied / "runs").iterdir():
        shutil.rmtree(run)
    entries = list(copied.glob("store/*/*"))
    said = invoke("gc", "--workspace", str(copied)).stdout
    assert said.count("no run links it") == len(entries) == 12
    assert "kdpipe gc --delete" in said
    assert list(copied.glob("store/*/*")) == entries
    document = json.loads(invoke("gc", "--workspace", str(copied), "--delete", "--json").stdout)
    assert document["deleted"] is True
    assert document["bytes"] > 0
    assert not list(copied.glob("store/*/*"))


def test_gc_keeps_what_a_run_still_links(world: dict[str, Any], copied: Path) -> None:
    on(world, "run", "--rounds", "1", "--set", "train.optimizer.learning_rate=0.5", workspace=copied)
    other = next(run for run in (copied / "runs").iterdir() if not (run / "round-002").exists())
    shutil.rmtree(other)
    said = invoke("gc", "--workspace", str(copied), "--delete").stdout
    assert said.count("no run links it") == 2  # train@1 and its evaluation
    assert on(world, "status", "--check", workspace=copied).exit_code == 0


@pytest.mark.parametrize("number", [None, 0, 1])
def test_an_exported_student_loads_in_transformers(
    world: dict[str, Any], tmp_path: Path, number: int | None
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = tmp_path / "student"
    which = [] if number is None else ["--round", str(number)]
    shown = invoke(
        "export", world["recipe"], str(target), *which, "--workspace", str(world["workspace"])
    ).stdout
    assert shown == f"{target}: student {2 if number is None else number}\n"
    model = AutoModelForCausalLM.from_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tokenizer("Ana has 3 apples.", return_tensors="pt").input_ids
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], model.config.vocab_size)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


# ------------------------------------------------------------------------------------------- recipes


def test_recipes_are_listed_with_what_they_show_and_printed_by_name() -> None:
    lines = invoke("recipes").stdout.splitlines()
    assert any(line.startswith("quickstart ") for line in lines)
    text = invoke("recipes", "quickstart").stdout
    assert json.loads(invoke("recipes", "quickstart", "--json").stdout)["text"] == text
    assert set(json.loads(invoke("recipes", "--json").stdout)) == {line.split()[0] for line in lines}


def test_init_starts_a_project_that_checks_and_overwrites_nothing(tmp_path: Path) -> None:
    shown = invoke("init", str(tmp_path / "mine")).stdout
    assert "kdpipe run" in shown
    assert "good" in invoke("check", str(tmp_path / "mine" / "recipe.yaml")).stdout
    before = (tmp_path / "mine" / "recipe.yaml").read_bytes()
    assert "exists already" in invoke("init", str(tmp_path / "mine"), code=2).stderr
    assert (tmp_path / "mine" / "recipe.yaml").read_bytes() == before


def test_the_schema_knows_every_section() -> None:
    document = json.loads(invoke("schema").stdout)
    assert {"task", "student", "teachers", "train", "runtime"} <= set(document["properties"])


@pytest.mark.slow
def test_doctor_prints_the_environment_as_a_block() -> None:
    shown = invoke("doctor").stdout
    for name in ("kdpipe", "python", "torch", "transformers", "cpu_cores"):
        assert re.search(rf"^{name} +\S", shown, re.MULTILINE)


JSON_COMMANDS = [
    ["check", "RECIPE"],
    ["plan", "RECIPE", "PLACE"],
    ["status", "RECIPE", "PLACE"],
    ["samples", "RECIPE", "PLACE"],
    ["verify", "RECIPE", "PLACE"],
    ["gc", "PLACE"],
    ["recipes"],
    ["init", "NEW"],
    ["export", "RECIPE", "NEW", "PLACE"],
    pytest.param(["doctor"], marks=pytest.mark.slow),
    ["doctor", "RECIPE", "PLACE"],
]


@pytest.mark.parametrize("args", JSON_COMMANDS, ids=" ".join)
def test_json_is_one_document_on_stdout(world: dict[str, Any], tmp_path: Path, args: list[str]) -> None:
    values = {"RECIPE": [world["recipe"]], "NEW": [str(tmp_path / "new")]}
    values["PLACE"] = ["--workspace", str(world["workspace"])]
    words = [word for arg in args for word in values.get(arg, [arg])]
    result = invoke(*words, "--json")
    assert isinstance(json.loads(result.stdout), dict)
    assert result.stderr == ""


# --------------------------------------------------------------------------------------------- colours


def in_a_terminal(*args: str, cwd: Path, **environment: str) -> str:
    """What a command prints when stdout and stderr are a terminal."""
    leader, follower = pty.openpty()
    inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", "from kdpipe.cli.app import main; main()", *args],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=cwd,
        env={**inherited, "TERM": "xterm-256color", "COLUMNS": "80", **environment},
    )
    os.close(follower)
    pieces = []
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # Linux says so when the other end is closed
            break
        if not piece:
            break
        pieces.append(piece)
    process.wait()
    os.close(leader)
    return b"".join(pieces).decode().replace("\r\n", "\n")


def test_a_terminal_gets_colours_unless_no_color_is_set(world: dict[str, Any], tmp_path: Path) -> None:
    args = ("plan", world["recipe"], "--workspace", str(world["workspace"]))
    coloured = in_a_terminal(*args, cwd=tmp_path)
    assert "\x1b[32mdone\x1b[0m" in coloured
    for setting in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        bare = in_a_terminal(*args, cwd=tmp_path, **setting)
        assert bare == re.sub(r"\x1b\[\d+m", "", coloured)
    assert "\x1b[31merror:\x1b[0m" in in_a_terminal("check", "nowhere.yaml", cwd=tmp_path)


@pytest.mark.parametrize(
    "command", [["--help"], ["run", "--help"], ["check", "nowhere.yaml"], ["nonsense"]], ids=" ".join
)
def test_no_color_leaves_a_terminal_without_control_codes(command: list[str], tmp_path: Path) -> None:
    assert not CONTROL.search(in_a_terminal(*command, cwd=tmp_path, NO_COLOR="1"))


def test_status_with_tracking_on_counts_what_mlflow_lacks(world: dict[str, Any], copied: Path) -> None:
    shown = on(world, "status", "--set", "tracking.enabled=true", workspace=copied).stdout
    assert "12 steps are not in MLflow yet" in shown
    document = json.loads(on(world, "status", "--set", "tracking={}", "--json", workspace=copied).stdout)
    assert document["not_mirrored"] == 12
    assert invoke("status", "quickstart", "--workspace", str(copied / "new")).exit_code == 0


SIGNALLED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "kdpipe.cli.app":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from kdpipe.__main__ import main
main()
"""


def test_an_interrupt_while_the_command_line_is_imported_ends_it_without_a_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, "recipes"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_the_module_is_the_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kdpipe", "recipes"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "quickstart" in done.stdout
