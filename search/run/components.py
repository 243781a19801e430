"""What a run directory keeps of a model's components, so that a search can be shown without loading its model."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from search.base.errors import StudyError
from search.problem.run_directory import COMPONENTS, RunDirectory
from search.problem.workspace import Workspace


def keep_components(run: RunDirectory, workspace: Workspace) -> None:
    """Write every component's kind, layer, parameters, pin, and bytes at each of its choices, where they are not there
    yet."""
    space, scheme = workspace.space, workspace.spec.precision.activations
    rows = [
        {
            "name": component.name,
            "kind": component.kind,
            "layer": component.layer,
            "parameters": component.count,
            "fp32_bytes": component.fp32_bytes,
            "pinned": component.name in space.pins,
            "bytes": {precision: component.bytes(precision, scheme) for precision in space.choices[component.name]},
        }
        for component in space.components
    ]
    with suppress(StudyError):  # a damaged one is written anew
        if run.read_json(COMPONENTS) == {"components": rows}:
            return
    run.write_json(COMPONENTS, {"components": rows})


def stored_components(run: RunDirectory) -> list[dict[str, Any]]:
    """The rows that `keep_components` wrote. Raises StudyError where there are none, or other ones than the study's."""
    stored = run.read_json(COMPONENTS)
    rows: list[dict[str, Any]] = stored.get("components", []) if isinstance(stored, dict) else []
    try:
        held = {row["name"]: set(row["bytes"]) for row in rows}
    except (KeyError, TypeError) as error:
        raise StudyError(f"{run / COMPONENTS}: damaged ({error}); remove it and run the search again") from None
    missing = [name for name, choices in run.space().items() if not set(choices) <= held.get(name, set())]
    if missing:
        raise StudyError(
            f"{run / COMPONENTS}: missing, or of a smaller space (it lacks {missing[0]}): the run is of an older "
            "version, or its preparation has not come so far; `ssm-mp search` or `finish` writes it"
        )
    return rows
