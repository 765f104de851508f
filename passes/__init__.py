"""Graph passes: a graph or facts about it come out; nothing is run and nothing global is changed."""

from .cuts import container_of, work_outside
from .flops import count_flops
from .fuse import fuse
from .fuse_norms import fuse_norms
from .group import group_linears
from .guard import guard, insert_guards, run_guarded
from .lowering import Lowering, lowering_for
from .merge_equal import merge_equal
from .narrow import narrow
from .observe import observe
from .replace_writes import replace_writes
from .simplify import simplify
from .sites import Rejection, Site, find_sites, find_sites_and_rejections
from .specialize import specialize
from .store_products import store_products
from .traffic import count_bytes
from .verify import GraphError, check_graph

__all__ = [
    "GraphError",
    "Lowering",
    "Rejection",
    "Site",
    "check_graph",
    "container_of",
    "count_bytes",
    "count_flops",
    "find_sites",
    "find_sites_and_rejections",
    "fuse",
    "fuse_norms",
    "group_linears",
    "guard",
    "insert_guards",
    "lowering_for",
    "merge_equal",
    "narrow",
    "observe",
    "replace_writes",
    "run_guarded",
    "simplify",
    "specialize",
    "store_products",
    "work_outside",
]
