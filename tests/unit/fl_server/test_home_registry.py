"""A server's home and its registry of devices."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fl_core.contracts.errors import ConfigError, EnvironmentFault, InputError
from fl_core.identity import ca, keys
from fl_server.home import ListenSettings, MqttSettings, ServerHome, ServerSettings, create_home, to_toml
from fl_server.registry import Registry
from tests.federation import new_home

PEMS = [keys.public_pem(ec.generate_private_key(ec.SECP384R1())) for _ in range(2)]


def test_a_home_is_made_whole_and_private(tmp_path: Path) -> None:
    listen = ListenSettings(host="0.0.0.0", port=1234, names=("field.example", "192.0.2.7"))
    settings = ServerSettings(fleet="vans", listen=listen, mqtt=MqttSettings(mode="external", host="broker.example"))
    home = create_home(tmp_path / "home", settings)
    assert ServerHome(tmp_path / "home").settings == settings
    assert home.check().hosts >= ("localhost",)
    assert {"field.example", "192.0.2.7", "127.0.0.1", "localhost"} <= set(home.check().hosts)
    assert "0.0.0.0" not in home.check().hosts
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700
    for secret in ("ca/ca.key", "tls/server.key", "registry.db"):
        assert (home.path / secret).stat().st_mode & 0o077 == 0, secret
    assert home.repository.is_dir()


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        create_home(tmp_path, ServerSettings())
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]


def test_a_failure_leaves_no_half_home(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="host name"):
        create_home(tmp_path / "home", ServerSettings(listen=ListenSettings(names=("bücher.example",))))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_home_and_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="server init"):
        ServerHome(tmp_path)
    (tmp_path / "server.toml").write_text("[listen]\nport = 70000\n")
    with pytest.raises(ConfigError, match=r"listen\.port"):
        ServerHome(tmp_path)
    (tmp_path / "server.toml").write_text('[mqtt]\nmode = "external"\n')
    with pytest.raises(ConfigError, match="host"):
        ServerHome(tmp_path)


def test_renew_keeps_the_authority(tmp_path: Path) -> None:
    home = new_home(tmp_path / "home")
    before = home.ca_file.read_bytes()
    ca.issue_server_certificate(home.path / "ca", home.path / "tls", ["localhost"], days=0)
    with pytest.raises(EnvironmentFault, match=f"server renew --home {home.path}"):
        home.check()
    facts = home.renew(["new.example"])
    assert facts.not_after > datetime.datetime.now(datetime.UTC)
    assert "new.example" in home.check().hosts
    assert home.ca_file.read_bytes() == before


def test_one_server_per_home(tmp_path: Path) -> None:
    home = new_home(tmp_path / "home")
    with home.lock(), pytest.raises(EnvironmentFault, match="another server"), home.lock():
        pass
    with home.lock():
        pass


def test_toml_of_settings_reads_back() -> None:
    import tomllib

    table = {"a": 'quote " and \\', "section": {"flag": True, "list": ["x", "y"], "number": 3}}
    assert tomllib.loads(to_toml(table)) == table
    with pytest.raises(InputError):
        to_toml({"a": "line\nbreak"})


def test_registering_again_changes_nothing(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry.db")
    first = registry.register("van-1", PEMS[0])
    assert registry.register("van-1", PEMS[0]) == first
    assert registry.by_key(PEMS[0]) == first
    assert len(first.mqtt_password) >= 32
    assert registry.mqtt_password("van-1") == first.mqtt_password
    registry.close()


def test_names_and_keys_are_unique(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry.db")
    registry.register("van-1", PEMS[0])
    with pytest.raises(InputError, match="another key"):
        registry.register("van-1", PEMS[1])
    with pytest.raises(InputError, match="van-1"):
        registry.register("van-2", PEMS[0])
    with pytest.raises(InputError, match="not usable"):
        registry.register("_server", PEMS[1])
    assert [d.name for d in registry.devices()] == ["van-1"]
    registry.close()


def test_revoked_devices_stay_listed_and_may_come_back(tmp_path: Path) -> None:
    registry, other = Registry(tmp_path / "registry.db"), Registry(tmp_path / "registry.db")
    registry.register("van-1", PEMS[0])
    assert other.revoke("van-1").revoked, "another process sees and changes the same registry"
    assert registry.by_key(PEMS[0]) == other.devices()[0]
    assert registry.mqtt_password("van-1") is None
    assert not registry.register("van-1", PEMS[0]).revoked
    with pytest.raises(InputError, match="known: van-1"):
        registry.revoke("van-9")
    registry.close()
    other.close()
