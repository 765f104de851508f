"""Graph passes: a graph or facts about it come out; nothing is run and nothing global is changed."""

from .cuts import container_of, work_outside
from .flops import count_flops
from .fuse import fuse, should_fuse
from .fuse_norms import fuse_norms
from .guard import guard, insert_guards, run_guarded
from .narrow import narrow
from .observe import observe
from .sites import Rejection, Site, analyze, find_sites
from .specialize import specialize
from .traffic import count_bytes
from .verify import GraphError, check_graph

__all__ = [
    "GraphError",
    "Rejection",
    "Site",
    "analyze",
    "check_graph",
    "container_of",
    "count_bytes",
    "count_flops",
    "find_sites",
    "fuse",
    "fuse_norms",
    "guard",
    "insert_guards",
    "narrow",
    "observe",
    "run_guarded",
    "should_fuse",
    "specialize",
    "work_outside",
]
