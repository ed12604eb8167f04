"""What the merge paths of collectives.py cost; no torch, so that analysis can ask as well.

Cost per process in values (P processes, one client each, k live values of a client, U of the union,
n of the layout; Ok-Topk, arXiv 2201.07598, and SparCML, arXiv 1802.08021, for the sparse paths):
allgather (P-1) k, split (P-1)/P (k + U), allreduce 2 (P-1)/P U, dense 2 (P-1)/P n.
"""

from collections.abc import Mapping

PATHS = ("allgather", "split", "allreduce", "dense")
SAME_BITS = ("allgather", "split")  # for any number of processes


def cheapest(moved: Mapping[str, float]) -> str:
    """Of the paths that keep the bits the one that moves the fewest of these `moved_values`."""
    return min(SAME_BITS, key=lambda path: (moved[path], SAME_BITS.index(path)))


def moved_values(
    *,
    num_parts: int,
    world_size: int,
    part_values: float,
    union_values: float,
    layout_values: float,
) -> Mapping[str, float]:
    """The cost model at the top of this file: values that one process receives, by path.

    part_values: of one client on average. Parts are spread evenly over the processes.
    """
    others = (world_size - 1) / world_size
    return {
        "allgather": others * num_parts * part_values,
        "split": others * (num_parts / world_size * part_values + union_values),
        "allreduce": 2 * others * union_values,
        "dense": 2 * others * layout_values,
    }
