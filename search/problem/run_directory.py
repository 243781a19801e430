"""The run directory of a study: its database, probes, plots, front and log, with one owner at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from search.base.errors import StudyError
from search.base.file_lock import FileLock
from search.base.paths import shown
from search.base.whole_file import write_whole
from search.problem.groups import GROUPS, groups_in
from search.problem.spec import StudySpec
from ssm_mp.errors import MachineError
from ssm_mp.runtimes.registry import FORMATS

FINGERPRINT = "study.json"
PROBES = "probes.jsonl"
GRADIENTS = "gradients.jsonl"
BASELINE = "baseline.json"
CERTIFY_BASELINE = "certify-baseline.json"
"""The FP32 checkpoint on the certify windows."""
FIDELITY = "fidelity.json"
"""The winner beside FP32 on the certify windows."""
LATENCY = "latency.json"
CERTIFICATE = "certificate.json"
TRIES = "tries.jsonl"
FRONT = "front.json"
REPORT = "report.md"
PAGE = "report.html"
COMPONENTS = "components.json"
"""Each component's kind, place and bytes at every choice: what the page shows of a model without loading it."""
PROVENANCE = "provenance.json"
DRIFT = "drift.json"
"""Drifts that were measured of the study's maps, by the path of what was measured."""
DATABASE = "study.db"
JOURNAL = "study.journal"
WINNER = "winner"
"""The winner's artifact; its file for a target has the same name, with the format's suffix or word."""

LOCKS = "locks"
"""Folder of the locks; they mean nothing while no process works on the run."""
GROUPING = "grouping"
"""Part of a fingerprint: how components are grouped, where that is not one a projection."""
ROUNDING = "rounding"
"""Part of a fingerprint: how weights below 8 bits are rounded, where a study has such choices."""
_WIDE = frozenset({"fp16", "int8"})
"""Precisions that are not below 8 bits."""
_RESTORE = "restore it, or give --run-dir another directory"


class RunDirectory:
    """`runs/<study>/`, made on first use."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, spec: StudySpec, path: str | Path | None = None) -> RunDirectory:
        """The directory given, or `runs/<study name>` under the current folder, the target's name added if any."""
        name = spec.name if spec.export.target is None else f"{spec.name}-{spec.export.target}"
        return cls(Path(path) if path is not None else Path("runs") / name)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def lock(self, name: str) -> FileLock:
        """A lock that processes which work on this run share. Makes the directory."""
        folder = self / LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / name)

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the directory for this process; raises StudyError where another process holds it."""
        try:
            made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self.lock("owner")
        except OSError as error:
            raise MachineError(f"{self.path}: the run directory cannot be used ({error})") from None
        with lock.tried() as mine:
            if not mine:
                raise StudyError(
                    f"{self.path}: another process is working in this run directory; wait for it, or give --run-dir "
                    "another"
                )
            try:
                yield
            finally:
                if made and [path.name for path in self.path.iterdir()] == [LOCKS]:  # nothing came of it
                    self._remove_locks()

    def _remove_locks(self) -> None:
        """Remove the directory with its locks, which are empty files; with anything else it stays."""
        with suppress(OSError):
            for path in (self / LOCKS).iterdir():
                if path.stat().st_size == 0:
                    path.unlink()
            (self / LOCKS).rmdir()
            self.path.rmdir()

    def require(self) -> None:
        """Raise StudyError where nothing has been run here yet."""
        if not (self / FINGERPRINT).exists():
            aimed = [word for word in FORMATS if (self.path.parent / f"{self.path.name}-{word}" / FINGERPRINT).exists()]
            other = f"; there is one with --target {' and one with --target '.join(aimed)}" if aimed else ""
            raise StudyError(f"{self.path}: no search has been run here yet; start one with `ssm-mp search`{other}")

    def check_fingerprint(self, fingerprint: dict[str, Any]) -> None:
        """Store a study's fingerprint, or refuse, saying what changed, where another one is stored."""
        current = json.loads(json.dumps(fingerprint))
        with self.lock(FINGERPRINT).held():  # of workers on unlike machines the first one counts
            stored = self.read_json(FINGERPRINT)
            if stored is None:
                left = [name for name in (DATABASE, JOURNAL, PROBES) if (self / name).exists()]
                if left:
                    raise StudyError(
                        f"{self / FINGERPRINT} is missing, so nobody knows what {left[0]} belongs to; {_RESTORE}"
                    )
                self.write_json(FINGERPRINT, current)
                return
        require_same(stored, with_all(stored, current), str(self.path))

    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the study that was run here. Raises StudyError where nothing was."""
        self.require()
        stored = self.read_json(FINGERPRINT)
        if not isinstance(stored, dict) or "space" not in stored:
            raise StudyError(f"{self / FINGERPRINT}: damaged; {_RESTORE}")
        return stored

    def space(self) -> dict[str, list[str]]:
        """Every component's choices, as the fingerprint holds them."""
        choices: dict[str, list[str]] = self.fingerprint()["space"]
        return choices

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Which components move together, as the fingerprint holds them."""
        return groups_in(self.fingerprint())

    def write_json(self, name: str, content: object) -> None:
        """Write a file whole: under another name first, then renamed."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text whole: under another name first, then renamed."""
        write_whole(self / name, shown(text), errors="backslashreplace")

    def read_json(self, name: str) -> Any:
        """The content of a file, None where there is none."""
        path = self / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StudyError(f"{path}: damaged ({error}); {_RESTORE}") from None

    def append_lines(self, name: str, contents: Iterable[object]) -> None:
        """Add lines of JSON to a file and see them written."""
        try:
            with self.lock(name).held(), (self / name).open("ab+") as file:
                # a crash can leave half a line at the end: cut it off, or it would spoil the next one
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                file.writelines(json.dumps(content).encode() + b"\n" for content in contents)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise MachineError(f"{self / name}: cannot be written ({error})") from None

    def read_lines(self, name: str) -> list[Any]:
        """The whole lines of a file; a last line that was cut short by a crash does not count."""
        path = self / name
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").split("\n")
        try:
            return [json.loads(line) for line in lines[:-1] if line]
        except ValueError as error:
            raise StudyError(f"{path}: damaged ({error}); {_RESTORE}") from None


