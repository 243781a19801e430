"""Token by token: a prompt is read once, and then each token costs one step from the states that the last one left.

Dimensions: `b` sequences, `l` tokens of the prompt, `n` new tokens, `V` vocabulary.

`prefill` and `step` are the readable reference: values in, values out. A `Decoder` is the fast session, which carries
its states in place; `generate` uses one.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ssm_mp.decoding.compiled import CompiledDecoder
from ssm_mp.errors import DataError, EvaluationError
from ssm_mp.model import LanguageModel, LayerState


@dataclass(frozen=True, eq=False)
class Decoding:
    """Where `b` sequences stand.

    logits: of the token after the last one read, `[b, V]`, in the order of the token ids.
    states: what each layer carries. position: how many tokens were read so far.
    """

    logits: Tensor
    states: tuple[LayerState, ...]
    position: int


@dataclass(frozen=True, eq=False)
class Generation:
    """Prompt and new tokens `ids [b, l + n]`, and the seconds that reading the one and making the others took.

    The first new token comes with the prompt, so `decode_seconds` are those of the n − 1 others.
    """

    ids: Tensor
    prompt: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """Tokens of the prompts read in a second, all sequences together."""
        return self.ids.shape[0] * self.prompt / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens made in a second, all sequences together; None where none was made by a step."""
        steps = self.ids.shape[1] - self.prompt - 1
        return self.ids.shape[0] * steps / self.decode_seconds if steps > 0 else None


class Decoder(Protocol):
    """A session of `b` sequences. Unlike `step`, it changes itself."""

    def step(self, tokens: Tensor) -> Tensor:
        """The next token of every sequence, `[b]` → logits of the one after it, `[b, V]`."""
        ...


class PlainDecoder:
    """The reference `step` again and again: for any family, precision and device."""

    def __init__(self, model: LanguageModel, decoding: Decoding) -> None:
        self._model = model
        self.decoding = decoding

    def step(self, tokens: Tensor) -> Tensor:
        """As `Decoder.step`."""
        self.decoding = step(self._model, self.decoding, tokens)
        return self.decoding.logits


@torch.inference_mode()
def prefill(model: LanguageModel, ids: Tensor) -> Decoding:
    """Read prompts `ids [b, l]` from the beginning.

    Raises DataError where there is no token, one is not in the vocabulary, or there are more than the model has
    positions for.

    >>> import torch
    >>> from ssm_mp import load_model, prefill, step
    >>> model = load_model("studies/reference/model.safetensors")
    >>> read = prefill(model, torch.tensor([[476, 1724]]))
    >>> step(model, read, read.logits.argmax(dim=-1)).position
    3
    """
    _require_ids(model, ids)
    hidden, states = model.carry(ids.to(model.device, torch.int64))
    return Decoding(model.head(hidden[:, -1:])[:, 0], states, ids.shape[1])


@torch.inference_mode()
def step(model: LanguageModel, decoding: Decoding, tokens: Tensor) -> Decoding:
    """One more token of every sequence, `tokens [b]`; `decoding` is left as it is. Raises DataError as `prefill`."""
    sequences = decoding.logits.shape[0]
    if tokens.shape != (sequences,):
        raise DataError(f"expected one token for each of {sequences} sequences, found shape {list(tokens.shape)}")
    _require_ids(model, tokens[:, None])
    hidden, states = model.carry(tokens[:, None].to(model.device, torch.int64), decoding.states, decoding.position)
    return Decoding(model.head(hidden)[:, 0], states, decoding.position + 1)


def open_decoder(model: LanguageModel, decoding: Decoding) -> Decoder:
    """A session that goes on from `decoding`, which stays as it is: compiled where there is a compiled way."""
    compiled = CompiledDecoder.of(model, decoding.states, decoding.position)
    return PlainDecoder(model, decoding) if compiled is None else compiled


