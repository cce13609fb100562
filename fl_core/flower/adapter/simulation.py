"""Flower's own simulation of a project, on Ray: the peer that our Grid is compared with. Needs the package ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.simulation.run_simulation import _run_simulation
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.telemetry import EventType

RUN, TASK = 1, 1


def simulate_with_ray(
    folder: Path, server: str, client: str, *, num_clients: int, run_config: Mapping[str, Any], cpus: int
) -> Context:
    """What ``flwr run`` does with a simulation, without a SuperLink: one actor a CPU. Returns the ServerApp's context."""
    run = Run.create_empty(RUN)
    run.primary_task_id, run.federation_id = TASK, NOOP_FEDERATION_ID
    run.override_config = dict(run_config)
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN, TASK, SUPERLINK_NODE_ID
    context = Context(
        run_id=RUN, node_id=SUPERLINK_NODE_ID, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )
    result = _run_simulation(
        num_supernodes=num_clients,
        exit_event=EventType.FLWR_SIMULATION_RUN_LEAVE,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": cpus}},
        client_app_attr=client,
        server_app_attr=server,
        server_app_context=context,
        app_dir=str(folder),
        run=run,
        is_app=True,
    )
    return result.context
