"""Equal loudness for a pair, from figures that were measured once."""

from __future__ import annotations

TARGET_LUFS = -18.0
PEAK_CEILING_DBFS = -1.0


def pair_gains_db(lufs_x: float | None, peak_x_dbfs: float | None, lufs_y: float | None, peak_y_dbfs: float | None) -> tuple[float, float]:
    """Gains that bring both clips to one loudness: the target, or lower if a true peak would pass the ceiling.

    Args: integrated loudness (BS.1770) and true peak of each clip; None where a clip has none, being silent.
    Returns: gain of x and of y, dB. A silent clip is left alone and the other goes to the target by itself.
    """
    levels = [TARGET_LUFS]
    for lufs, peak_dbfs in ((lufs_x, peak_x_dbfs), (lufs_y, peak_y_dbfs)):
        if lufs is not None and peak_dbfs is not None:
            levels.append(lufs + PEAK_CEILING_DBFS - peak_dbfs)
    level = min(levels)
    return (0.0 if lufs_x is None else level - lufs_x), (0.0 if lufs_y is None else level - lufs_y)
