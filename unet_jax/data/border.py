"""Loss weights that teach a network to keep touching cells apart (Ronneberger et al. 2015, equation 2)."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from scipy import ndimage

from unet_jax.data.source import Classes
from unet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class BorderWeights:
    """The function label -> `weight_map(label, w0, sigma, ignore_label)`, for one choice of settings."""

    w0: float
    sigma: float
    ignore_label: int

    def __call__(self, label: np.ndarray) -> np.ndarray:
        """The loss weights float32 `[H, W]` of a label uint8 `[H, W]`."""
        return weight_map(label, self.w0, self.sigma, self.ignore_label)

    def key_fields(self) -> dict[str, float]:
        """What determines the weights, for a cache key; as in `config.data`, a field at its default is left out."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}


def pixel_weight_fn(settings: Mapping, classes: Classes) -> BorderWeights | None:
    """The function label -> pixel weights that `config.loss`, the settings, asks for; None if it asks for none.

    Raises:
      UserError: an invalid setting.
    """
    w0, sigma = settings["border_weight"], settings["border_sigma"]
    if not 0 <= w0 < float("inf"):
        raise UserError(f"config.loss.border_weight = {w0} must be 0 or more")
    if not 0 < sigma < float("inf"):
        raise UserError(f"config.loss.border_sigma = {sigma} must be positive")
    if w0 and classes.task == "multilabel":
        raise UserError("config.loss.border_weight is for labels of one class per pixel, not for overlapping masks")
    return BorderWeights(w0, sigma, classes.ignore_label) if w0 else None


def weight_map(label: np.ndarray, w0: float, sigma: float, ignore_label: int) -> np.ndarray:
    """w(x) = w_c(x) + w0 exp(-(d1(x) + d2(x))^2 / (2 sigma^2)).

    A cell is a 4-connected component of pixels of one class other than 0. d1 and d2 are the distances to the nearest
    and the second nearest cell. The second term is added only in the background, where the network has to draw a
    border. w_c gives every class in the image the same total weight, with a mean of one.

    Args:
      label: uint8 `[H, W]`; the weights are float32 `[H, W]`.
      w0: the weight of a gap of zero width.
      sigma: in pixels.
      ignore_label: pixels with this label get weight 0 and belong to no cell.
    """
    counts = np.bincount(label.ravel(), minlength=256)
    counts[ignore_label] = 0
    num_present = max(np.count_nonzero(counts), 1)
    balance = np.divide(counts.sum(), num_present * counts, out=np.zeros(256), where=counts > 0)
    weights = balance[label]
    cells = find_cells(label, ignore_label)
    if cells.max() >= 2 and w0:
        weights += np.where(label == 0, w0 * _border_term(cells, w0, sigma), 0)
    return weights.astype(np.float32)


def find_cells(label: np.ndarray, ignore_label: int) -> np.ndarray:
    """Numbers the 4-connected components of each class other than 0 from 1; int32 `[H, W]`, 0 elsewhere."""
    cells = np.zeros(label.shape, np.int32)
    for value in np.unique(label):
        if value not in (0, ignore_label):
            components, _ = ndimage.label(label == value)  # 4-connected, by scipy's default
            cells = np.where(components > 0, components + cells.max(), cells)
    return cells


def _border_term(cells: np.ndarray, w0: float, sigma: float) -> np.ndarray:
    """exp(-(d1 + d2)^2 / (2 sigma^2)), float64 `[H, W]`, for at least two cells.

    For the pixels whose nearest cell is c, d2 is the distance to the nearest cell other than c. It is computed cell by
    cell, each time only in the neighbourhood of these pixels: as far as the term is large enough to matter in float32.
    """
    d1, nearest_pixel = ndimage.distance_transform_edt(cells == 0, return_indices=True)
    nearest = cells[tuple(nearest_pixel)]
    reach = math.ceil(sigma * math.sqrt(2 * math.log(w0 * 2**26 + 2)))
    d2 = np.full(cells.shape, np.inf)
    for cell, region in enumerate(ndimage.find_objects(nearest), 1):
        neighbourhood = tuple(slice(max(side.start - reach, 0), side.stop + reach) for side in region)
        others = (cells[neighbourhood] > 0) & (cells[neighbourhood] != cell)
        if others.any():
            own = nearest[neighbourhood] == cell
            d2[neighbourhood][own] = ndimage.distance_transform_edt(~others)[own]
    return np.exp(-((d1 + d2) ** 2) / (2 * sigma**2))
