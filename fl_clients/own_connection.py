"""The Transport over MQTT for commands that run while no agent does: it brings its own connection to the broker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from fl_clients.broker_connection import OPEN_S, BrokerConnection
from fl_clients.connection import Response, Unreachable
from fl_clients.edge.broker_account import as_welcome, read_account
from fl_clients.edge.welcome import stored_welcome
from fl_clients.tunnel import TunnelClient
from fl_core.identity.keys import PrivateKey
from fl_core.link import topics
from fl_core.link.session import BrokerAddress, MqttSession

if TYPE_CHECKING:
    from fl_clients.edge.home import AgentHome
    from fl_clients.edge.settings import AgentSettings


class OwnBrokerConnection(BrokerConnection):
    """Connects at the first request, as the device's account or its last welcome says; close() disconnects."""

    def __init__(self, home: AgentHome, settings: AgentSettings, key: PrivateKey) -> None:
        super().__init__(TunnelClient(key, home.ca_file), key)
        self._home, self._settings, self._key = home, settings, key
        self._session: MqttSession | None = None

    @contextlib.contextmanager
    def stream(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] = b"",
        *,
        timeout: float = 30.0,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[Response]:
        self._connect(min(timeout, OPEN_S))
        with super().stream(method, path, body, timeout=timeout, headers=headers) as response:
            yield response

    def close(self) -> None:
        self._tunnel.close()
        if self._session is not None:
            self._session.stop()
            self._session = None
        self._tunnel = TunnelClient(self._key, self._home.ca_file)

    def _connect(self, timeout: float) -> None:
        if self._session is None:
            account = read_account(self._home.account_file)
            known = as_welcome(account) if account is not None else stored_welcome(self._home)
            if known is None or known.mqtt is None:
                raise Unreachable("no broker is known to this device yet: 'fieldfleet agent account HOME FILE'")
            mqtt = known.mqtt
            address = BrokerAddress(
                host=mqtt["host"],
                port=mqtt["port"],
                username=mqtt["username"],
                password=mqtt["password"],
                client_id=mqtt["username"],
                ca=self._home.ca_file if mqtt["tls"] else None,
                protocol=self._settings.mqtt.protocol,
            )
            self._session = MqttSession(
                address,
                subscriptions=[topics.topic(known.fleet, known.name, topics.DOWN)],
                tap=self._tunnel.tap,
                changed=self._tunnel.poke,
            )
            self._tunnel.attach(self._session, known.fleet, known.name)
            self._session.start()
        if not self._session.wait_connected(timeout):
            raise Unreachable(f"{self.url}: {self._session.failure or 'no answer'}")
