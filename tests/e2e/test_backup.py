"""A backup of a running server, and a server that goes on from it."""

from __future__ import annotations

import shutil
import signal
import sqlite3
from pathlib import Path

import pytest

from fl_core.contracts.errors import InputError, IntegrityError
from fl_core.identity import keys
from fl_server import backup
from fl_server.home import ServerHome
from tests.federation import new_home, new_key
from tests.helpers import fieldfleet
from tests.standing import standing, until


@pytest.mark.slow
def test_the_restored_server_goes_on_with_the_run_in_mid_round(tmp_path: Path) -> None:
    with standing(tmp_path) as server, server.devices("van-1", "van-2") as (one, _):
        options = ("--min-devices", "2", "--set", "algorithm.min_clients=2", "--name", "a", "--rounds", "20")
        server.run("runs", "start", "toy_regression", *options)
        until(lambda: server.facts("a")["rounds_done"] >= 1)
        one.switch("hold", True)
        made = server.run("server", "backup", tmp_path / "backup")
        assert made["files"] > 5
        server.end(signal.SIGKILL)
        shutil.rmtree(server.home.path)
        done = fieldfleet("server", "restore", tmp_path / "backup", server.home.path)
        assert done.returncode == 0, done.stderr
        assert server.start()["resumed"] == ["a"]
        one.switch("hold", False)
        facts = server.run("runs", "wait", "a")
        assert (facts["status"], facts["rounds_done"]) == ("finished", 20)
        assert [r["round"] for r in server.run("runs", "show", "a")["history"]] == list(range(1, 21))
        assert server.end() == 0


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    made = new_home(tmp_path / "home")
    registry = made.registry()
    registry.register("van-1", keys.public_pem(new_key(tmp_path / "key")))
    registry.close()
    return made


def test_what_is_committed_is_in_it_and_secrets_stay_private(home: ServerHome, tmp_path: Path) -> None:
    registry = home.registry()  # open, with its log not yet in the file
    registry.revoke("van-1")
    made = backup.create(home, tmp_path / "backup")
    registry.close()
    backup.restore(made.path, tmp_path / "restored")
    restored = ServerHome(tmp_path / "restored")
    registry = restored.registry()
    assert registry.devices()[0].revoked
    registry.close()
    assert restored.ca_file.read_bytes() == home.ca_file.read_bytes()
    for file in ("ca/ca.key", "tls/server.key", "registry.db"):
        assert (restored.path / file).stat().st_mode & 0o077 == 0, file
    assert restored.path.stat().st_mode & 0o777 == 0o700
    assert made.path.stat().st_mode & 0o777 == 0o700


def test_a_changed_backup_is_refused_whole(home: ServerHome, tmp_path: Path) -> None:
    made = backup.create(home, tmp_path / "backup").path

    def refused() -> str:
        with pytest.raises(IntegrityError) as error:
            backup.restore(made, tmp_path / "restored")
        assert not (tmp_path / "restored").exists()
        return str(error.value)

    data = (made / "registry.db").read_bytes()
    (made / "registry.db").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "registry.db was changed" in refused()
    (made / "registry.db").unlink()
    assert "registry.db is missing" in refused()
    (made / "registry.db").write_bytes(data)
    (made / "extra").touch()
    assert "extra does not belong" in refused()
    (made / "extra").unlink()
    (made / "ca" / "link").symlink_to("/etc/passwd")
    assert "outside" in refused()
    (made / "ca" / "link").unlink()
    (made / "backup.json").write_text("{}")
    assert "manifest" in refused()


def test_a_damaged_store_is_not_backed_up(home: ServerHome, tmp_path: Path) -> None:
    file = home.path / "registry.db"
    with sqlite3.connect(file) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    data = bytearray(file.read_bytes())
    data[4096:8192] = b"\xff" * 4096
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match="registry"):
        backup.create(home, tmp_path / "backup")
    assert not (tmp_path / "backup").exists()


def test_where_a_backup_may_not_be(home: ServerHome, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="inside"):
        backup.create(home, home.path / "backup")
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists"):
        backup.create(home, tmp_path / "there")
    with pytest.raises(InputError, match="not a backup"):
        backup.restore(tmp_path / "there", tmp_path / "restored")
    made = backup.create(home, tmp_path / "backup")
    with pytest.raises(InputError, match="not empty"):
        backup.restore(made.path, home.path)
