"""The parts of a transformer (FFNs, attention, norms, head), matched in its graph by structure, never by names."""

from trimtab.passes.anatomy.clone import clone_activation
from trimtab.passes.anatomy.find import find_anatomy, require_ffns, select_ffns
from trimtab.passes.anatomy.model import FFN, Activation, Anatomy, Attention, Block, Embedding, Head, Unrecognized
from trimtab.passes.anatomy.shared import also_read_by, by_weights, sharing_partly

__all__ = [
    "FFN",
    "Activation",
    "Anatomy",
    "Attention",
    "Block",
    "Embedding",
    "Head",
    "Unrecognized",
    "also_read_by",
    "by_weights",
    "clone_activation",
    "find_anatomy",
    "require_ffns",
    "select_ffns",
    "sharing_partly",
]
