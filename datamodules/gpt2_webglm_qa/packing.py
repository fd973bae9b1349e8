"""Packing: several records in one row, so that few places are left to padding.

Putting things of given sizes into as few bins as possible is NP-hard, but best-fit decreasing comes close: the largest
first, each into the fullest bin that still has room for it. It needs at most 11/9 of the fewest bins, and a few more
(Johnson, "Near-Optimal Bin Packing Algorithms", 1973); with many small things it leaves hardly a gap.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Distributes things over bins by best-fit decreasing. The same sizes always give the same bins.

    Args:
        sizes: Size of each thing, at most `capacity`.
        capacity: What a bin holds.

    Returns:
        The numbers of the things in each bin.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what each bin has left, and its number; sorted
    for thing in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        tightest = bisect_left(room, (sizes[thing], 0))
        if tightest < len(room):
            left, number = room.pop(tightest)
        else:
            left, number = capacity, len(bins)
            bins.append([])
        bins[number].append(thing)
        insort(room, (left - sizes[thing], number))
    return bins
