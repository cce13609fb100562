"""An own model, own data and an own algorithm, federated on this machine.  python examples/own_model.py [--rounds N]"""

import argparse

import numpy as np
from torch import nn

from fieldfleet import Federation
from fl_core.algorithms.base import Algorithm, ClientUpdate, MeanAggregator


def site(number: int) -> tuple[np.ndarray, np.ndarray]:
    """One client's data: (N, 8) sensor values and their class; every site has its own offset and its own size."""
    rng = np.random.default_rng(number)
    x = rng.normal(rng.normal(0, 0.5, 8), 1.0, (40 + 10 * (number % 5), 8)).astype(np.float32)
    return x, (x[:, :3] + 0.3 * x[:, 3:6] ** 2).argmax(axis=1)


class ServerMomentum(MeanAggregator):
    """FedAvgM (Hsu et al., 2019): the server steps along a running mean of the clients' average change."""

    def step(self, reference, mean):
        stepped = {}
        for name, before in reference.items():
            velocity = 0.5 * self.memory.get(name, np.zeros_like(mean[name])) + (before - mean[name])
            self.memory[name] = velocity
            stepped[name] = before - velocity
        return stepped


def main(rounds: int) -> dict[str, float]:
    # An own model over own data takes ten lines: from here ...
    clients = {f"site-{i:02}": site(i) for i in range(20)}
    federation = Federation(
        lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)), clients, loss="cross_entropy"
    )
    settings = {"optimizer.lr": 0.1, "algorithm.local_epochs": 2, "algorithm.clients_per_round": 10}
    plain = federation.run(rounds, settings=settings)
    print("FedAvg", plain.metrics)
    # ... to here. Algorithms by name, or one of your own:
    proximal = federation.run(rounds, settings=settings, algorithm="fedprox")
    print("FedProx", proximal.metrics)
    own = federation.run(rounds, settings=settings, algorithm=Algorithm(ServerMomentum(), ClientUpdate()))
    print("own", own.metrics)
    return {"fedavg": plain.metrics["accuracy"], "own": own.metrics["accuracy"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    main(parser.parse_args().rounds)
