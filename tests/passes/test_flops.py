"""What ops cost that PyTorch's counter knows nothing of, in the torch that runs or in an older one."""

from __future__ import annotations

import pytest
import torch
from smoothcache_fx.passes import count_flops
from torch._higher_order_ops.flex_attention import flex_attention
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 16, 24, 8


def graph_of(target, *arguments: torch.Tensor | int, out: torch.Tensor) -> Graph:
    graph = Graph()
    nodes = []
    for number, value in enumerate(arguments):
        if isinstance(value, torch.Tensor):
            node = graph.placeholder(f"x{number}")
            node.meta["val"] = value
            nodes.append(node)
        else:
            nodes.append(value)
    node = graph.call_function(target, tuple(nodes))
    node.meta["val"] = out
    graph.output((node,))
    return graph


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("registered", [True, False])
def test_flex_attention(registered, device, monkeypatch):
    """Without a formula, as in torch 2.11, and with the one of later versions."""
    if not registered:
        monkeypatch.delitem(flop_registry, flex_attention, raising=False)
    with FakeTensorMode():
        query = torch.empty(BATCH, HEADS, QUERIES, WIDTH, device=device)
        key, value = (torch.empty(BATCH, HEADS, KEYS, WIDTH, device=device) for _ in range(2))
        graph = graph_of(
            flex_attention,
            query,
            key,
            value,
            out=(torch.empty_like(query), torch.empty(BATCH, HEADS, QUERIES, device=device)),
        )
    assert count_flops(graph) == 2 * 2 * BATCH * HEADS * QUERIES * KEYS * WIDTH


ROWS, INNER, COLUMNS = 6, 32, 64
EIGHT = torch.int8
PRODUCTS = {
    "linear": ((ROWS, INNER), (COLUMNS, INNER), torch.float32),
    "_int_mm": ((ROWS, INNER), (INNER, COLUMNS), EIGHT),
    "_weight_int8pack_mm": ((ROWS, INNER), (COLUMNS, INNER), EIGHT),
    "_weight_int4pack_mm": ((ROWS, INNER), (COLUMNS // 8, INNER // 32, 32, 4), torch.int32),
    "_grouped_mm": ((ROWS, INNER), (2, INNER, COLUMNS), torch.bfloat16),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    left, right, dtype = PRODUCTS[name]
    with FakeTensorMode():
        graph = graph_of(
            getattr(aten, name).default,
            torch.empty(left, dtype=dtype, device="cuda"),
            torch.empty(right, dtype=dtype, device="cuda"),
            out=torch.empty(ROWS, COLUMNS, device="cuda"),
        )
    assert count_flops(graph) == 2 * ROWS * INNER * COLUMNS


@pytest.mark.parametrize(
    "name",
    [
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    ],
)
def test_no_fused_attention_counts_nothing(name):
    with FakeTensorMode():
        query = torch.empty(BATCH, HEADS, QUERIES, WIDTH, device="cuda")
        key, value = (torch.empty(BATCH, HEADS, KEYS, WIDTH, device="cuda") for _ in range(2))
        graph = graph_of(getattr(aten, name).default, query, key, value, out=(query, query))
    assert count_flops(graph) == 2 * 2 * BATCH * HEADS * QUERIES * KEYS * WIDTH


@pytest.mark.parametrize("name", ["_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"])
def test_keys_with_fewer_heads(name):
    """Every head of the queries meets one of the keys'."""
    with FakeTensorMode():
        query = torch.empty(BATCH, 2 * HEADS, QUERIES, WIDTH)
        key, value = (torch.empty(BATCH, HEADS, KEYS, WIDTH) for _ in range(2))
        graph = graph_of(getattr(aten, name).default, query, key, value, out=(query, query))
    assert count_flops(graph) == 2 * 2 * BATCH * 2 * HEADS * QUERIES * KEYS * WIDTH
