"""The table of latencies of a study: measured once, on the machine that prepares it first, then read.

A run that is continued elsewhere keeps its table: latencies of two machines cannot be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import Tensor

from search.base.errors import StudyError
from search.base.progress import slow
from search.base.stop import Stop
from search.problem.run_directory import LATENCY, RunDirectory
from search.problem.workspace import Workspace
from ssm_mp.config import Config
from ssm_mp.data import Windows
from ssm_mp.evaluation.latency import MOST_ROUNDS, LatencyTable, measure_latency, table_from_json

_POOR = 0.1
"""Largest relative error of a prediction that is worth a note."""


def latency_table(run: RunDirectory, workspace: Workspace, say: Callable[[str], None], stop: Stop) -> LatencyTable:
    """The study's table of latencies; measured, and written down, where there is none yet."""
    mark = workspace.fingerprint_digest
    table = stored_latency(run, mark)
    if table is None:
        search, space = workspace.spec.search, workspace.space
        length = search.latency_length or workspace.splits.search.length
        say(f"measuring latencies of a prefill, batch {search.latency_batch}, length {length}")
        ids = prompts(workspace.splits.search, search.latency_batch, length, workspace.checkpoint.config)
        progress = slow("measuring latencies", MOST_ROUNDS)

        def before_round() -> None:
            stop.check()
            progress.step()

        table = measure_latency(workspace.converter, space.choices, ids, before_round=before_round)
        progress.close()
        run.write_json(LATENCY, {"fingerprint": mark, **table.to_json()})
    error = table.error
    say(
        f"latency: {1e3 * table.fp32:.3f} ms in FP32; predictions are off by {100 * error.median:.1f} % (median), "
        f"{100 * error.worst:.1f} % (worst of {len(table.checks)} maps), rank correlation {error.spearman:.2f}"
    )
    if error.worst > _POOR:
        say(
            f"note: predictions off by more than {100 * _POOR:.0f} % mostly mean that the machine was busy; to measure "
            "again, give --run-dir a new directory while nothing else runs"
        )
    return table


def stored_latency(run: RunDirectory, mark: str | None = None) -> LatencyTable | None:
    """The table that a run directory holds; None where there is none, or one of another fingerprint than `mark`."""
    stored = run.read_json(LATENCY)
    if stored is None or mark not in (None, stored.get("fingerprint")):
        return None
    try:
        return table_from_json({name: value for name, value in stored.items() if name != "fingerprint"})
    except (KeyError, TypeError) as error:
        raise StudyError(
            f"{run / LATENCY}: damaged ({error}); restore it, or give --run-dir another directory"
        ) from None


def prompts(windows: Windows, batch: int, length: int, config: Config) -> Tensor:
    """Prompts of one shape from the text of windows, `[batch, length]`; it begins again where it is too short.

    Raises StudyError beyond the model's `max_tokens`.
    """
    if config.max_tokens is not None and length > config.max_tokens:
        raise StudyError(
            f"[search] latency_length = {length}, but {config.limit}; expected at most {config.max_tokens}"
        )
    text = windows.ids.flatten()
    return text.repeat(-(-batch * length // text.numel()))[: batch * length].reshape(batch, length)


def summary(table: LatencyTable) -> dict[str, Any]:
    """What answers and metrics say of a table: the shape, FP32's latency, how far predictions are off."""
    return {
        "batch": table.batch,
        "length": table.length,
        "device": table.device,
        "threads": table.threads,
        "fp32_seconds": table.fp32,
        "reference_seconds": table.reference,
        "prediction_error": {**asdict(table.error), "maps": len(table.checks)},
    }
