"""Run by test_cluster: a federation on a Ray cluster of two nodes, some of its workers killed; prints one JSON line."""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
from fl_core.contracts.offswitches import set_off_switches  # noqa: E402

set_off_switches()
from fl_core.contracts.errors import EnvironmentFault  # noqa: E402
from simulations.cluster import ray_workers  # noqa: E402
from simulations.simulate import simulate, start_workers  # noqa: E402
from tests.helpers import small_config  # noqa: E402

OWN_HANDLE = 987


def main(folder: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    killed = []
    broadcast = ray_workers.RayWorkers.broadcast

    def killing(self: ray_workers.RayWorkers, job: object) -> None:
        if len(killed) < 2:
            pid = self.pids()[len(killed)]
            broadcast(self, job)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        else:
            broadcast(self, job)

    app, config = small_config("toy_regression", "data.clients=12", "algorithm.name=fedadam")
    raw = app.generate(config, 0)
    shared = {"start": None, "num_rounds": 3, "seed": 0, "engine": "sequential"}
    plain = simulate(app, config, raw, out=folder / "plain", workers=1, **shared)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    calm = simulate(app, config, raw, out=folder / "calm", cluster=cluster.address, **shared)
    nodes = len([n for n in _nodes(ray, cluster.address) if n["Alive"]])
    ray_workers.RayWorkers.broadcast = killing
    killing_run = simulate(app, config, raw, out=folder / "killed", cluster=cluster.address, **shared)
    with_states, without = states_must_be_shared(folder, raw, cluster.address)
    cluster.shutdown()
    print(
        json.dumps(
            {
                "nodes": nodes,
                "scaffold": [with_states.history[-1].model_sha256, without],
                "killed": len(killed),
                "models": [r.history[-1].model_sha256 for r in (plain, calm, killing_run)],
                "clients": [sum(len(h.clients) for h in r.history) for r in (plain, calm, killing_run)],
                "refused": [sum(len(h.refused) for h in r.history) for r in (plain, calm, killing_run)],
            }
        )
    )


def states_must_be_shared(folder: Path, raw: object, address: str) -> tuple[object, str]:
    """SCAFFOLD where all workers see the states, and the refusal where they do not: a path that only this process has."""
    app, config = small_config("toy_regression", "data.clients=12", "algorithm.name=scaffold")
    shared = {"start": None, "num_rounds": 1, "seed": 0, "engine": "sequential", "cluster": address}
    seen = simulate(app, config, raw, out=folder / "states", **shared)
    (folder / "own").mkdir()
    os.dup2(os.open(folder / "own", os.O_RDONLY), OWN_HANDLE)
    try:
        start_workers(list, 1, 1, address, Path(f"/proc/self/fd/{OWN_HANDLE}"))
    except EnvironmentFault as error:
        return seen, error.message
    return seen, ""


def _nodes(ray: object, address: str) -> list:
    ray.init(address=address, log_to_driver=False)
    found = ray.nodes()
    ray.shutdown()
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
