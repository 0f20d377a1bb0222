"""MLflow's own page over a workspace, served until a signal."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import FrameType

from kdpipe.errors import KdpipeError
from kdpipe.pipeline.signals import handled
from kdpipe.tracking.memory import DATABASE, ENVIRONMENT, artifacts_uri, database_uri, require_database
from kdpipe.workers.worker import child_environment


def free_port(host: str, first: int = 5000) -> int:
    """The first port from `first` on that nobody listens on at `host`."""
    for port in range(first, first + 100):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return port
    raise KdpipeError(f"{host}: ports {first} to {first + 99} are taken", hint="give another with --port")


def ui_command(workspace: Path, host: str, port: int) -> list[str]:
    """The command that serves MLflow's page over the workspace's store."""
    artifacts, database = artifacts_uri(workspace), database_uri(workspace.resolve() / DATABASE)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database]
    command += ["--default-artifact-root", artifacts, "--artifacts-destination", artifacts]
    # uvicorn imports from its app folder before all others; by default that is the working folder.
    safe_folder = shlex.join(["--app-dir", sysconfig.get_path("stdlib")])
    command += ["--uvicorn-opts", safe_folder]
    return [*command, "--host", host, "--port", str(port), "--workers", "1"]


def serve_ui(workspace: Path, host: str = "127.0.0.1", first_port: int = 5000) -> int:
    """Serves MLflow's page until a signal; returns the server's exit status, 0 after a signal."""
    require_database(workspace)
    stopped = False
    environment = child_environment({**ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
    command = ui_command(workspace, host, free_port(host, first_port))
    process = subprocess.Popen(command, env=environment, start_new_session=True)  # noqa: S603 (our own)

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        urgent, stopped = stopped, True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL if urgent else signal.SIGTERM)

    with handled(stop):
        status = process.wait()
    return 0 if stopped else status
