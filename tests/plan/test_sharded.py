"""The planner's bytes of a rank are those that FSDP2 gives it: measured with two processes on gloo."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from whet.config_file import load_config
from whet.plan.pieces import Strategy, pieces_of, rank_static
from whet.plan.shape import meta_model, shaped

WORKER = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from whet.config_file import load_config
from whet.engine.model import decoder_of
from whet.engine.swap import base_of, decoder_layers
from whet.plan.shape import meta_model

rank, port, file = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
config = load_config(json.load(open(file)), [])
model = meta_model(config, torch.float32).to_empty(device="cpu")
base_of(model).tie_weights()
mesh = init_device_mesh("cpu", (2,))
for layer in decoder_layers(decoder_of(base_of(model))):
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-3)
for p in trained:
    p.grad = torch.zeros_like(p)
optimizer.step()
local = lambda t: t.to_local().numel() * t.element_size()
states = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
found = [sum(map(local, model.parameters())), sum(map(local, states))]
if rank == 0:
    print(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_weights_and_moments_of_a_rank_are_those_fully_shard_gives_it(tiny_model, tmp_path):
    for parameters in ("full", "lora"):
        settings = {
            "model": {"name": str(tiny_model), "dtype": "float32"},
            "lora": {"rank": 3},
            "data": {"train": "rows.jsonl"},
            "train": {"parameters": parameters},
        }
        file = tmp_path / "config.json"
        file.write_text(json.dumps(settings))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(rank), port, str(file)],
                stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
            )
            for rank in range(2)
        ]  # fmt: skip
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0]
        measured = json.loads(said[0].splitlines()[-1])
        pieces = pieces_of(shaped(meta_model(load_config(settings, []), torch.float32)))
        static = rank_static(pieces, Strategy("fsdp"), 2, "adamw_torch")
        items = {item.name: item.num_bytes for item in static.items}
        weights = [items.get(name, 0) for name in ("weights", "embeddings and head", "adapters")]
        assert measured == [sum(weights), items["optimizer states"]]
