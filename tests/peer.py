"""Where the implementations that we compare ourselves with are installed."""

from __future__ import annotations

import os

import pytest

VARIABLE = "KDPIPE_PEER_PYTHON"


def peer_python() -> str:
    """The Python of an environment that holds the peers; without one, the test fails."""
    if not (python := os.environ.get(VARIABLE)):
        pytest.fail(
            f"set {VARIABLE} to the Python of an environment with torch, trl and lm-eval; "
            ".ci/run shows how to make one"
        )
    return python
