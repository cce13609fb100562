"""Samples from other programs on the device, over a broker of its own: each message becomes a file of the inbox.

TOPIC/labels       {"id": ..., "label": ...}
any other topic    {"id", "time", "label", "arrays": {...}}, or the bytes of a content file (npz, PNG, JPEG) whose id is the
                   last level of the topic

A message is acknowledged (QoS 1) after its file is durable; the same id again replaces a file that still waits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from fl_clients.edge.settings import SampleSettings
from fl_core.link.envelope import ID_PATTERN, new_id
from fl_core.storage import atomic

LOG = logging.getLogger(__name__)
PAYLOAD_LIMIT = 16 << 20
INBOX_LIMIT = 10_000  # files: the intake has stopped, say
MAGIC = {b"PK\x03\x04": ".npz", b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg"}


class TopicSource:
    """start() ... stop(). Reconnects by itself; the broker keeps what comes meanwhile (persistent session)."""

    def __init__(self, settings: SampleSettings, inbox: Path, *, client_id: str, password: str = "") -> None:
        self._inbox, self._topics = inbox, list(settings.mqtt_topics)
        self._address = (settings.mqtt_host, settings.mqtt_port)
        self.refused = 0
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=False,
            manual_ack=True,
            protocol=paho.MQTTv311,
        )
        if settings.mqtt_username:
            self._client.username_pw_set(settings.mqtt_username, password)
        self._client.reconnect_delay_set(1, 60)
        self._client.on_connect = self._connected
        self._client.on_message = self._take
        self.ready = threading.Event()
        self._client.on_subscribe = lambda *_: self.ready.set()

    def start(self) -> None:
        self._client.connect_async(*self._address, keepalive=60)
        self._client.loop_start()

    def stop(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _connected(self, client: paho.Client, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            LOG.warning("samples: the broker at %s:%d refuses: %s", *self._address, reason)
            return
        client.subscribe([(topic, 1) for topic in self._topics])

    def _take(self, client: paho.Client, data: Any, message: paho.MQTTMessage) -> None:
        try:
            payload = bytes(message.payload)
            name = file_name(message.topic, payload)
            if name is None or len(payload) > PAYLOAD_LIMIT:
                self._refuse(message.topic)
            elif sum(1 for _ in self._inbox.iterdir()) >= INBOX_LIMIT:
                LOG.warning("samples: the inbox is full; the broker keeps what comes")
                return  # not acknowledged: it comes again with the next connection
            else:
                atomic.write_bytes(self._inbox / name, payload, mode=0o600)
        except OSError as error:  # a full disk
            LOG.warning("samples: %s", error)
            return
        client.ack(message.mid, message.qos)

    def _refuse(self, topic: str) -> None:
        self.refused += 1
        LOG.warning("samples: a message on %s is neither a sample nor a label (%d so far)", topic[:200], self.refused)


def file_name(topic: str, payload: bytes) -> str | None:
    """Of the inbox; None for what is neither a sample nor a label."""
    last = topic.rpartition("/")[2]
    if payload[:1] == b"{":
        # a sample by its id, so that a repeated message is one file; each label for itself: a later one replaces it
        name = _id_of(payload) or new_id()
        return f"label-{name[:40]}-{time.time_ns()}.json" if last == "labels" else f"{name}.json"
    suffix = next((suffix for magic, suffix in MAGIC.items() if payload.startswith(magic)), None)
    return f"{last}{suffix}" if suffix is not None and ID_PATTERN.fullmatch(last) else None


def _id_of(payload: bytes) -> str | None:
    try:
        found = json.loads(payload).get("id")
    except (ValueError, RecursionError, AttributeError):
        return None
    return found if isinstance(found, str) and ID_PATTERN.fullmatch(found) else None


def open_source(settings: SampleSettings, inboxes: Mapping[str, Path], home: Path) -> TopicSource:
    """Raises OSError for a password file that cannot be read."""
    inbox = inboxes[settings.mqtt_application or next(iter(inboxes))]
    password = ""
    if settings.mqtt_password_file:
        password = (home / Path(settings.mqtt_password_file).expanduser()).read_text(encoding="utf-8").strip()
    name = hashlib.sha256(str(home.resolve()).encode()).hexdigest()[
        :12
    ]  # the same after a restart: the session goes on
    return TopicSource(settings, inbox, client_id=f"fieldfleet-{name}", password=password)
