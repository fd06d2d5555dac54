"""Write the API reference of compofa and nas as HTML.

Run by ``make docs``::

    python tools/api_reference.py FOLDER [PACKAGE ...]

Warnings of pdoc, such as names that do not resolve, are errors.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pdoc

PACKAGES = ("compofa", "nas")
COMMANDS = r"!.+\.cli\b"


def complete(name: str) -> None:
    """Add to ``__all__`` and the namespace of a package what pdoc does not look for itself.

    These are the submodules, and the names that a module's ``__getattr__`` loads on first use.
    """
    module = import_module(name)
    children = [child.name for child in iter_modules(getattr(module, "__path__", ()))]
    if hasattr(module, "__all__"):
        vars(module).update({name: getattr(module, name) for name in module.__all__})
        module.__all__ = [*module.__all__, *children]
    for child in children:
        if child != "__main__":
            complete(f"{name}.{child}")


def write_reference(folder: Path, packages: Sequence[str]) -> None:
    """Write one page per module, an index and a search index to ``folder``."""
    for package in packages:
        complete(package)
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*packages, COMMANDS, output_directory=folder)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("expected the output folder, got no arguments")
    warnings.simplefilter("error")
    # pdoc does not evaluate annotations of a NamedTuple under `from __future__ import annotations`.
    warnings.filterwarnings("ignore", r"Error parsing type annotation ForwardRef\(")
    write_reference(Path(sys.argv[1]), sys.argv[2:] or PACKAGES)
