"""``fieldfleet apps new``: a new application, made from toy_regression: it passes the conformance suite as it stands."""

from __future__ import annotations

import importlib.resources
import importlib.util
import keyword
import re
import sys
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path

from fl_core.contracts.errors import InputError
from fl_core.contracts.installed import APPLICATION_ENTRY_POINTS, known_applications, package_version
from fl_core.storage import atomic

TEMPLATE, TEMPLATE_TITLE = "toy_regression", "Toy regression"
NAME = re.compile(r"[a-z][a-z0-9_]{1,48}[a-z0-9]")
SUFFIXES = (".py", ".toml", ".md")

PROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "0.1.0"
description = "{title}, an application of fieldfleet"
requires-python = ">=3.11"
dependencies = ["fieldfleet>={version}"]

[project.entry-points."{group}"]
{name} = "{name}:APPLICATION"

[tool.setuptools]
packages = ["{name}"]
# An editable install is then a line of the path, which a folder of this name where Python is started does not hide.
package-dir = {{"" = "."}}

[tool.setuptools.package-data]
{name} = ["presets/*.toml", "README.md"]
"""


def new_application(name: str, folder: Path | None) -> Path:
    """Write the application and return its folder.

    folder None: ``applications/NAME`` of the checkout that the current folder is, or else a package of its own in ./NAME;
    else a package of its own in ``folder``/NAME. Raises InputError: a name that is taken or cannot be one, a folder that
    exists.
    """
    check_name(name)
    if folder is None and (Path("applications") / TEMPLATE / "__init__.py").is_file():
        target = Path("applications") / name
        _refuse_existing(target)
        with atomic.new_folder(target) as temporary:
            _fill(temporary, name, f"applications.{name}")
        return target
    target = (folder or Path()) / name
    _refuse_existing(target)
    if not target.parent.is_dir():
        raise InputError(f"--dir {target.parent}: no such folder")
    with atomic.new_folder(target) as temporary:
        text = PROJECT.format(
            name=name, title=title(name), version=package_version("fieldfleet") or "0.1", group=APPLICATION_ENTRY_POINTS
        )
        (temporary / "pyproject.toml").write_text(text, encoding="utf-8")
        (temporary / name).mkdir()
        _fill(temporary / name, name, name)
    return target


def check_name(name: str) -> None:
    if not NAME.fullmatch(name) or "__" in name or keyword.iskeyword(name):
        raise InputError(
            f"{name!r} cannot be the name of an application",
            remedy="3 to 50 small letters, digits and single underscores, a letter first: for example soil_moisture",
        )
    if name in known_applications():
        raise InputError(f"application {name!r} exists already", remedy="choose another name")
    if name == "new" or name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None:
        raise InputError(f"{name!r} is the name of an installed Python module", remedy="choose another name")


def title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise InputError(f"{target}: exists already", remedy="choose another name or --dir, or remove it")


def _fill(folder: Path, name: str, package: str) -> None:
    template = importlib.resources.files(f"applications.{TEMPLATE}")
    for path, source in _files(template, Path()):
        text = source.read_text(encoding="utf-8")
        if path.name == "README.md":
            text = _readme(name)
        text = text.replace(f"applications.{TEMPLATE}", package).replace(TEMPLATE, name)
        text = text.replace(f"{TEMPLATE_TITLE}", title(name)).replace(f"{name}: the application to copy. ", f"{name}. ")
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def _files(folder: Traversable, path: Path) -> Iterator[tuple[Path, Traversable]]:
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.is_dir() and entry.name != "__pycache__":
            yield from _files(entry, path / entry.name)
        elif entry.name.endswith(SUFFIXES):
            yield path / entry.name, entry


def _readme(name: str) -> str:
    return f"""\
# {name}

An application of fieldfleet, as `fieldfleet apps new` writes it: linear regression on generated clients. Replace, one by one:

* `data.py`, `generator.py`: the data set's own format, and data made without one;
* `pipeline.py`: what comes before the model on a device (numpy only) and what users read after it;
* `model.py`, `loss.py`: the torch half; `metrics.py`: with scikit-learn's names, the first one decides;
* `config.py`, `presets/default.toml`: `[model]` and `[data]`; `samples.py`: samples that devices collect one by one.

After each change: `pytest tests/conformance -k {name}` in a checkout of fieldfleet, with this package installed.
"""
