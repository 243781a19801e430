"""Errors of the search side; the root and its exit codes are in `ssm_mp.errors`."""

from __future__ import annotations

from ssm_mp.errors import SsmMpError


class StudyError(SsmMpError):
    """A study file, a run directory or a resumption that cannot be used."""


class NothingFoundError(SsmMpError):
    """The question was answered, and the answer is no: nothing certified, no such trial."""

    exit_code = 1
