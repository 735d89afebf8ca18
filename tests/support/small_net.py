"""Two layers with any operation between them, and their data."""

from __future__ import annotations

import torch
from torch import nn

MSE = nn.MSELoss()


def data(inputs=3, outputs=2, rows=5):
    """Random inputs and targets."""
    return torch.randn(rows, inputs).double(), torch.randn(rows, outputs).double()


class Net(nn.Module):
    """first -> operation -> second."""

    def __init__(self, operation, width=4):
        super().__init__()
        self.first, self.second, self.operation = nn.Linear(3, 4).double(), nn.Linear(width, 2).double(), operation

    def forward(self, x):
        return self.second(self.operation(self.first(x)))
