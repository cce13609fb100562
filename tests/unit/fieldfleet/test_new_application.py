"""``fieldfleet apps new``: what it writes is a whole application, here and as an installed package."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from fieldfleet.new_application import new_application
from fl_core.contracts.errors import InputError
from tests.helpers import ROOT, fieldfleet, run_python


def installed(project: Path, folder: Path) -> dict[str, str]:
    """The environment in which the project is installed: its metadata as pip writes them, its code where it is."""
    table = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    metadata = folder / f"{table['name']}-{table['version']}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {table['name']}\nVersion: {table['version']}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items())
        for group, entries in table["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(groups))
    return {"PYTHONPATH": f"{folder}:{project}", "OMP_NUM_THREADS": "1"}


def test_a_new_package_passes_the_conformance_suite_and_every_command_knows_it(tmp_path: Path) -> None:
    made = fieldfleet("apps", "new", "soil_moisture", "--dir", tmp_path, "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["folder"] == str(tmp_path / "soil_moisture")
    environment = installed(tmp_path / "soil_moisture", tmp_path / "site")
    suite = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/conformance/test_applications.py",
        "-k",
        "soil_moisture",
    ]
    done = run_python(suite, environment=environment, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
    shown = fieldfleet("apps", "soil_moisture", environment=environment)
    assert shown.stdout.startswith("# soil_moisture\n")
    assert "Presets: default" in shown.stdout


def test_an_installed_package_that_is_hidden_is_told(tmp_path: Path) -> None:
    new_application("soil_moisture", tmp_path)
    environment = installed(tmp_path / "soil_moisture", tmp_path / "site")
    (tmp_path / "soil_moisture" / "soil_moisture" / "__init__.py").unlink()
    shown = fieldfleet("apps", "soil_moisture", environment=environment)
    assert shown.returncode == 2
    assert "does not offer soil_moisture:APPLICATION" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_nothing_of_the_template_is_left(tmp_path: Path) -> None:
    folder = new_application("river_gauge", tmp_path)
    texts = {p.relative_to(folder): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert not [
        p for p, text in texts.items() if "toy" in text.lower().replace("toy truth", "").replace("toy client", "")
    ]
    assert {Path("pyproject.toml"), Path("river_gauge/presets/default.toml"), Path("river_gauge/samples.py")} <= set(
        texts
    )
    assert 'title="River gauge"' in texts[Path("river_gauge/__init__.py")]


def test_in_a_checkout_it_is_a_folder_of_applications(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "applications" / "toy_regression").mkdir(parents=True)
    (tmp_path / "applications" / "toy_regression" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    folder = new_application("river_gauge", None)
    assert folder == Path("applications/river_gauge")
    assert "from applications.river_gauge import" in (folder / "__init__.py").read_text()
    assert not (folder / "pyproject.toml").exists()


@pytest.mark.parametrize(
    "name", ["Soil", "soil-moisture", "9lives", "a", "soil__x", "_soil", "soil_", "class", "x" * 60, "../x"]
)
def test_names_that_cannot_be_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be the name of an application"):
        new_application(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_taken_names_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'plant_disease' exists already"):
        new_application("plant_disease", tmp_path)
    for module in ("numpy", "random", "fl_core", "new"):
        with pytest.raises(InputError, match=r"installed Python module|cannot be"):
            new_application(module, tmp_path)
    (tmp_path / "soil_moisture").mkdir()
    with pytest.raises(InputError, match="soil_moisture: exists already") as refused:
        new_application("soil_moisture", tmp_path)
    assert "--dir" in refused.value.remedy
    with pytest.raises(InputError, match="no such folder"):
        new_application("soil_moisture", tmp_path / "missing")
    assert fieldfleet("apps", "new").returncode == 2
    assert fieldfleet("apps", "toy_regression", "other").returncode == 2
