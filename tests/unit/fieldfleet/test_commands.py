"""The command as its users run it: exit codes, one JSON document, one-screen errors, no half-done work."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fieldfleet import __main__ as command
from fl_core.contracts.cli import output_folder
from fl_core.contracts.errors import InputError
from fl_core.learning.application import application
from tests.helpers import APPLICATIONS, NORMS, fieldfleet, small_config, small_overrides

SMALL = [part for o in small_overrides(application("toy_regression")) for part in ("--set", o)]


def commands() -> list[str]:
    text = command.build_parser().format_help()
    return re.findall(r"^    ([a-z]+)  ", text, re.MULTILINE)


def called(*arguments: str | Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command in this process: for what need not pay for a new interpreter."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = command.main([str(a) for a in arguments])
        except SystemExit as left:  # argparse
            code = int(left.code or 0)  # type: ignore[arg-type]
    return code, out.getvalue(), error.getvalue()


def refused(*arguments: str | Path) -> str:
    code, out, error = called(*arguments)
    assert (code, out) == (2, ""), error
    assert "Traceback" not in error
    assert error.startswith(("fieldfleet: ", "usage: "))
    assert len(error.splitlines()) < 24
    return error


@pytest.fixture(scope="module", autouse=True)
def no_data_folder() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FIELDFLEET_DATA", raising=False)
        yield


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of two rounds of toy_regression."""
    out = tmp_path_factory.mktemp("run") / "out"
    done = fieldfleet("simulate", "toy_regression", *SMALL, "--rounds", "2", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)  # exactly one document
    assert document["rounds"] == len(document["history"]) == 2
    assert "simulate toy_regression 2/2" in done.stderr
    return out


def test_every_command_has_help() -> None:
    waiting, seen = [[name] for name in commands()], set()
    while waiting:
        words = waiting.pop()
        seen.add(" ".join(words))
        code, out, error = called(*words, "--help")
        assert (code, error) == (0, ""), words
        assert f"usage: fieldfleet {' '.join(words)} " in out
        if out.partition("\n")[0].endswith(" ..."):  # a family of commands
            before = re.findall(r" ([A-Z]+)(?= )", out.partition("\n")[0])[:-1]  # arguments that come before the action
            waiting += [
                [*words, *before, action] for action in re.findall(r"^    ([a-z][a-z-]*)(?:  |$)", out, re.MULTILINE)
            ]
        else:
            assert "--json" in out, words
    assert {"apps", "pretrain", "simulate", "evaluate"} <= seen
    code, out, _ = called("--help")
    assert "130 interrupted" in " ".join(out.split())


def test_unknown_application_is_refused_with_the_list(tmp_path: Path) -> None:
    done = fieldfleet("simulate", "toy", "--rounds", "1", "--out", "o", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    errors = [done.stderr, refused("pretrain", "toy", "--out", tmp_path / "o"), refused("apps", "toy")]
    for error in errors:
        assert "unknown application 'toy'" in error
        assert all(name in error for name in APPLICATIONS)
        assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "modle.hidden=3"], ["modle", "did you mean model?", "accepted: model, data"]),
        (["--set", "model.hiden=3"], ["model.hiden", "hidden, norm"]),
        (["--set", "model.norm=layer"], ["model.norm", "batch, group, ghost, none"]),
        (["--set", "optimizer.lr=-1"], ["optimizer.lr = -1", "0.0 to 1000"]),
        (["--set", "hidden"], ["--set section.key=value"]),
        (["--set", "optimizer.name=adamm"], ["unknown optimizer.name 'adamm'", "adamw"]),
        (["--set", "algorithm.name=fedsgd"], ["unknown algorithm.name 'fedsgd'", "fedavg"]),
        (["--preset", "nope"], ["unknown preset of toy_regression 'nope'", "default"]),
        (["--data", "no/such/folder"], ["--data no/such/folder: no such folder"]),
        (["--from", "no/such/model"], ["no/such/model: not a checkpoint", "manifest.json"]),
        (["--rounds", "0"], ["--rounds 0"]),
        (["--rounds", "many"], ["invalid int value: 'many'"]),
        (["--nonsense"], ["unrecognized arguments: --nonsense"]),
    ],
)
def test_wrong_input_is_refused_before_any_work(options: list[str], words: list[str], tmp_path: Path) -> None:
    error = refused("simulate", "toy_regression", "--rounds", "1", "--out", tmp_path / "out", *options)
    assert [w for w in words if w not in error] == []
    assert list(tmp_path.iterdir()) == []


