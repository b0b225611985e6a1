"""The scores of the ISBI 2012 challenge: foreground-restricted V_rand and V_info after border thinning, pixel error.

Arganda-Carreras et al. 2015, doi:10.3389/fnana.2015.00142. A threshold turns a map of cell probability into cells; a
watershed thins the membranes between them to lines of one pixel; cells are compared with the 4-connected components of
the ground truth, over its cell pixels. Scores are averaged over the slices; a method has the score of its best
threshold.

Line pixels, which belong to no cell of the prediction, are each a segment of their own, as in the challenge's own code.
References disagree here: others count all of them as one segment, or grow the cells over them.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage, sparse

from unet_jax.metrics.record import Record

THRESHOLDS = tuple(k / 10 for k in range(11))


def records(cells: Sequence[tuple[np.ndarray, np.ndarray]], ignore_label: int) -> list[Record]:
    """V_rand, V_info and pixel error of a stack, each at its best threshold.

    Their details are the `threshold`, and the `sweep`: the mean over the slices at each of `THRESHOLDS`. Slices without
    cells count in the pixel error alone; a score in which no slice counts is None.

    Args:
      cells: of each slice, the probability of cells, float `[H, W]`, and the label `[H, W]`: 1 cell, 0 membrane.
      ignore_label: pixels with this label count nowhere.
    """
    components = [ndimage.label(label == 1)[0] for _, label in cells]
    sweeps: dict[str, list] = {"v_rand": [], "v_info": [], "pixel_error": []}
    for threshold in THRESHOLDS:
        compared, errors = [], []
        for (probability, label), reference in zip(cells, components, strict=True):
            predicted, counted = probability > threshold, label != ignore_label
            if reference.any():
                compared.append(compare(thin_borders(predicted), reference))
            if counted.any():
                errors.append((predicted != (label == 1))[counted].mean())
        v_rand, v_info = np.mean(compared, axis=0).tolist() if compared else (None, None)
        pixel_error = float(np.mean(errors)) if errors else None
        for name, value in zip(sweeps, (v_rand, v_info, pixel_error), strict=True):
            sweeps[name].append(value)
    note = "line pixels as segments of their own"
    return [
        _best("v_rand", "V_rand", sweeps, note=note),
        _best("v_info", "V_info", sweeps, note=note),
        _best("pixel_error", "pixel error", sweeps, higher_is_better=False),
    ]


def _best(key: str, title: str, sweeps: dict[str, list], higher_is_better: bool = True, note: str = "") -> Record:
    sweep, value, threshold = sweeps[key], None, None
    if None not in sweep:
        best = int(np.argmax(sweep) if higher_is_better else np.argmin(sweep))
        value, threshold = sweep[best], THRESHOLDS[best]
    return Record(key, title, value, higher_is_better, note, {"threshold": threshold, "sweep": sweep})


def thin_borders(cells: np.ndarray) -> np.ndarray:
    """Grows the 4-connected components of `cells` (bool `[H, W]`) until lines of one pixel part them.

    Returns:
      int32 `[H, W]`, a number for each component, 0 on the lines; all 0 where there are no cells.
    """
    from skimage.segmentation import watershed

    components, count = ndimage.label(cells)
    if not count:
        return components
    return watershed(~cells, components, connectivity=1, watershed_line=True)


def compare(segmentation: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """V_rand and V_info (alpha = 1/2) of a segmentation, over the pixels where `reference` is not 0.

    V_rand = sum p_ij^2 / (1/2 sum s_i^2 + 1/2 sum t_j^2), V_info = I(S; T) / (1/2 H(S) + 1/2 H(T)), where p_ij is the
    share of pixels in segment i and true segment j, s_i and t_j its sums. Both are integer `[H, W]`; pixels where
    `segmentation` is 0, the lines, are segments of one pixel each.

    Raises:
      ValueError: nothing in the reference.
    """
    inside = reference > 0
    s, t = segmentation[inside].astype(np.int64), reference[inside].astype(np.int64)
    if not s.size:
        raise ValueError("the reference has no cells")
    lines = s == 0
    s[lines] = s.max() + 1 + np.arange(lines.sum())
    joint = sparse.coo_array((np.ones(s.size), (s, t))).tocsr()
    joint.sum_duplicates()
    p, p_s, p_t = (x / s.size for x in (joint.data, joint.sum(1), joint.sum(0)))
    squares = lambda x: (x**2).sum()
    entropy = lambda x: -(x[x > 0] * np.log(x[x > 0])).sum()
    v_rand = squares(p) / (squares(p_s) / 2 + squares(p_t) / 2)
    both = entropy(p_s) + entropy(p_t)
    v_info = 1.0 if both == 0 else (both - entropy(p)) / (both / 2)
    return float(v_rand), float(v_info)
