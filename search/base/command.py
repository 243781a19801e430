"""The command that starts another process of this very installation."""

from __future__ import annotations

import sys
from pathlib import Path

COMMAND = (sys.executable, "-P", str(Path(__file__).absolute().parents[2] / "ssm_mp" / "start.py"))
"""`ssm-mp` by the path of its first file, so that nothing need be activated and no file of the user's takes its place.

-P: imports nothing that happens to lie beside that file.
"""
