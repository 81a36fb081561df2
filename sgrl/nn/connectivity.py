"""Random sparse connectivity: which neurons each neuron reads from."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def random_connectivity(
    num_neurons: int, num_sources: int, num_parents: int, generator: torch.Generator | None = None
) -> Int64[Tensor, "W P"]:
    """Draw each neuron's parents uniformly at random, without replacement.

    Args:
        num_neurons: number of neurons W that read.
        num_sources: number of neurons (or pixels) that can be read. In a recurrent network this
            is W too, and a neuron may be its own parent.
        num_parents: parents per neuron, P.
        generator: source of randomness, a CPU generator.

    Returns:
        int64 [W, P], the indices of each neuron's parents.

    Raises:
        ValueError: more parents than sources.

    Source: the paper, Section H.2.
    """
    if num_parents > num_sources:
        raise ValueError(
            f"num_parents is {num_parents}, but there are only {num_sources} neurons to read from"
        )
    priority = torch.rand(num_neurons, num_sources, generator=generator, dtype=torch.float64)
    return priority.argsort(dim=1)[:, :num_parents].contiguous()


def edge_table(parents: Int64[Tensor, "W P"], num_sources: int) -> Int64[Tensor, "S C"]:
    """The edges on which each source is read, for sums in one order (`sum_over_edges`).

    Edge j * P + p is that on which neuron j reads its parent p.

    Returns:
        int64 [num_sources, C], ascending; C is a power of two, and W * P stands for no edge.
    """
    sources = parents.flatten()
    order = sources.argsort(stable=True)
    counts = torch.bincount(sources, minlength=num_sources)
    width = 1 << (int(counts.max()) - 1).bit_length()
    place = torch.arange(len(sources), device=parents.device)
    place -= (counts.cumsum(0) - counts).repeat_interleave(counts)  # in its source's row
    table = torch.full((num_sources, width), len(sources), device=parents.device)
    table[sources[order], place] = order
    return table


def sum_over_edges(
    values: Float[Tensor, "edges ..."], edges: Int64[Tensor, "S C"]
) -> Float[Tensor, "S ..."]:
    """Sum of the values on each source's edges, those of `edge_table`.

    Unlike `index_add_` on a GPU, which adds in whatever order its threads come, it adds in one
    order, and in the same whatever other sources there are.
    """
    padded = torch.cat([values, values.new_zeros(1, *values.shape[1:])])
    total = padded.index_select(0, edges.flatten()).view(*edges.shape, *values.shape[1:])
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0]


def sum_over_children(
    values: Float[Tensor, "edges ..."],
    parents: Int64[Tensor, "W P"],
    num_sources: int,
    edges: Int64[Tensor, "S C"] | None = None,
) -> Float[Tensor, "S ..."]:
    """Sum over the edges on which each source is read.

    Args:
        values: [W * P, ...] by edge, j * P + p for neuron j and its parent p.
        parents: [W, P].
        num_sources: that can be read.
        edges: `edge_table(parents, num_sources)`; None: made here on a GPU, where alone it serves.

    Returns:
        [num_sources, ...].
    """
    if edges is None:
        if not values.is_cuda:
            total = values.new_zeros(num_sources, *values.shape[1:])
            return total.index_add_(0, parents.flatten(), values)
        edges = edge_table(parents, num_sources)
    return sum_over_edges(values, edges)
