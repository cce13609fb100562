"""``agent status``: everything that matters on this device, whether the agent runs or not."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from fl_clients.edge.home import AgentHome
from fl_clients.edge.operator import StatusFile, ask
from fl_clients.edge.slots import Slots
from fl_clients.edge.welcome import stored_welcome


def status_document(home: AgentHome) -> dict[str, Any]:
    """``agent``: what the running agent says of itself, or what it said last (``running`` False, with its time)."""
    settings, found = home.settings(), stored_welcome(home)
    live = ask(home, "status")
    models, predictions = {}, {}
    for name in settings.device.names:
        own = home.application(name)
        models[name] = Slots(own.folder).facts()
        predictions[name] = sorted(p.name for p in own.predictions.glob("*.csv"))
    return {
        "home": str(home.folder),
        "running": live is not None,
        "server": settings.server.url,
        "name": found.name if found else None,
        "fleet": found.fleet if found else None,
        "applications": list(settings.device.names),
        "models": models,
        "predictions": predictions,
        "replies_waiting": sum(1 for _ in (home.fleet / "outbox").glob("*.reply")),
        "training_disabled": _disabled(home),
        "agent": live if live is not None else StatusFile(home).read(),
    }


def _disabled(home: AgentHome) -> str:
    """The circuit breaker's word, read without the training half."""
    try:
        table = json.loads((home.fleet / "breaker.json").read_text(encoding="utf-8"))
        crashes, reason = int(table["crashes"]), str(table["reason"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f"{crashes} crashes of the worker in a row: {reason[:300]}" if crashes >= 3 else ""


def in_words(document: dict[str, Any]) -> str:
    agent = document["agent"] or {}
    then = "" if document["running"] else " (when last heard)"
    rows = [
        ("home", document["home"]),
        ("agent", _agent_line(document, agent)),
        ("device", f"{document['name']} in fleet {document['fleet']}" if document["name"] else "not welcomed yet"),
        ("server", f"{agent.get('transport') or document['server']}{_contact(agent.get('contact'))}"),
        ("broker", _broker(agent.get("broker")) + then),
        *(("model", line) for line in _models(document)),
        ("training", _training(document, agent.get("training")) + then),
        ("condition", _pairs(agent.get("device"))),
        *(("samples", f"{name}: {_pairs(counts)}") for name, counts in (agent.get("samples") or {}).items()),
        ("clock", _pairs(agent.get("clock"))),
        ("waiting", f"{document['replies_waiting']} replies to the federation, {_outbox(agent.get('outbox'))}"),
        *(("failure", f"{kind}: {text}") for kind, text in (agent.get("failures") or {}).items()),
    ]
    return "\n".join(f"{name:10} {value}" for name, value in rows)


def _agent_line(document: dict[str, Any], agent: dict[str, Any]) -> str:
    if document["running"]:
        return f"runs as process {agent.get('pid')} since {_duration(agent.get('uptime_s'))}, {agent.get('rss_mb')} MB"
    return f"does not run; last heard {_when(agent.get('time'))}" if agent else "does not run, and never did"


def _contact(contact: Any) -> str:
    if not isinstance(contact, dict):
        return ""
    reason = f": {contact['reason']}" if contact.get("reason") else ""
    return f" ({contact.get('state')} since {_when(contact.get('since'))}{reason}; last answer {_when(contact.get('last'))})"


def _broker(broker: Any) -> str:
    if not isinstance(broker, dict):
        return "-"
    if broker.get("connected"):
        return f"connected to {broker.get('host')}:{broker.get('port')}, MQTT {broker.get('protocol')}"
    return f"not connected: {broker.get('failure') or 'trying'}"


def _models(document: dict[str, Any]) -> Iterator[str]:
    for name, model in document["models"].items():
        count = len(document["predictions"][name])
        version = f"version {model['version']}, {model['target']} {model['precision']}" if model else "no model yet"
        yield f"{name}: {version}, {count} files of predictions"


def _training(document: dict[str, Any], training: Any) -> str:
    if document["training_disabled"]:
        return f"disabled: {document['training_disabled']}"
    return str(training.get("state")) if isinstance(training, dict) else "-"


def _pairs(table: Any) -> str:
    """What is known of a table, on one line."""
    if not isinstance(table, dict):
        return "-"
    known = {key: value for key, value in table.items() if value not in (None, "", [], {})}
    return ", ".join(f"{key} {value}" for key, value in known.items()) or "-"


def _outbox(outbox: Any) -> str:
    return f"{outbox.get('waiting')} messages ({outbox.get('dropped')} dropped)" if isinstance(outbox, dict) else "-"


def _when(seconds: Any) -> str:
    if type(seconds) not in (int, float) or not seconds:
        return "never"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _duration(seconds: Any) -> str:
    if type(seconds) not in (int, float):
        return "-"
    days, rest = divmod(int(seconds), 86_400)
    return f"{days} d {rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
