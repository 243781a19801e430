"""Text from an exported file by ONNX Runtime alone: the loop that a user writes around the step.

    python -m ssm_mp.runtimes.onnx.generate model.onnx "Once upon a time" 64

A prompt for a file without a tokenizer is token ids: "476 1724 8". The most likely token is taken each time.
"""

from __future__ import annotations

import sys

import numpy as np

from ssm_mp.runtimes.onnx.run import Loop


def generate(path: str, prompt: str, new_tokens: int) -> str:
    """The prompt and so many tokens more; as ids where the file has no tokenizer."""
    loop = Loop(path, 1)
    stored = loop.said.get("ssm_mp.tokenizer")
    if stored is None:
        ids = [int(word) for word in prompt.split()]
    else:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(stored)
        ids = tokenizer.encode(prompt).ids
    if not ids:
        raise SystemExit(f"{path}: a prompt of no tokens; give at least one")
    for read in range(len(ids) + new_tokens - 1):
        logits = loop.step(np.array([ids[read]]))  # [1, V]
        if read == len(ids) - 1:
            ids.append(int(logits.argmax()))
    return " ".join(map(str, ids)) if stored is None else str(tokenizer.decode(ids))


if __name__ == "__main__":
    print(generate(sys.argv[1], sys.argv[2], int(sys.argv[3])))
