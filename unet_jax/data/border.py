"""The loss weights that teach a network to keep touching cells apart (Ronneberger et al. 2015, equation 2)."""

import dataclasses
import math

import numpy as np
from scipy import ndimage

FOUR_CONNECTED = None  # scipy's default neighbourhood


@dataclasses.dataclass(frozen=True)
class Weigh:
    """`weight_map` with its settings, which tell two such functions apart.

    Attributes:
      w0, sigma, ignore_label: see `weight_map`.
    """

    w0: float
    sigma: float
    ignore_label: int

    def __call__(self, label: np.ndarray) -> np.ndarray:
        """The loss weights float32 `[H, W]` of a label."""
        return weight_map(label, self.w0, self.sigma, self.ignore_label)


def weight_map(label: np.ndarray, w0: float, sigma: float, ignore_label: int) -> np.ndarray:
    """w(x) = w_c(x) + w0 exp(-(d1(x) + d2(x))^2 / (2 sigma^2)).

    A cell is a 4-connected component of pixels of one class other than 0. d1 and d2 are the distances to the nearest
    and the second nearest cell. The second term stands in the background alone, where the network has to draw a border.
    w_c gives every class that occurs the same total weight, with a mean of one.

    Args:
      label: uint8 `[H, W]`.
      w0: the weight of a gap of no width.
      sigma: in pixels.
      ignore_label: pixels with this label weigh nothing and belong to no cell.

    Returns:
      float32 `[H, W]`.
    """
    counts = np.bincount(label.ravel(), minlength=256)
    counts[ignore_label] = 0
    occurring = max(np.count_nonzero(counts), 1)
    balance = np.divide(counts.sum(), occurring * counts, out=np.zeros(256), where=counts > 0)
    weights = balance[label]
    cells = find_cells(label, ignore_label)
    if cells.max() >= 2 and w0:
        weights += np.where(label == 0, w0 * _border_term(cells, w0, sigma), 0)
    return weights.astype(np.float32)


def find_cells(label: np.ndarray, ignore_label: int) -> np.ndarray:
    """Numbers the 4-connected components of each class other than 0 from 1 on; int32 `[H, W]`, 0 elsewhere."""
    cells = np.zeros(label.shape, np.int32)
    for value in np.unique(label):
        if value not in (0, ignore_label):
            components, _ = ndimage.label(label == value, FOUR_CONNECTED)
            cells = np.where(components > 0, components + cells.max(), cells)
    return cells


def _border_term(cells: np.ndarray, w0: float, sigma: float) -> np.ndarray:
    """exp(-(d1 + d2)^2 / (2 sigma^2)), float64 `[H, W]`, for at least two cells.

    d2 is taken around one cell after another, in the region that is nearest to it and as far beyond as the term can be
    seen in float32: a distance transform of the neighbourhood for each cell, not of the image.
    """
    d1, nearest_pixel = ndimage.distance_transform_edt(cells == 0, return_indices=True)
    nearest = cells[tuple(nearest_pixel)]
    reach = math.ceil(sigma * math.sqrt(2 * math.log(w0 * 2**26 + 2)))
    d2 = np.full(cells.shape, np.inf)
    for cell, region in enumerate(ndimage.find_objects(nearest), 1):
        around = tuple(slice(max(s.start - reach, 0), s.stop + reach) for s in region)
        others = (cells[around] > 0) & (cells[around] != cell)
        if not others.any():
            continue
        distance = ndimage.distance_transform_edt(~others)
        mine = nearest[around] == cell
        d2[around][mine] = distance[mine]
    return np.exp(-((d1 + d2) ** 2) / (2 * sigma**2))
