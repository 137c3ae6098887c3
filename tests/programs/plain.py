"""A plain torch script: a small regression, phases and counts said."""

import torch

import pipeline

with pipeline.phase("prepare"):
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(20):
    with pipeline.phase("forward"):
        loss = (model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()
    with pipeline.phase("backward"):
        optimizer.zero_grad()
        loss.backward()
    with pipeline.phase("optimizer"):
        optimizer.step()
    pipeline.count(tokens=inputs.numel(), examples=len(inputs), steps=1, flops=6 * inputs.numel())
print(f"loss {loss.item():.4f}")
