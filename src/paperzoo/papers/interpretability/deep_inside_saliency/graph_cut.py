"""Two colour models and a minimum cut: the interactive segmentation of Boykov and Jolly (ICCV 2001) that the paper seeds.

The energy of a labelling x of the pixels, 1 for object:

    E(x) = sum_p cost_p(x_p) + sum_{p,q neighbours} gamma / |p - q| exp(-beta |c_p - c_q|^2) [x_p != x_q]

is least where the smallest cut of a graph runs, whose capacities are these terms. beta is one over twice the mean squared difference
of neighbours, so that an edge is an edge in any image.
"""

from __future__ import annotations

import warnings

import numpy

NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))  # each pair of the eight once
UNITS = 1 << 12  # capacities are whole numbers: so many to one


class Mixture:
    """A mixture of Gaussians over colours: fitted to (N, C) values in [0, 1], the same each time.

    Args:
        colours: (N, C).
        components: Gaussians; fewer where there are not as many different colours.
    """

    def __init__(self, colours: numpy.ndarray, components: int) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        count = max(1, min(components, len(numpy.unique(colours, axis=0)), len(colours) // 4))
        self.model = GaussianMixture(count, covariance_type="diag", reg_covar=1e-3, max_iter=20, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model.fit(colours)

    def log_density(self, colours: numpy.ndarray) -> numpy.ndarray:
        """(H, W, C) to (H, W)."""
        return self.model.score_samples(colours.reshape(-1, colours.shape[-1])).reshape(colours.shape[:-1])


def pairs(colours: numpy.ndarray, gamma: float) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """All neighbouring pixels of (H, W, C), each pair once: two columns of flat places (M,), and what parting them costs (M,)."""
    height, width = colours.shape[:2]
    places = numpy.arange(height * width).reshape(height, width)
    first, second, squares, distances = [], [], [], []
    for down, right in NEIGHBOURS:
        here = numpy.s_[: height - down, max(0, -right) : width - max(0, right)]
        there = numpy.s_[down:, max(0, right) : width + min(0, right)]
        first.append(places[here].ravel())
        second.append(places[there].ravel())
        squares.append(numpy.square(colours[here] - colours[there]).sum(-1).ravel())
        distances.append(numpy.full(first[-1].size, numpy.hypot(down, right)))
    square = numpy.concatenate(squares)
    beta = 1 / max(2 * square.mean(), 1e-12)
    cost = gamma / numpy.concatenate(distances) * numpy.exp(-beta * square)
    return numpy.concatenate(first), numpy.concatenate(second), cost


def graph_cut(
    colours: numpy.ndarray, object_cost: numpy.ndarray, background_cost: numpy.ndarray, gamma: float = 5.0
) -> numpy.ndarray:
    """The labelling of least energy, by a maximum flow: bool (H, W), True for object.

    Args:
        colours: (H, W, C) in [0, 1].
        object_cost, background_cost: (H, W), what calling a pixel so costs; only their difference counts.
        gamma: the weight of neighbours that are parted.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    first, second, cost = pairs(colours, gamma)
    count = object_cost.size
    source, sink = count, count + 1
    gain = numpy.clip(
        background_cost - object_cost, -1e4, 1e4
    ).ravel()  # above zero: the pixel pulls towards the object
    every = numpy.arange(count)
    heads = numpy.concatenate([first, second, numpy.full(count, source), every])
    tails = numpy.concatenate([second, first, every, numpy.full(count, sink)])
    flows = numpy.concatenate([cost, cost, numpy.maximum(gain, 0), numpy.maximum(-gain, 0)])
    whole = numpy.round(flows * UNITS).astype(numpy.int32)
    graph = coo_array((whole, (heads, tails)), shape=(count + 2, count + 2)).tocsr()
    left = graph - maximum_flow(graph, source, sink).flow
    left.data[left.data < 0] = 0
    left.eliminate_zeros()
    reached = breadth_first_order(left, source, return_predecessors=False)
    found = numpy.zeros(count + 2, dtype=bool)
    found[reached] = True
    return found[:count].reshape(object_cost.shape)
