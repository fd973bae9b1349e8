"""The entry point of `llm-train`, in a module whose name no other project has.

`experiments` is a common name: a package of a user that is called so, on PYTHONPATH or in a folder that Python searches
first, would be imported in place of the one of this project.
"""

import importlib.util
import sys
from pathlib import Path

_PACKAGES = ("experiments", "lightning_modules", "datamodules")


def main() -> None:
    """Run the command, with the packages that are installed beside this file whatever else has their names."""
    for name in _PACKAGES:
        folder = Path(__file__).resolve().parent / name
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    from experiments.__main__ import main as run

    run()
