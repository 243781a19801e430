"""Writing pictures: each file whole or not at all."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from search.base.errors import StudyError
from ssm_mp.errors import MachineError

KINDS = (".png", ".svg", ".pdf")
"""Files that a picture can be written to."""


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG, each whole or not at all."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        partial = path.with_name(f".partial-{path.name}")
        try:
            figure.savefig(partial, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise MachineError(f"{path}: cannot be written ({error})") from None
    return paths


def require_writable(path: Path) -> None:
    """Raise StudyError where a picture could not be written to `path`, before anything is measured."""
    if path.suffix not in KINDS:
        raise StudyError(f"{path}: a picture ends in {', '.join(KINDS)}")
    if not path.parent.is_dir():
        raise StudyError(f"{path}: there is no folder {path.parent}")


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        figure.savefig(partial, dpi=150)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise MachineError(f"{path}: cannot be written ({error})") from None
