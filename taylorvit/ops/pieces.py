"""How a range is cut into pieces that are worked on one after the other."""


def pieces(total: int, largest: int) -> list[slice]:
    """Cut range(total) into the fewest slices of at most `largest`, all of nearly one size; none for total = 0."""
    count = -(-total // largest)
    size = -(-total // max(1, count))
    return [slice(start, min(start + size, total)) for start in range(0, total, max(1, size))]
