"""`group = "auto"`: groups of like sensitivity, made once of gradient probes and kept with the run's fingerprint.

Until they are made the fingerprint says by which rule they will be, so that another study is refused before anything
is measured. Probes are of single components and kept under the fingerprint of the study without groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from search.base.errors import StudyError
from search.measure.probe import Probe
from search.problem.grouping import rule_of, told
from search.problem.groups import GROUPS, Groups, groups_in
from search.problem.run_directory import FINGERPRINT, RunDirectory
from search.problem.space import Space
from search.problem.workspace import Workspace
from search.run.widening import check_or_widen
from search.sampling.clusters import clusters, sensitivities
from ssm_mp.components import Component
from ssm_mp.scheme import ActivationScheme


def grouped_as_stored(workspace: Workspace, run: RunDirectory) -> Workspace | None:
    """A study with the groups that its run directory holds; itself where it asks for none of `auto`.

    None where they are still to be made. Raises StudyError where they are of another model.
    """
    if workspace.spec.precision.group != "auto":
        return workspace
    stored = run.read_json(FINGERPRINT)
    held = stored.get(GROUPS, {}) if isinstance(stored, dict) else {}
    if held.get("rule") != rule_of(workspace.spec.precision) or held.get("members") is None:
        return None
    groups, known = groups_in(stored), {component.name for component in workspace.space.components}
    if not known.issuperset(member for members in groups.values() for member in members):
        run.check_fingerprint(workspace.fingerprint())
    return workspace.grouped(groups)


def grouped_by_probes(
    workspace: Workspace, run: RunDirectory, probes: Callable[[], Sequence[Probe]], say: Callable[[str], None]
) -> Workspace:
    """The same, made of `probes()` and kept where the run directory has none yet. May be repeated."""
    found = grouped_as_stored(workspace, run)
    if found is None:
        check_or_widen(workspace.spec, run, workspace.fingerprint(), say)
        precision = workspace.spec.precision
        groups = by_sensitivity(workspace.space, probes(), precision.activations, precision.max_groups)
        found = _kept(workspace.grouped(groups), run)
    if found is not workspace:
        for line in found.space.narrowed():
            say(f"note: {line}")
        say(told(found.space))
    return found


def _kept(workspace: Workspace, run: RunDirectory) -> Workspace:
    """Put the groups into the run's fingerprint; where another process was faster, its groups count."""
    with run.lock(FINGERPRINT).held():
        former = grouped_as_stored(workspace.ungrouped, run)
        if former is not None:
            return former
        run.write_json(FINGERPRINT, {**run.fingerprint(), **workspace.fingerprint()})
    return workspace


def by_sensitivity(space: Space, probes: Sequence[Probe], scheme: ActivationScheme, most: int) -> Groups:
    """At most `most` movable things of free components: like choices, and like cost of the lowest for each byte saved.

    What belongs to no layer (embedding, head) stays alone. Raises StudyError where `most` is too small for that.
    """
    lowered = {(probe.component, probe.precision): probe.log_increase for probe in probes}
    free = space.free

    def kind(component: Component) -> tuple[object, ...]:
        return space.choices[component.name], component.name if component.layer is None else None

    ends = [(space.choices[component.name][0], space.choices[component.name][-1]) for component in free]
    pairs = list(zip(free, ends, strict=True))
    cost = np.array([lowered[component.name, low] for component, (_, low) in pairs])
    saved = np.array([max(1, c.bytes(top, scheme) - c.bytes(low, scheme)) for c, (top, low) in pairs], dtype=float)
    kinds = [kind(component) for component in free]
    if len(set(kinds)) > most:
        raise StudyError(
            f"[precision] max_groups = {most}, but {len(set(kinds))} must stay apart (what belongs to no layer, and "
            f"other choices): set max_groups to more than that"
        )
    found = clusters(sensitivities(cost, saved), saved, kinds, most) if free else []
    several = [[free[i].name for i in sorted(held)] for held in found if len(held) > 1]
    return {f"auto {number}": tuple(members) for number, members in enumerate(several, start=1)}