def mark_of(fingerprint: Mapping[str, Any]) -> str:
    """A fingerprint as one short word, to mark what was measured under it."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def grown_in(stored: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Whether two fingerprints differ in nothing but more choices of the same components."""
    before, now = stored.get("space"), current.get("space")
    if not isinstance(before, dict) or not isinstance(now, dict) or before == now:
        return False
    others = _changed(stored, of_space(with_all(stored, current), before))
    return not others and before.keys() == now.keys() and all(set(held) <= set(now[c]) for c, held in before.items())


def of_space(fingerprint: Mapping[str, Any], space: Mapping[str, Any]) -> dict[str, Any]:
    """What a fingerprint is with a smaller space: it says nothing of rounding where nothing is below 8 bits."""
    narrow = any(not _WIDE.issuperset(choices) for choices in space.values())
    found = {**fingerprint, "space": space}
    return found if narrow else {key: value for key, value in found.items() if key != ROUNDING}


def grown(stored: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """A stored fingerprint with the larger space of the current one, and what that says of rounding."""
    return {**stored, **{key: current[key] for key in ("space", ROUNDING) if key in current}}


def with_all(stored: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint with None for what only the stored one has, so that this too is a difference."""
    return {**dict.fromkeys(stored), **current}


def require_same(stored: Mapping[str, Any], current: Mapping[str, Any], where: str) -> None:
    """Raise StudyError, saying what changed, where two fingerprints differ."""
    changed = _changed(stored, current)
    if GROUPING in changed:  # a checkpoint's digest and its space follow from that
        changed = [key for key in changed if key not in ("checkpoint", "space")]
    if GROUPS in changed:  # members share their choices
        changed = [key for key in changed if key != "space"]
    if changed:
        details = "; ".join(_difference(key, stored.get(key), current[key]) for key in changed)
        rule = " (a space may get more choices, never lose any)" if changed == ["space"] else ""
        advice = (
            f"Its trials cannot be compared with new ones: restore what changed{rule}, or give --run-dir another "
            "directory"
        )
        if grown_in(stored, current):
            advice = "`ssm-mp search` takes its trials over into the larger space"
        named = ", another ".join(map(_called, changed))
        raise StudyError(f"{where}: this study was begun with another {named} ({details}). {advice}")


def _changed(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The parts of `current` that `stored` says otherwise."""
    # version 0.2 did not say which vector instructions it computed with
    stored = {**stored, "compute": current.get("compute")} if stored.get("compute") == "cpu float32" else stored
    return [key for key in current if stored.get(key) != current[key]]


def _called(key: str) -> str:
    """A part of a fingerprint in a sentence."""
    return "division into groups" if key == GROUPS else key


def _difference(key: str, stored: object, current: object) -> str:
    """What changed, in a few words."""
    if key == GROUPS:
        rules = [one["rule"] if isinstance(one, dict) else "none" for one in (stored, current)]
        return f"{rules[0]} → {rules[1]}" if rules[0] != rules[1] else f"{rules[0]}, with other members"
    stored, current = ({} if key == GROUPING and one is None else one for one in (stored, current))
    if isinstance(stored, dict) and isinstance(current, dict):
        names = [name for name in sorted(stored.keys() | current.keys()) if stored.get(name) != current.get(name)]
        shown = [f"{name}: {stored.get(name)!r} → {current.get(name)!r}" for name in names[:3]]
        return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{key}: {str(stored)[:24]} → {str(current)[:24]}"
