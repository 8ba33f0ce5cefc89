"""One gloo rank of test_accumulate.py: feeds its share of values to a MetricStore, prints what it flushes.

usage: gloo_rank.py RANK WORLD_SIZE RENDEZVOUS_FILE DATA.json
DATA.json: windows -> ranks -> micro-steps -> [key, sum, count or null]; on odd micro-steps they are tensors.
"""

from __future__ import annotations

import json
import sys
from collections import Counter

import torch
import torch.distributed as dist

from coordexp.metrics.accumulate import MetricStore

rank, world_size, rendezvous, data_path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)

calls: Counter[str] = Counter()


def counted(name):
    function = getattr(dist, name)

    def call(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    return call


for name in ("all_gather", "all_gather_object", "all_reduce", "broadcast", "barrier"):
    setattr(dist, name, counted(name))

store, flushed = MetricStore(), []
with open(data_path) as file:
    windows = json.load(file)
for ranks in windows:
    for index, micro_step in enumerate(ranks[rank]):
        for key, total, count in micro_step:
            if index % 2:
                total = torch.tensor(total, dtype=torch.float64)
                count = None if count is None else torch.tensor(count)
            store.add(key, total, count)
    calls.clear()
    flushed.append({"metrics": store.flush("train"), "collectives": dict(calls)})
print(json.dumps(flushed))
dist.destroy_process_group()
