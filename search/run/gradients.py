"""Gradient probes, kept chunk by chunk of windows, so that an interrupted preparation goes on after the last one."""

from __future__ import annotations

import base64

import numpy as np

from search.base.progress import Progress
from search.base.stop import Stop
from search.measure.backward import Scores, chunk_windows, joined, keys_of, layer_by_layer
from search.measure.gradient import effects_of, gradient_probes, gradient_windows
from search.measure.probe import Probe
from search.problem.run_directory import GRADIENTS, RunDirectory
from search.problem.workspace import Workspace
from ssm_mp.data import Windows


def measured_gradients(run: RunDirectory, workspace: Workspace, stop: Stop) -> list[Probe]:
    """The probes of all gradient windows: what the run directory holds of them, and measured what it does not."""
    if not workspace.space.free:
        return []
    windows, size, keys = gradient_windows(workspace), chunk_windows(workspace), len(keys_of(workspace))
    known = _stored(run, workspace.fingerprint_digest, keys)
    begins = range(0, len(windows), size)
    done = sum((begin, min(begin + size, len(windows))) in known for begin in begins)
    layers = len(workspace.model.layers) + 1
    progress = Progress("gradients", layers * len(begins), layers * done, percent=True)

    def step() -> None:
        stop.check()
        progress.step()

    found = []
    for begin in begins:
        part = (begin, min(begin + size, len(windows)))
        if part not in known:
            known[part] = layer_by_layer(workspace, Windows(windows.ids[slice(*part)]), step)
            _save(run, workspace.fingerprint_digest, part, known[part])
        found.append(known[part])
    progress.close()
    return gradient_probes(workspace, effects_of(workspace, joined(found), windows.predicted))


def _save(run: RunDirectory, mark: str, part: tuple[int, int], scores: Scores) -> None:
    packed = {name: _packed(getattr(scores, name)) for name in ("weights", "inputs")}
    run.append_lines(GRADIENTS, [{"fingerprint": mark, "windows": list(part), **packed}])


def _stored(run: RunDirectory, mark: str, keys: int) -> dict[tuple[int, int], Scores]:
    """Scores by the first window and the one after the last."""
    lines = [line for line in run.read_lines(GRADIENTS) if line["fingerprint"] == mark]
    return {
        (line["windows"][0], line["windows"][1]): Scores(
            _unpacked(line["weights"], keys), _unpacked(line["inputs"], keys)
        )
        for line in lines
    }


def _packed(scores: np.ndarray) -> str:
    return base64.b64encode(scores.astype("<f8").tobytes()).decode()


def _unpacked(text: str, keys: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f8").astype(np.float64).reshape(-1, keys)