def test_pretrain_refuses_before_any_work(tmp_path: Path) -> None:
    base = ("pretrain", "toy_regression", "--out", tmp_path / "out")
    assert "--procs 0" in refused(*base, "--procs", "0")
    error = refused(*base, "--set", "model.norm=batch", "--set", "model.hidden=4", "--set", "pretrain.micro_batch=8")
    assert "micro-batches" in error
    assert "remedy: set model.norm=ghost or model.norm=group" in error
    error = refused(*base, "--procs", "2", "--set", "pretrain.parallel=fsdp", "--set", "optimizer.name=kfac")
    assert "needs whole parameters" in error
    assert "remedy: set pretrain.parallel=ddp" in error
    assert "optimizer.name" in refused(*base, "--procs", "2", "--set", "optimizer.name=x")
    assert "optimizer.name" in refused(*base, "--set", "optimizer.name=x")
    assert list(tmp_path.iterdir()) == []


def test_output_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    assert "is not empty" in refused("pretrain", "toy_regression", "--out", tmp_path / "full")
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused("simulate", "toy_regression", "--rounds", "1", "--out", tmp_path / "file")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_what_a_run_killed_in_its_first_round_leaves_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").touch()
    (tmp_path / ".round-00001.ab12.tmp").mkdir()
    assert output_folder(tmp_path) == tmp_path
    (tmp_path / "round-00001").mkdir()
    with pytest.raises(InputError, match="not empty"):
        output_folder(tmp_path)


def test_apps_lists_and_shows() -> None:
    code, out, _ = called("apps", "--json")
    assert code == 0
    assert [a["name"] for a in json.loads(out)["applications"]] == APPLICATIONS
    for name in APPLICATIONS:
        code, out, _ = called("apps", name, "--json")
        document = json.loads(out)
        assert (code, document["name"]) == (0, name)
        assert document["config"]["model"]["norm"] in NORMS
        assert called("apps", name)[1].startswith("# ")


def test_simulate_resumes_and_refuses_another_run(simulated: Path) -> None:
    base = ("simulate", "toy_regression", *SMALL, "--out", simulated, "--json")
    code, out, _ = called(*base, "--rounds", "2")
    assert (code, json.loads(out)["rounds"]) == (0, 2)
    assert "another configuration, seed" in refused(*base, "--rounds", "2", "--seed", "1")


def test_evaluate_prints_metrics_groups_and_predictions(simulated: Path, tmp_path: Path) -> None:
    app, config = small_config("toy_regression")
    app.generate(config, 0).write(tmp_path / "data")
    done = fieldfleet("evaluate", simulated, "--data", tmp_path / "data", "--json", "--predictions", tmp_path / "p.csv")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["application"], document["kind"]) == ("toy_regression", "checkpoint")
    assert (document["num_examples"], document["num_clients"]) == (24, 4)
    assert set(document["metrics"]) == {"mean_squared_error", "r2"}
    groups = document["groups"]
    assert {n: g["num_examples"] for n, g in groups.items()} == {"seen_clients": 18, "unseen_clients": 6}
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["example_id", "client", "label", "prediction"]
    assert len({r["example_id"] for r in rows}) == len(rows) == 24
    truth, guess = (np.array([float(r[k]) for r in rows]) for k in ("label", "prediction"))
    assert float(np.mean((truth - guess) ** 2)) == pytest.approx(document["metrics"]["mean_squared_error"], rel=1e-6)


