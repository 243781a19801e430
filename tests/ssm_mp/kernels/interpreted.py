"""Runs the kernels of CUDA on every case and saves what they give: `python -m … FILE`, with TRITON_INTERPRET set."""

from __future__ import annotations

import sys

import torch

from ssm_mp.kernels import cuda
from tests.ssm_mp.kernels.cuda_cases import CASES, MODELS, SPOILED, evaluated, spoiled_rows

if __name__ == "__main__":
    found = {name: getattr(cuda, kernel)(*arguments()) for name, (kernel, arguments) in CASES.items()}
    spoiled = {kernel: getattr(cuda, kernel)(spoiled_rows(), second()) for kernel, second in SPOILED.items()}
    models = {f"{family}, {scheme}": evaluated(family, scheme, "cuda") for family, scheme in MODELS}
    torch.save({"cases": found, "spoiled": spoiled, "models": models}, sys.argv[1])
