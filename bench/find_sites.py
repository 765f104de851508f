"""How long it takes to find the sites: ``python bench/find_sites.py``.

SD3-like transformers (two streams, joint attention) of 15, 30 and 60 layers, captured whole. The time of
``find_sites`` alone, beside the number of nodes: it must grow about linearly, and stay under two seconds at 60 layers.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import summary, write_result
from diffusers import SD3Transformer2DModel

from smoothcache_fx import Schedule
from smoothcache_fx.capture import _torch
from smoothcache_fx.capture.inner import inner_compiler
from smoothcache_fx.capture.session import Session
from smoothcache_fx.passes.sites import find_sites
from smoothcache_fx.runtime.calls import ModelCall
from smoothcache_fx.runtime.clock import Clock


def captured_graph(layers: int) -> torch.fx.Graph:
    """The ATen graph of a narrow model of so many layers; the width does not change the number of nodes."""
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    ).eval()
    session = Session(Schedule(steps=1), inner_compiler("eager", None, None, None), Clock(1), model)
    session.current.call = ModelCall(session.clock.tick())
    with torch.no_grad():
        _torch.dynamo_compile(model.forward, session)(
            torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16), torch.randn(1, 16), torch.tensor([500])
        )
    (program,) = session.programs
    return program.builder.captured.graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[15, 30, 60])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write bench/results/find_sites.json")
    arguments = parser.parse_args()
    rows = []
    for layers in arguments.layers:
        torch._dynamo.reset()
        graph = captured_graph(layers)
        seconds = []
        for _ in range(arguments.rounds):
            start = time.perf_counter()
            sites = find_sites(graph)
            seconds.append(time.perf_counter() - start)
        row = {"layers": layers, "nodes": len(graph.nodes), "sites": len(sites), "seconds": summary(seconds)}
        rows.append(row)
        median = row["seconds"]["median"]
        print(
            f"{layers:3d} layers, {row['nodes']:6d} nodes, {row['sites']:4d} sites: {median:.3f} s, "
            f"{1e6 * median / row['nodes']:.0f} us a node"
        )
    if arguments.write:
        print(f"written to {write_result('find_sites', {'rows': rows})}")


if __name__ == "__main__":
    main()
