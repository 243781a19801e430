"""Where the command `ssm-mp` begins: with this distribution's own packages, whatever else has their names.

`search` is a name that people give to files of their own. One on PYTHONPATH or in the current folder would be found
first, so both packages are loaded from beside this file rather than looked for. Other processes are started by this
file's path, for the same reason. It imports nothing but the standard library, and can be run as a script.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_PACKAGES = ("ssm_mp", "search")


def main() -> None:
    """Run the command line of this very installation."""
    root = Path(__file__).absolute().parents[1]
    for name in _PACKAGES:
        _load(name, root / name)
    from search.cli.main import main as command_line

    command_line()


def _load(name: str, folder: Path) -> None:
    """Import a package from its folder; what has its name, and was imported already, is put out of the way."""
    file = folder / "__init__.py"
    found = getattr(sys.modules.get(name), "__file__", None)
    if found is not None and Path(found).absolute() == file:
        return
    spec = spec_from_file_location(name, file, submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None or not file.is_file():
        sys.exit(f"error: {folder} is missing, which belongs to {Path(__file__).absolute()}; install ssm-mp again")
    for other in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
        del sys.modules[other]
    package = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(package)


if __name__ == "__main__":
    main()
