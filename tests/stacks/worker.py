"""One of two processes: runs every check, and writes what came of each."""

import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

WORLD = 2
TIMEOUT = timedelta(seconds=60)


def run(rank: int, seed: int, folder: Path) -> None:
    import torch
    from torch import distributed

    from tests.stacks.checks import CHECKS

    torch.set_num_threads(1)
    report: dict[str, dict] = {}
    for name, check in CHECKS.items():
        # a group of its own: what one check leaves hanging does not meet the next
        store = distributed.PrefixStore(name, distributed.FileStore(str(folder / "store"), WORLD))
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=TIMEOUT)
        start, held, error = time.monotonic(), [], None
        try:
            for part in check(seed, folder / name.replace(" ", "-")):
                held.append(part)
                distributed.barrier()
        except BaseException:
            error = traceback.format_exc()
        distributed.destroy_process_group()
        torch._dynamo.reset()
        report[name] = {"held": held, "error": error, "seconds": time.monotonic() - start}
    (folder / f"report-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": str(WORLD)}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }  # Accelerate asks for them, and takes the group that is there
    run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
