"""A network of your own on tensors: attach, train, calibrate to a budget, and run it so that finished rows leave."""

import torch
from torch import nn

import offramp


class Spectra(nn.Module):
    """A small convolutional network on one-dimensional signals."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 16, 5, padding=2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv1d(16, 16, 5, padding=2), nn.ReLU()) for _ in range(4))
        self.head = nn.Linear(16, classes)

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        """Logits [batch cls] of signals [batch 1 length]."""
        x = self.stem(signal)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(dim=2))


class MeanHead(nn.Module):
    """Logits from a tap [batch ch length]: mean over the length, then a linear layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, tap: torch.Tensor) -> torch.Tensor:
        """Logits [batch cls]."""
        return self.linear(tap.mean(dim=2))


def signals(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sines of one of three frequencies, in noise: [row 1 64], and which."""
    dice = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (rows,), generator=dice)
    time = torch.linspace(0, 6.28, 64)
    clean = torch.sin(time * (1 + 2 * labels)[:, None] + 6.28 * torch.rand(rows, 1, generator=dice))
    noise = torch.rand(rows, 1, generator=dice) * 1.5 * torch.randn(rows, 64, generator=dice)
    return (clean + noise)[:, None], labels


def main() -> None:
    """Nothing; what came of it is printed."""
    torch.manual_seed(0)
    train, fit, test = signals(600, 0), signals(300, 1), signals(300, 2)
    model = offramp.attach(
        Spectra(3), at=("blocks.0", "blocks.1", "blocks.2"), head=lambda shape, classes: MeanHead(shape[1], classes),
        example=train[0][:2],
    )  # fmt: skip
    offramp.train(model, train, recipe=offramp.Recipe(epochs=6, lr=3e-3), progress=False)
    costs = offramp.measure(model, test[0][:32], batch_sizes=(1, 32), rounds=5)
    trace = offramp.record(model, fit, progress=False)
    found = offramp.calibrate(offramp.BEEM, trace, costs, offramp.Budget(fraction=0.6))
    print("accuracy of each exit:", *(f"{share:.3f}" for share in trace.accuracy()))
    print(found.status, found.message)
    said = offramp.Runtime(model, found.policy)(test[0])
    right = (said.label == test[1]).float().mean()
    print(
        f"on rows never seen: {right:.3f} right; rows that left at each exit: {torch.bincount(said.exit, minlength=4)}"
    )


if __name__ == "__main__":
    main()
