"""Model, data and training, as in Flower's own PyTorch template: shuffled loaders, nothing seeded."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def load_data(partition: int, count: int) -> DataLoader:
    generator = torch.Generator().manual_seed(partition * 1000 + count)
    x = torch.randn(32, 64, generator=generator)
    y = (x[:, :4].argmax(1) + partition) % 4
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)


def train(net: Net, loader: DataLoader, epochs: int, lr: float) -> float:
    optimizer, total = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9), 0.0
    net.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(loader))


def test(net: Net, loader: DataLoader) -> tuple[float, float]:
    net.eval()
    loss, right, count = 0.0, 0, 0
    with torch.no_grad():
        for x, y in loader:
            out = net(x)
            loss += nn.functional.cross_entropy(out, y, reduction="sum").item()
            right += int((out.argmax(1) == y).sum())
            count += len(y)
    return loss / count, right / count
