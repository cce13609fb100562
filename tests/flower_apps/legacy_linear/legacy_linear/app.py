"""One module with both halves."""

import numpy as np
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp

KEPT = {}


class Linear(NumPyClient):
    def __init__(self, partition: int) -> None:
        rng = np.random.default_rng(partition)
        self.x = rng.normal(size=(16 * (partition + 1), 2))
        self.y = self.x @ np.array([2.0, -1.0])

    def fit(self, parameters, config):
        (weights,) = parameters
        return [weights - 0.2 * self.x.T @ (self.x @ weights - self.y) / len(self.x)], len(self.x), {}

    def evaluate(self, parameters, config):
        loss = float(np.mean((self.x @ parameters[0] - self.y) ** 2))
        return loss, len(self.x), {"half": loss / 2}


def client_fn(context):
    return Linear(context.node_config["partition-id"]).to_client()


class Kept(FedAvg):
    def aggregate_fit(self, server_round, results, failures):
        found = super().aggregate_fit(server_round, results, failures)
        KEPT["weights"] = parameters_to_ndarrays(found[0])[0]
        return found


def server_fn(context):
    strategy = Kept(initial_parameters=ndarrays_to_parameters([np.zeros(2)]), min_available_clients=4)
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=context.run_config["rounds"]))


client = ClientApp(client_fn)
server = ServerApp(server_fn=server_fn)
