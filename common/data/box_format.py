"""The formats in which data sets write boxes, and which of them the boxes of a file are in.

A format is a layout (LAYOUTS), in pixels or in normalised coordinates. Boxes are (A, 4) float64, NaN where there is
none; sizes are (A, 2) float64, width and height of their images in pixels, NaN where unknown.
"""

import numpy as np

LAYOUTS = ("xywh", "xyxy", "cxcywh")  # left, top, width, height; left, top, right, bottom; centre, width, height
TOLERANCE = 1.0  # pixels that a box may reach beyond its image
MIN_EVIDENCE = 3  # boxes that fit in another layout and not as xywh; fewer may be faults of the annotations
MIN_RATIO = 10  # so many times more boxes must fit only in the other layout than only as xywh
MIN_FIT = 0.9  # fraction of the boxes that must fit in the other layout


def to_xywh(boxes: np.ndarray, layout: str) -> np.ndarray:
    """Boxes of a layout -> (A, 4) xywh."""
    first, second = boxes[:, :2], boxes[:, 2:]
    if layout == "xyxy":
        return np.hstack([first, second - first])
    return np.hstack([first - second / 2, second]) if layout == "cxcywh" else boxes


def are_normalised(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether nearly all boxes, some of fractions, are within 1.5 pixels of the origin of images larger than that."""
    boxes = boxes[np.isfinite(boxes).all(1) & (sizes > 2).all(1)]
    return bool((boxes % 1 > 0).any()) and bool((np.abs(boxes).max(1) <= 1.5).mean() >= 0.99)


def fits(boxes: np.ndarray, sizes: np.ndarray, layout: str) -> np.ndarray:
    """(A,) bool: whether a box in pixels, read in this layout, has an area and lies inside its image."""
    xywh = to_xywh(boxes, layout)
    low, high = xywh[:, :2], xywh[:, :2] + xywh[:, 2:]
    return np.all((low < high) & (low >= -TOLERANCE) & (high <= sizes + TOLERANCE), axis=1)


def layout_fits(boxes: np.ndarray, sizes: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """`fits` for every layout, and the number of the boxes that are finite and on images of known size."""
    known = np.isfinite(boxes).all(1) & np.isfinite(sizes).all(1)
    return {layout: fits(boxes, sizes, layout) for layout in LAYOUTS}, int(known.sum())


def detect_layout(fit: dict[str, np.ndarray], known: int) -> str:
    """The layout of boxes in pixels that should be xywh: another one where that is certain, "" where too few decide.

    Many correct boxes fit their images in several layouts, but of a large set never all of them do.

    Args:
        fit: (A,) bool for each layout, as `layout_fits` returns it.
        known: the number that `layout_fits` returns with it.
    """
    undecided = False
    for layout in sorted(LAYOUTS[1:], key=lambda name: -fit[name].sum()):
        only_so, only_xywh = (fit[layout] & ~fit["xywh"]).sum(), (fit["xywh"] & ~fit[layout]).sum()
        possible = fit[layout].sum() >= MIN_FIT * known and only_so >= MIN_RATIO * only_xywh
        if possible and only_so >= MIN_EVIDENCE:
            return layout
        undecided = undecided or possible
    return "" if undecided else "xywh"
