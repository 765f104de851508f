"""What ops cost that PyTorch's counter knows nothing of, in the torch that runs or in an older one."""

from __future__ import annotations

import pytest
import torch
from torch._higher_order_ops.flex_attention import flex_attention
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.utils.flop_counter import flop_registry

from smoothcache_fx.capture.eager_work import flop_counter
from smoothcache_fx.passes.flops import count_flops
from smoothcache_fx.passes.names import WEIGHT

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


@torch.library.custom_op("flops_test::packed_linear", mutates_args=())
def packed_linear(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Two weights of four bits in a byte, as bitsandbytes packs them."""
    return x.new_ones(*x.shape[:-1], len(scales))


@torch.library.custom_op("flops_test::norm", mutates_args=())
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * weight


@torch.library.custom_op("flops_test::pool", mutates_args=())
def pool(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.mean(dim=0) * weight[0]


for op in (packed_linear, norm, pool):
    op.register_fake(op._init_fn)

PACKED = torch.zeros(INNER * COLUMNS // 2, 1, dtype=torch.uint8)
CUSTOM = {
    "a linear layer": (packed_linear, (PACKED, torch.ones(COLUMNS)), 2 * 2 * ROWS * INNER * COLUMNS),
    "a norm": (norm, (torch.ones(INNER),), 0),
    "other rows": (pool, (torch.ones(4 * INNER, INNER),), 0),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_ops_of_linear_layers(name):
    """In a graph, and in an eager call."""
    op, weights, flops = CUSTOM[name]
    weights = [torch.nn.Parameter(weight, requires_grad=False) for weight in weights]
    x = torch.randn(2, ROWS, INNER)
    graph = graph_of(op._opoverload, x, *weights, out=op(x, *weights))
    assert count_flops(graph) == 0, "nothing says which of them are weights"
    for placeholder in list(graph.find_nodes(op="placeholder"))[1:]:
        placeholder.meta[WEIGHT] = "linear.weight"
    assert count_flops(graph) == flops
    counter = flop_counter()
    with counter:
        op(x, *weights)
    assert counter.get_total_flops() == flops


def test_products_in_an_eager_call():
    counter = flop_counter()
    with counter:
        torch._int_mm(*(torch.ones(shape, dtype=torch.int8) for shape in ((ROWS, INNER), (INNER, COLUMNS))))
    assert counter.get_total_flops() == 2 * ROWS * INNER * COLUMNS


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