def test_evaluate_writes_a_page_with_scores_and_the_pictures_of_the_application(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which examples the pictures are of is the application's business: it is handed all of them with their outputs."""
    handed = []

    def pictures(config: Any, outputs: Any, examples: Any) -> list[tuple[bytes, str]]:
        handed.append((len(examples), {k: len(v) for k, v in outputs.items()}))
        return [(b"PNG", "the <first> picture")]

    app = application("toy_regression")
    monkeypatch.setattr("fieldfleet.evaluate.application", lambda name: replace(app, pictures=pictures))
    code, _, error = called(
        "evaluate", simulated, "--data", "generated", *SMALL, "--report", tmp_path / "page.html", "--json"
    )
    assert code == 0, error
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert handed == [(24, {"value": 24})]
    assert all(word in page for word in ("unseen_clients", "r2", "the &lt;first&gt; picture", "base64,UE5H"))


def test_evaluate_prints_a_table_without_json(simulated: Path) -> None:
    code, out, _ = called("evaluate", simulated, "--data", "generated", *SMALL)
    assert code == 0
    assert "toy_regression" in out
    assert "r2" in out


@pytest.mark.parametrize("name", APPLICATIONS)
def test_evaluate_serves_every_application(name: str, tmp_path: Path) -> None:
    app, config = small_config(name)
    small = [part for o in small_overrides(app) for part in ("--set", o)]
    run = ("simulate", name, "--data", "generated", *small, "--rounds", "1", "--out", tmp_path / "run")
    code, _, error = called(*run, "--json")
    assert code == 0, error
    code, out, error = called(
        "evaluate", tmp_path / "run", "--data", "generated", *small, "--json", "--predictions", tmp_path / "p.csv"
    )
    assert code == 0, error
    document = json.loads(out)
    assert app.primary_metric in document["metrics"]
    header = (tmp_path / "p.csv").read_text().partition("\n")[0].split(",")
    one_label = app.generate(config, 0).examples(config).targets.ndim == 1
    expected = ["example_id", "client", *(["label"] if one_label else [])]
    assert header[: len(expected)] == expected
    assert header[len(expected)] in ("score", "prediction")


def test_a_flipped_byte_is_found_without_a_traceback(simulated: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("manifest.json", "model.safetensors"):
        (model / name).write_bytes((simulated / "final" / name).read_bytes())
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-3] ^= 0x10
    (model / "model.safetensors").write_bytes(data)
    done = fieldfleet("evaluate", model, "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert re.search(r"model\.safetensors: its sha256 is not the one in manifest\.json\n  remedy: ", done.stderr)
    run = ("simulate", "toy_regression", "--from", model, "--rounds", "1", "--out", tmp_path / "out")
    assert "model.safetensors: its sha256" in refused(*run)
    assert not (tmp_path / "out").exists()


def test_evaluate_refuses_what_is_no_model_or_another_application(simulated: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent", tmp_path / "file", tmp_path / "empty"):
        assert "not a checkpoint" in refused("evaluate", path)
    other = next(n for n in APPLICATIONS if n != "toy_regression")
    assert f"is a model of toy_regression, not of {other}" in refused("evaluate", simulated, "--app", other)
    assert "unknown application" in refused("evaluate", simulated, "--app", "x")


def test_evaluate_names_what_is_wrong_in_the_data(simulated: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("client,x0\na,1\n")
    assert "rows.csv: column 'target' is missing" in refused("evaluate", simulated, "--data", tmp_path)
    (tmp_path / "rows.csv").write_text("client,target,x0\na,1,2\n")
    assert "--set data.features=1" in refused("evaluate", simulated, "--data", tmp_path)


def test_evaluate_copes_with_values_that_overflow(simulated: Path, tmp_path: Path) -> None:
    """A finite target of 3e38 squares to infinity: the metric is left out, and the document stays JSON."""
    header = ",".join(["client", "target", *(f"x{i}" for i in range(8))])
    rows = "\n".join(f"a,{t}," + ",".join("3e38" for _ in range(8)) for t in ("3e38", "-3e38"))
    (tmp_path / "rows.csv").write_text(f"{header}\n{rows}\n")
    code, out, error = called("evaluate", simulated, "--data", tmp_path, "--json")
    assert code == 0, error
    assert all(np.isfinite(v) for v in json.loads(out)["metrics"].values())


def test_no_command_at_all_shows_the_usage() -> None:
    assert "COMMAND" in refused()
    assert "invalid choice: 'nonsense'" in refused("nonsense")


def test_interruption_ends_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("simulations.simulate.simulate", interrupted)
    code, out, error = called("simulate", "toy_regression", *SMALL, "--rounds", "1", "--out", tmp_path / "o")
    assert (code, out, error.strip().splitlines()[-1]) == (130, "", "interrupted")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*args: Any, **options: Any) -> None:
        raise ModuleNotFoundError("No module named 'flwr'", name="flwr.app")

    monkeypatch.setattr("simulations.simulate.simulate", missing)
    code, _, error = called("simulate", "toy_regression", *SMALL, "--rounds", "1", "--out", tmp_path / "o")
    assert code == 3
    assert "pip install 'fieldfleet[server]'" in error
