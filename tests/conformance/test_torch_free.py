"""The torch-free half imports where neither torch nor flwr is installed: an inference-only device has neither."""

from __future__ import annotations

import json

import pytest

from tests.helpers import APPLICATIONS, ROOT, run_python

BLOCKED = ("torch", "flwr")
WHOLE_PACKAGES = (
    *(f"fl_core.{p}" for p in ("contracts", "storage", "identity", "link", "runtime", "delivery", "report")),
    "fl_clients.edge",
)
LEARNING = tuple(f"fl_core.learning.{m}" for m in ("application", "examples", "partition", "seeding", "sources"))
TORCH_HALF = ("model", "loss")

SCRIPT = """
import importlib, json, sys, warnings
blocked = {blocked!r}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)
        return None
sys.meta_path.insert(0, Blocker())
result = {{}}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
        result[name] = ""
    except Exception as error:
        result[name] = f"{{type(error).__name__}}: {{error}}"
try:
    from fieldfleet.__main__ import build_parser
    build_parser()
    result["every command's parser"] = ""
except Exception as error:
    result["every command's parser"] = f"{{type(error).__name__}}: {{error}}"
from fl_core.contracts.installed import known_applications
from fl_core.learning.application import application
for name in known_applications():
    app = application(name)
    config = app.configure()
    app.inputs(config), app.outputs(config), app.labels(config)
result["no trace of them"] = str([m for m in sys.modules if m.partition(".")[0] in blocked] or "")
print(json.dumps(result))
"""


def modules() -> list[str]:
    found = ["fieldfleet.__main__", *LEARNING]
    for package in WHOLE_PACKAGES:
        folder = ROOT.joinpath(*package.split("."))
        found += [package, *(f"{package}.{p.stem}" for p in sorted(folder.glob("*.py")) if p.stem != "__init__")]
    for name in APPLICATIONS:
        folder = ROOT / "applications" / name
        if folder.is_dir():
            torch_free = sorted(p.stem for p in folder.glob("*.py") if p.stem not in (*TORCH_HALF, "__init__"))
            found += [f"applications.{name}", *(f"applications.{name}.{stem}" for stem in torch_free)]
    if (ROOT / "fl_clients" / "commands.py").is_file():
        found.append("fl_clients.commands")
    return found


@pytest.fixture(scope="module")
def imported() -> dict[str, str]:
    done = run_python(["-c", SCRIPT.format(blocked=BLOCKED), json.dumps(modules())])
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("module", [*modules(), "every command's parser", "no trace of them"])
def test_imports_without_torch_and_flwr(module: str, imported: dict[str, str]) -> None:
    assert imported[module] == ""
