"""The commands of `ssm-mp` as help shows them: the main job first, panel by panel."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

PANELS = {
    "A study, from begin to end": (
        "init", "search", "report", "export", "status", "inspect", "front", "plot", "probe",
    ),
    "Models and artifacts": (
        "evaluate", "generate", "drift", "convert", "transfer", "formats",
    ),
    "Many workers, on a cluster or by hand": (
        "launch", "prepare", "worker", "finish", "proxy",
    ),
}  # fmt: skip
"""Panels and their commands, both in the order of help. A command that is in none stands after them, in `Others`."""

_OTHERS = "Others"

_ANYWHERE = ("--quiet", "-q")
"""Options of the whole command line that may stand behind the command too."""


def panel_of(name: str) -> str:
    """Where a command stands."""
    return next((panel for panel, names in PANELS.items() if name in names), _OTHERS)


class Commands(TyperGroup):
    """The commands in the order of their panels."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take `--quiet` wherever it stands before a `--`."""
        end = args.index("--") if "--" in args else len(args)
        moved = [arg for arg in args[:end] if arg in _ANYWHERE]
        return super().parse_args(ctx, [*moved, *(arg for arg in args[:end] if arg not in _ANYWHERE), *args[end:]])

    def list_commands(self, ctx: Any) -> list[str]:
        listed = [name for names in PANELS.values() for name in names if name in self.commands]
        return [*listed, *(name for name in super().list_commands(ctx) if name not in listed)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command: Any = super().get_command(ctx, cmd_name)
        if command is not None:
            command.rich_help_panel = panel_of(cmd_name)
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Plain help: a section a panel."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        room = formatter.width - 6 - max(map(len, commands))
        for panel in (*PANELS, _OTHERS):
            rows = [(n, c.get_short_help_str(room)) for n, c in commands.items() if panel_of(n) == panel]
            if rows:
                with formatter.section(panel):
                    formatter.write_dl(rows, col_max=room)
