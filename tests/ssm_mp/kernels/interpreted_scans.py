"""Runs the Triton scans on cases by name and saves what they give: `python -m … FILE CASE…`, TRITON_INTERPRET set."""

from __future__ import annotations

import sys

import torch

from ssm_mp.kernels import scan_triton
from tests.ssm_mp.kernels.scan_cases import FAMILIES

if __name__ == "__main__":
    path, *names = sys.argv[1:]
    found = {
        (family, name): getattr(scan_triton, family)(**inputs(name))
        for family, (inputs, _) in FAMILIES.items()
        for name in names
    }
    torch.save({"\n".join(key): value for key, value in found.items()}, path)
