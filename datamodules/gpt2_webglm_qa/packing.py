"""Packing of several records into a row, so that rows have little padding.

Finding the fewest bins is NP-hard. Best-fit decreasing takes the items from the largest to the smallest, and puts each
into the fullest bin that has room for it. It uses at most 11/9 of the fewest bins plus a constant (Johnson,
"Near-Optimal Bin Packing Algorithms", 1973), and with many small items the bins are almost full.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the numbers of the items in each bin, by best-fit decreasing. Equal sizes give equal bins."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free space and number of each bin, sorted
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        tightest = bisect_left(room, (sizes[item], 0))
        if tightest < len(room):
            left, number = room.pop(tightest)
        else:
            left, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        insort(room, (left - sizes[item], number))
    return bins
