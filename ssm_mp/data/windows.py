"""Texts and token files → windows, and their division into disjoint splits.

Dimensions: `w` windows, `L` window length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ssm_mp.errors import DataError

END_OF_TEXT = "<|endoftext|>"

TokenIds = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Windows:
    """Fixed-length token sequences `ids [w, L]`, int64: the unit of evaluation and of statistics.

    Each window predicts its tokens 1 … L−1 from those before them.
    """

    ids: Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def predicted(self) -> int:
        """Predicted tokens of one window."""
        return self.length - 1

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids and their arrangement."""
        return hashlib.sha256(str(tuple(self.ids.shape)).encode() + self.ids.numpy().tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint windows: activation ranges, probes and trials, and the winner's certificate.

    token_counts: how often each token occurs in the calibration text, `[V]`.
    """

    calibration: Windows
    search: Windows
    certify: Windows
    token_counts: Tensor


def load_tokenizer(path: str | Path, vocabulary: int) -> Tokenizer:
    """A `tokenizer.json`. Raises DataError where it cannot be read or has more entries than the model's vocabulary."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no tokenizer at {path}: expected a tokenizer.json of the `tokenizers` library")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every unreadable file
        raise DataError(f"{path}: not a tokenizer.json of the `tokenizers` library ({error})") from None
    tokenizer.no_truncation()  # whatever was saved with it, a text is read whole
    tokenizer.no_padding()
    size = tokenizer.get_vocab_size()
    if size > vocabulary:
        raise DataError(
            f"{path}: the tokenizer has {size} entries, the model's vocabulary {vocabulary}; "
            "this tokenizer does not belong to this checkpoint"
        )
    return tokenizer


def tokenize(documents: Sequence[str], tokenizer: Tokenizer) -> TokenIds:
    """Token ids of all documents, each followed by the end of text where the tokenizer has one."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    tail = [] if end is None or len(documents) < 2 else [end]
    texts = tokenizer.encode_batch(list(documents), add_special_tokens=False)
    encoded = [np.array([*text.ids, *tail], dtype=np.int64) for text in texts]
    return np.concatenate(encoded) if encoded else np.zeros(0, dtype=np.int64)


def read_tokens(path: str | Path, tokenizer: Tokenizer | None, vocabulary: int) -> TokenIds:
    """Token ids of a `.npy` file, or of a text file through the tokenizer.

    Raises DataError for a missing file, ids outside the vocabulary, or a text without a tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no text or token file at {path}")
    if path.suffix == ".npy":
        return _read_ids(path, vocabulary)
    if tokenizer is None:
        raise DataError(
            f'{path}: a text needs a tokenizer ([data] tokenizer = "…/tokenizer.json"), or give token ids as .npy'
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a UTF-8 text ({error.reason} at byte {error.start})") from None
    return _within_vocabulary(tokenize([text], tokenizer), vocabulary, path)


def _read_ids(path: Path, vocabulary: int) -> TokenIds:
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a readable .npy file of numbers ({error})") from None
    if not isinstance(ids, np.ndarray) or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"{path}: expected integer token ids, found {getattr(ids, 'dtype', type(ids).__name__)}")
    return _within_vocabulary(ids.reshape(-1), vocabulary, path).astype(np.int64)


def _within_vocabulary(ids: TokenIds, vocabulary: int, path: Path) -> TokenIds:
    wrong = np.flatnonzero((ids < 0) | (ids >= vocabulary))
    if wrong.size:
        raise DataError(
            f"{path}: token id {int(ids[wrong[0]])} at position {wrong[0]} is outside the model's vocabulary "
            f"of {vocabulary}"
        )
    return ids


def cut(tokens: TokenIds, length: int) -> Windows:
    """Consecutive windows of `length` tokens; what is left over is dropped."""
    count = tokens.size // length
    return Windows(torch.from_numpy(tokens[: count * length].reshape(count, length).copy()))


def draw(windows: Windows, counts: Sequence[int], seed: int, what: str) -> list[Windows]:
    """Disjoint random windows, `counts` of each, the same for the same seed.

    Drawn at random rather than as stretches, so that each split is a fair sample of the whole text, which is
    what the certificate's statistics assume. Raises DataError where there are too few.
    """
    needed = sum(counts)
    if len(windows) < needed:
        raise DataError(
            f"{what} gives {len(windows)} windows of {windows.length} tokens, {needed} are asked for "
            f"({' + '.join(map(str, counts))}); give a longer text or ask for fewer windows"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:needed]
    return [Windows(windows.ids[part.sort().values]) for part in order.split(list(counts))]


def synthetic_windows(counts: TokenIds, windows: int, length: int, seed: int) -> Windows:
    """Made-up calibration sequences, for when no text may be used: a mix of three kinds, in turn.

    counts `[V]`: how often each token occurs, from any text, or zeros where nothing is known. A third of the
    sequences is uniform over the vocabulary, a third over the most frequent tenth, a third over the rarest half.
    """
    vocabulary = counts.size
    by_frequency = np.argsort(-counts, kind="stable")
    pools = (by_frequency, by_frequency[: max(1, vocabulary // 10)], by_frequency[vocabulary // 2 :])
    rng = np.random.default_rng(seed)
    rows = [rng.choice(pools[i % len(pools)], size=length) for i in range(windows)]
    return Windows(torch.from_numpy(np.stack(rows).astype(np.int64)))
