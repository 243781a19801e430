"""The `[slurm]` table of a study file: sbatch's own long options, checked before anything is submitted."""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Value = str | int | bool
"""What an option may be: `False` means not given, `True` a flag without a value."""

DEFAULTS: dict[str, Value] = {
    "partition": "gpu",
    "gres": "gpu:a30:1",
    "cpus-per-task": 8,
    "mem": "32G",
    "time": "04:00:00",
}
"""What is asked of Slurm where the study says nothing else."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FLAGS = _words(
    "consolidate-segments contiguous hold ignore-pbs overcommit oversubscribe quiet reboot spread-job spread-segments "
    "stepmgr use-min-nodes verbose"
)
_MAYBE_FLAGS = _words("exclusive get-user-env nice no-kill oom-kill-step propagate resv-ports")
_WITH_VALUE = _words(
    "account acctg-freq batch bb bbf begin cluster-constraint comment constraint container container-id container-type "
    "core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot distribution exclude export "
    "export-file extra extra-node-info gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres "
    "gres-flags hint input licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network "
    "nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket partition power "
    "prefer priority profile qos reservation resources segment sockets-per-node switches thread-spec threads-per-core "
    "time time-min tmp tres-bind tres-per-task uid wait-all-nodes wckey"
)
OPTIONS = _FLAGS | _MAYBE_FLAGS | _WITH_VALUE
"""sbatch's long options from Slurm 22.05 to 25.11, without those that the launcher sets itself."""

_LOGS = "logs are kept in the run directory; --run-dir moves it"
_REQUEUED = "every step is requeued, for that is how preempted workers come back"
_PRINTS = "it makes sbatch print something instead of submitting"
RESERVED = {
    "array": "the launcher counts the workers: use --workers, and throttle for the most at once",
    "chdir": "every step runs in the folder where you launch: go there first",
    "clusters": "set SLURM_CLUSTERS in your environment instead, which squeue and scancel read too",
    "dependency": "the launcher chains its steps; to wait for another job, use jobs/search.sbatch with sbatch",
    "error": _LOGS,
    "help": _PRINTS,
    "job-name": "the steps are named ssm-mp-prepare, -search and -finish; use comment for your own words",
    "kill-on-invalid-dep": "the steps wait with afterany, which is never invalid",
    "no-requeue": _REQUEUED,
    "open-mode": "logs are appended to, so that a requeued worker keeps what it wrote",
    "output": _LOGS,
    "parsable": "the launcher asks for it already",
    "requeue": _REQUEUED,
    "signal": "use warning_seconds",
    "test-only": "use --dry-run",
    "usage": _PRINTS,
    "version": _PRINTS,
    "wait": "use `ssm-mp status --watch`",
    "wrap": "use setup for shell lines that come before the worker",
}
"""Options that the launcher sets itself: why, and what to use instead."""


class SlurmSection(BaseModel):
    """`[slurm]`: what each batch job asks of Slurm. Keys are sbatch's long options, with `-` or `_`, and ours.

    setup: shell lines that come first (modules, virtual environment, container).
    throttle: the most workers at once; warning_seconds: how long before its time limit a worker is warned.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    setup: str = ""
    throttle: int | None = Field(default=None, ge=1)
    warning_seconds: int = Field(default=120, ge=1, le=65535)

    @model_validator(mode="before")
    @classmethod
    def _spelt_as_sbatch_does(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        ours = {name.replace("_", "-"): name for name in cls.model_fields}
        kept: dict[str, Any] = {}
        spelt: dict[str, str] = {}
        wrong = []
        for key, value in values.items():
            name = str(key).replace("_", "-")
            if name in spelt:
                wrong.append(f"{spelt[name]!r} and {key!r} are the same option: keep one of them")
            elif name in ours:
                kept[ours[name]] = value
            else:
                try:
                    kept[name] = _checked(name, str(key), value, ours.values())
                except ValueError as error:
                    wrong.append(str(error))
            spelt[name] = str(key)
        if wrong:
            raise ValueError("; ".join(wrong))
        return {**DEFAULTS, **kept}

    @field_validator("setup")
    @classmethod
    def _shell_lines(cls, setup: str) -> str:
        if not setup.replace("\n", "").replace("\t", "").isprintable():
            raise ValueError("expected printable shell lines, found a control character")
        for line in setup.splitlines():
            if line.lstrip().startswith("#SBATCH"):
                raise ValueError(f"{line.strip()!r} would not be read here by Slurm: write it as a key of [slurm]")
        return setup.strip("\n")

    @property
    def options(self) -> dict[str, Value]:
        """The options that are given, those with a default first, then by name."""
        extra = self.model_extra or {}
        names = [*DEFAULTS, *sorted(extra.keys() - DEFAULTS.keys())]
        return {name: extra[name] for name in names if extra[name] is not False}

    def directives(self) -> tuple[str, ...]:
        """The options as sbatch reads them behind `#SBATCH `, in the order of `options`."""
        return tuple(_directives(self.options))


def quoted(value: str) -> str:
    """A value as sbatch reads it in a script: white space would end it, and so would a `#`."""
    return f'"{value}"' if any(sign.isspace() or sign == "#" for sign in value) else value


def unwritable(value: str) -> bool:
    """Whether a value cannot stand in a directive: control characters, quotes or backslashes."""
    return not value.isprintable() or any(sign in value for sign in "\"'\\")


def _directives(options: dict[str, Value]) -> Iterator[str]:
    for name, value in options.items():
        yield f"--{name}" if value is True else f"--{name}={quoted(str(value))}"


def _checked(name: str, key: str, value: object, ours: Iterable[str]) -> Value:
    """The value of one option, ready for sbatch. Raises ValueError where it is none."""
    if name in RESERVED:
        raise ValueError(f"{key!r} cannot be set: {RESERVED[name]}")
    if name not in OPTIONS:
        close = difflib.get_close_matches(name, [*OPTIONS, *RESERVED, *ours], n=1, cutoff=0.0)
        raise ValueError(f"{key!r} is no option of sbatch; the nearest is {close[0]!r}")
    if isinstance(value, datetime.time | datetime.date):
        value = value.isoformat()  # TOML reads 02:00:00 without quotes as a time of day
    if isinstance(value, str):
        value = value.strip() or False
    if not isinstance(value, str | int):
        raise ValueError(f"{key}: expected a string, a whole number, true or false, found {value!r}")
    if value is True and name in _WITH_VALUE:
        raise ValueError(f"{key}: expected a value, found true; false leaves the option out")
    if value is not True and value is not False and name in _FLAGS:
        raise ValueError(f"{key}: expected true or false, found {value!r}")
    if isinstance(value, str) and unwritable(value):
        raise ValueError(f"{key}: expected one line without quotes, backslashes or control characters, found {value!r}")
    return value
