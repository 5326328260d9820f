"""How numbers are printed, everywhere: accuracies in percent, their differences in points, IoU as it is."""

from __future__ import annotations

import math

from ivt_env.metrics.statistics import MIN_CLUSTERS


def number(value: float | None, metric: str = "share", *, sign: bool = False, digits: int | None = None) -> str:
    """A score; ``-`` where there is none.

    Args:
        value: None or NaN for none.
        metric: ``mIoU`` and ``IoU`` are printed as they are, all others in percent.
        sign: with a plus, for differences.
        digits: behind the point; None: 3 for IoU, else 1.
    """
    if value is None or math.isnan(value):
        return "-"
    plain = metric in ("mIoU", "IoU")
    digits = (3 if plain else 1) if digits is None else digits
    return format(value if plain else 100 * value, f"{'+' if sign else ''}.{digits}f")


def interval(
    low: float | None, high: float | None, metric: str = "share", *, sign: bool = False, digits: int | None = None
) -> str:
    """The ends of an interval; ``-`` where there is none."""
    ends = [number(v, metric, sign=sign, digits=digits) for v in (low, high)]
    return "-" if "-" in ends else f"[{', '.join(ends)}]"


def title(metric: str) -> str:
    """A metric with its unit."""
    return metric if metric == "mIoU" else f"{metric} (%)"


def verdict(shown: bool, images: int) -> str:
    """What is added to a number: nothing where it is significant, ``n.s.``, or that there are too few images."""
    if shown:
        return ""
    return "n.s." if images >= MIN_CLUSTERS else "n too small"


def difference(diff: float, shown: bool, images: int, metric: str) -> str:
    """A difference with its verdict, such as ``+1.2`` or ``+0.3 n.s.``."""
    return f"{number(diff, metric, sign=True)} {verdict(shown, images)}".rstrip()