def generate(
    model: LanguageModel, ids: Tensor, new_tokens: int, *, temperature: float = 0.0, seed: int = 0
) -> Tensor:  # fmt: skip
    """Prompts `ids [b, l]` and `new_tokens` more of each: `[b, l + new_tokens]`.

    temperature: 0 takes the most likely token; above, tokens are drawn from softmax(logits ÷ temperature) with a
    generator of its own, so the same seed gives the same tokens.
    Raises DataError as `prefill`, and where the model has too few positions: the message says how many tokens are
    possible. Raises EvaluationError where a logit is not finite.

    >>> import torch
    >>> from ssm_mp import generate, load_model
    >>> model = load_model("studies/reference/model.safetensors")
    >>> generate(model, torch.tensor([[476, 1724, 8]]), 5).shape
    torch.Size([1, 8])
    """
    return generate_timed(model, ids, new_tokens, temperature=temperature, seed=seed).ids


@torch.inference_mode()
def generate_timed(
    model: LanguageModel, ids: Tensor, new_tokens: int, *, temperature: float = 0.0, seed: int = 0
) -> Generation:  # fmt: skip
    """As `generate`, with the time that it took."""
    _require_ids(model, ids)
    require_room(model, ids.shape[1], new_tokens)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise DataError(f"a temperature of {temperature}: expected 0 (the most likely token) or a positive number")
    generator = torch.Generator().manual_seed(seed)
    began = time.perf_counter()
    read = prefill(model, ids)
    made = [_chosen(read.logits, temperature, generator)] if new_tokens else []
    prefilled = time.perf_counter()
    if new_tokens > 1:
        decoder = open_decoder(model, read)
        for _ in range(new_tokens - 1):
            made.append(_chosen(decoder.step(made[-1].to(model.device)), temperature, generator))
    ended = time.perf_counter()
    return Generation(
        torch.cat([ids, *(tokens[:, None].to(ids) for tokens in made)], dim=1),
        ids.shape[1], prefilled - began, ended - prefilled,
    )  # fmt: skip


def require_room(model: LanguageModel, prompt: int, new_tokens: int) -> None:
    """Raise DataError where a model cannot make so many tokens after a prompt of `prompt` tokens."""
    if new_tokens < 0:
        raise DataError(f"{new_tokens} new tokens: expected 0 or more")
    most = model.config.max_tokens
    if most is None:
        return
    possible = max(0, most - prompt + 1)  # the last token made is not read, so it needs no position
    if new_tokens > possible or prompt > most:
        raise DataError(
            f"{new_tokens} new tokens after a prompt of {prompt}, but {model.config.limit}: "
            + (
                f"at most {possible} new ones are possible"
                if prompt <= most
                else "none is possible, shorten the prompt"
            )
        )


def _chosen(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """The next tokens `[b]` by logits `[b, V]`, on the CPU, so that a seed gives the same draws on every device."""
    logits = logits.cpu()
    if not bool(torch.isfinite(logits).all()):
        raise EvaluationError("a logit is NaN or infinite; no next token can be chosen")
    if temperature == 0:
        return logits.argmax(dim=-1)
    below = logits.double() - logits.max(dim=-1, keepdim=True).values  # first, so that no quotient overflows
    shares = (below / temperature).softmax(dim=-1)
    return torch.multinomial(shares, 1, generator=generator)[:, 0]


def _require_ids(model: LanguageModel, ids: Tensor) -> None:
    """Raise DataError where `ids` are not token ids `[b, l]` of the model's vocabulary, or empty."""
    if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise DataError(f"expected token ids [b, l] as integers, found {ids.dtype} of shape {list(ids.shape)}")
    if ids.numel() == 0:
        raise DataError(f"no tokens to read: shape {list(ids.shape)}, expected at least one sequence of one token")
    vocabulary = model.config.vocabulary
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if wrong.numel():
        raise DataError(f"token id {int(wrong[0])} is outside the model's vocabulary of {vocabulary}")
