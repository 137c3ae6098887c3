"""A rank whose data loader forks workers that mark phases, too, and that forks by itself."""

import os
import threading
import time

import torch

import pipeline


class Squares(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        with pipeline.phase("prepare"):
            pipeline.count(examples=1000)
            return index**2


def elsewhere() -> None:
    with pipeline.phase("eval"):
        pipeline.count(examples=1)


if __name__ == "__main__":
    with pipeline.phase("data_wait"):
        pipeline.count(examples=8)
        loader = torch.utils.data.DataLoader(
            Squares(), batch_size=4, num_workers=2, multiprocessing_context="fork"
        )
        assert sum(int(batch.sum()) for batch in loader) == 140
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    parent = os.getpid()
    if os.fork() == 0:
        elsewhere()
        while os.getppid() == parent:
            time.sleep(0.01)
        time.sleep(0.5)
        raise SystemExit  # long after its parent, and with its parent's exit handlers
    print(time.monotonic_ns())
