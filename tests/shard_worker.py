"""What each of two processes under torchrun does in `tests.core.host.test_shards`; prints one line when all held."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fxquant.core.errors import WorkerError
from fxquant.core.host import Shards

CPU = torch.device("cpu")


def main() -> None:
    """Go through every exchange, then let rank 1 leave while rank 0 waits for it."""
    shards = Shards.from_environment()
    rank = shards.rank
    with shards.group(CPU):
        assert dist.get_backend() == "gloo"
        shards.agree("same", CPU)
        with pytest.raises(WorkerError, match=f"worker {rank} and worker {1 - rank} of 2 were given another model"):
            shards.agree("one" if rank else "two", CPU)
        # Cell 1 lies with both, 3 with the second; the others are dealt out in turn.
        have = [[False, True, False, False, False], [False, True, False, True, False]][rank]
        assert shards.owners(have, CPU) == ([0, 0, 1, 1, 0], [True, False, True, True, True])
        for owner in (0, 1):
            sent = bytes(range(256)) * (owner + 1)
            assert shards.broadcast(owner, sent if owner == rank else None, CPU) == sent
        if rank:
            print("left", flush=True)
            return
        with pytest.raises(WorkerError, match=r"worker 0 of 2 lost the others while exchanging .* scores are kept"):
            shards.broadcast(1, None, CPU)
        print("noticed", flush=True)
    assert not dist.is_initialized()


if __name__ == "__main__":
    main()
