"""The detector, and what teaches it. `load_detector` is the way in for Python programs."""

from common.model.trained import load_detector

__all__ = ["load_detector"]
