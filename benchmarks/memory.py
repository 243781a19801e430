"""Resident memory of a model in a process of its own: before it is loaded, and at the most while it reads and decodes.

    python -m benchmarks.memory PATH      # a checkpoint or an artifact folder; one JSON object

What the process takes without a model (the interpreter, torch, the compiled kernels, and what torch's products set up
at their first use) is measured first and given beside the peak. Linux only: it reads /proc/self.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from ssm_mp import load_artifact, load_model
from ssm_mp.artifact import is_artifact
from ssm_mp.conversion.convert import Converter
from ssm_mp.decoding.decode import open_decoder, prefill
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.model import LanguageModel, build
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme

PROMPT, STEPS = 96, 16
_TINY = MambaConfig(64, 16, 32, 4, 2, 4, 1)


def measure(path: Path) -> dict[str, int]:
    """`before` and `peak` resident bytes of this process around loading and running one model."""
    _run(_tiny())
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is counted from here
    before = _status("VmRSS")
    model = load_artifact(path) if is_artifact(path) else load_model(path)
    loaded = _status("VmRSS")
    _run(model)
    return {"before": before, "loaded": loaded, "peak": _status("VmHWM")}


def measure_apart(path: Path) -> dict[str, int]:
    """The same in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", str(path)], stdout=subprocess.PIPE, encoding="utf-8", check=True
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


def _run(model: LanguageModel) -> None:
    """Read a prompt and decode a few tokens."""
    ids = torch.arange(PROMPT)[None] % model.config.vocabulary
    read = prefill(model, ids)
    decoder = open_decoder(model, read)
    for token in range(STEPS):
        decoder.step(torch.tensor([token]))


def _tiny() -> LanguageModel:
    """A model of no size, int8, so that everything is loaded and set up that models share."""
    tensors = {p.name: torch.rand(p.shape) for p in _TINY.parameters()}
    converter = Converter(build(_TINY, tensors), Scheme(activations="dynamic"))
    return converter.convert(PrecisionMap.uniform("int8", converter.components))


def _status(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def main() -> None:
    """Measure one model."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("path", type=Path)
    print(json.dumps(measure(arguments.parse_args().path)))


if __name__ == "__main__":
    main()
