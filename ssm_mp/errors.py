"""One root error and its children: every failure that a user can cause or meet has a class here."""

from __future__ import annotations


class SsmMpError(Exception):
    """Root of all errors with a message meant for the user.

    `exit_code` is what the command line returns: 2 for the user's mistake, 3 for the environment's.
    """

    exit_code = 2


class CheckpointError(SsmMpError):
    """A checkpoint file that cannot be read, or whose tensors do not make a known model."""


class PrecisionMapError(SsmMpError):
    """A precision map that is not total, contradicts itself or names what does not exist."""


class InfeasibleError(SsmMpError):
    """A component that cannot be held at a precision, with the reason (`reason`, no file names)."""


class DataError(SsmMpError):
    """A text, tokenizer or token file that does not give the windows asked for."""


class EvaluationError(SsmMpError):
    """An evaluation whose result is not a usable number."""


class ArtifactError(SsmMpError):
    """An artifact folder that cannot be written, or that is not what it says."""


class ExportError(SsmMpError):
    """A model that a format of another runtime does not hold, or a file for it that cannot be written."""


class DisagreementError(ExportError):
    """A runtime that does not say what it must of a file written for it."""

    exit_code = 1


class MissingError(ExportError):
    """A package of an extra that is not installed."""

    exit_code = 3


class MachineError(SsmMpError):
    """Something that this machine lacks or refuses; nothing is wrong with the input."""

    exit_code = 3
