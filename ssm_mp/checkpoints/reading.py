"""One pass over all values of a checkpoint: its digest, its largest magnitudes, and what is not finite.

A tensor is read in slices, so that no float32 copy of a whole one is made, and only once, since on most machines a
large model is read from a disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssm_mp.files.mapped import let_go

_SLICE = 1 << 22
"""Values that are widened to float32 at a time."""


@dataclass(frozen=True)
class Reading:
    """What one pass found. digest: SHA-256 of config, names, shapes and float32 values, in the order of the names.

    largest: magnitude by name; NaN or infinite where a value is. bad: tensors with such values, and how many.
    """

    digest: str
    largest: Mapping[str, float]
    bad: Mapping[str, int]


def read_through(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reading:
    """Read every value of `tensors` once.

    config: as JSON values, part of the digest.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    largest: dict[str, float] = {}
    bad: dict[str, int] = {}
    with ThreadPoolExecutor(1) as pool:  # hashing leaves the interpreter free
        for name in sorted(tensors):
            tensor = tensors[name]
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            most, wrong = 0.0, 0
            for part in tensor.detach().contiguous().reshape(-1).split(_SLICE):
                if not part.numel():
                    continue
                values = part.float()
                hashed = pool.submit(digest.update, values.numpy())
                low, high = (end.item() for end in torch.aminmax(values))
                found = max(-low, high)
                most = found if not found <= most else most  # NaN stays
                if not found < float("inf"):
                    wrong += int((~torch.isfinite(values)).sum())
                hashed.result()
            largest[name] = most
            if wrong:
                bad[name] = wrong
            let_go([tensor])
    return Reading(digest.hexdigest(), largest, bad)
