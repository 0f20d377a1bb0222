"""Which way of decoding computes a model exactly: tried on the model before it is used.

Each way decodes a few rows, of unlike lengths, some dropped on the way, and is compared with a forward of each row by
itself that has no cache. Windows of attention are narrowed to a few tokens meanwhile, so that rows grow across them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from kdpipe.engines.hf.decoding import CacheDecoder, Decoder, LlamaDecoder, WholeDecoder, is_llama_like
from kdpipe.errors import ModelError
from kdpipe.models.logprobs import body_of
from kdpipe.models.model_folder import unfit


@dataclass(frozen=True, slots=True)
class Decoding:
    """A decoder, and whether it takes prompts of unlike lengths side by side."""

    decoder: type[Decoder]
    takes_unlike: bool = True

    @property
    def warning(self) -> str | None:
        """What whoever waits for samples should know of it."""
        if self.decoder is not WholeDecoder:
            return None
        return (
            "no cache carries its state from token to token exactly, so each new token takes a forward of the whole "
            "sequence: sampling takes about as many times longer as a prompt and half a completion have tokens"
        )


_FAST = Decoding(LlamaDecoder)
_WAYS = (Decoding(CacheDecoder), Decoding(CacheDecoder, takes_unlike=False), Decoding(WholeDecoder))
_PROMPT_LENGTHS = (2, 2, 7, 7)
_STEPS = 3
_NARROW = 4
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size")
_TOLERANCE, _HALF_TOLERANCE = 2e-4, 0.1
"""A part of what hidden states differ by from token to token: far more than rounding, far less than a lost state."""
_WITHOUT_CACHE = ("nemotron_h", "zamba2")
"""Their cached steps of transformers 5.24 leave out `time_step_min`, which three tokens may not show."""
_known: dict[tuple[object, ...], Decoding] = {}


@torch.inference_mode()
def decoding_of(model: PreTrainedModel) -> Decoding:
    """The fastest way that is exact for this model; tried once a process for all models with its config.

    Raises ModelError where none is: what follows a token then changes what the model makes of it.
    """
    fast = is_llama_like(model)
    key = (type(model), fast, model.config.to_json_string(), model.dtype, model.device.type)
    if key in _known:
        return _known[key]
    rows = _rows(model.config.get_text_config().vocab_size)
    with _narrow_windows(model), unfit(f"a {type(model).__name__} that cannot be run"):
        wanted = [states for group in (rows[:2], rows[2:]) for states in _uncached(model, group)]
    cached = model.config.model_type not in _WITHOUT_CACHE
    for way in (_FAST, *_WAYS) if fast else _WAYS if cached else _WAYS[-1:]:
        if _is_exact(model, way, rows, wanted):
            _known[key] = way
            return way
    raise ModelError(
        f"a {type(model).__name__} makes something else of a token where others follow it, so it cannot write one "
        "token after the other, nor be scored beside longer sequences",
        hint="take a causal model, or set in its config.json what makes it one, as is_decoder",
    )


def _is_exact(
    model: PreTrainedModel, way: Decoding, rows: Sequence[list[int]], wanted: Sequence[torch.Tensor]
) -> bool:
    """Whether a way's hidden states are those of a forward over each row by itself."""
    groups = (rows,) if way.takes_unlike else (rows[:2], rows[2:])
    try:
        with _narrow_windows(model), unfit(f"{way.decoder.__name__} cannot run it"):
            found = [states for group in groups for states in _decoded(model, way, group)]
    except ModelError:
        return False
    everything = torch.cat(list(wanted))
    spread = (everything - everything.mean(0)).norm(dim=-1).mean()
    rounding = torch.finfo(model.dtype).eps * everything.norm(dim=-1).mean()
    tolerance = _TOLERANCE if model.dtype in (torch.float32, torch.float64) else _HALF_TOLERANCE
    errors = [(one - other[: len(one)]).norm(dim=-1).mean() for one, other in zip(found, wanted, strict=True)]
    return bool(torch.stack(errors).amax() <= tolerance * spread + 4 * rounding)


def _decoded(model: PreTrainedModel, way: Decoding, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    """Hidden states [steps, H] of each row from its prompt's last token on; the first ends early."""
    decoder = way.decoder(model, max_new_tokens=_STEPS)
    repeats = Counter(tuple(row[:-_STEPS]) for row in rows)
    hidden = decoder.prefill(list(repeats), list(repeats.values()), max_tokens=2 * max(_PROMPT_LENGTHS))
    states = [[state] for state in hidden.t()]
    for step in range(_STEPS):
        if step == 1:
            decoder.keep(torch.arange(1, len(rows), device=model.device))
        running = range(1 if step else 0, len(rows))
        hidden = decoder.step(
            torch.tensor([rows[row][step - _STEPS] for row in running], device=model.device)
        )
        for row, state in zip(running, hidden.t(), strict=True):
            states[row].append(state)
    return [torch.stack(row).float() for row in states]


def _uncached(model: PreTrainedModel, rows: list[list[int]]) -> list[torch.Tensor]:
    """Hidden states [steps, H] from the prompt's last token on, of rows of one length, by one forward."""
    ids_BT = torch.tensor(rows, device=model.device)
    hidden_BTH = body_of(model)(input_ids=ids_BT, use_cache=False).last_hidden_state
    return [hidden_TH[-_STEPS - 1 :].float() for hidden_TH in hidden_BTH]


def _rows(num_ids: int) -> list[list[int]]:
    """Prompts, of which the first two are one, and other tokens after each."""
    return [
        [
            (7 * place + 11 * (max(number, 1) if place < length else number + 5) + 3) % num_ids
            for place in range(length + _STEPS)
        ]
        for number, length in enumerate(_PROMPT_LENGTHS)
    ]


@contextlib.contextmanager
def _narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Narrows the windows that masks and caches read from the config."""
    config = model.config.get_text_config()
    wide = {name: size for name in _WINDOWS if isinstance(size := getattr(config, name, None), int)}
    try:
        for name, size in wide.items():
            setattr(config, name, min(size, _NARROW))
        yield
    finally:
        for name, size in wide.items():
            setattr(config, name, size)
