"""One rank of several under torchrun: gradients summed over gloo; the last rank ends early."""

import os
import time

import pipeline

with pipeline.phase("import"):
    import torch
    import torch.distributed as dist

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
for step in range(5):
    with pipeline.phase("forward"):
        gradient = torch.full((1000,), float(rank))
        time.sleep(0.01)
    with pipeline.phase("comm_wait"):
        dist.all_reduce(gradient)
    assert gradient[0].item() == sum(range(world)), step
    pipeline.count(tokens=100 + rank, steps=1)
dist.barrier()
dist.destroy_process_group()
if rank != world - 1:
    with pipeline.phase("eval"):
        time.sleep(float(os.environ.get("LONGER_S", "0.3")))
