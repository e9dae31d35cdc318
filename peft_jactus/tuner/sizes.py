"""Sizes as people write them."""

from accelerate.utils import convert_file_size_to_int


def parse_size(size: int | str) -> int:
    """Return bytes; raise `ValueError` for what is no size."""
    try:
        num_bytes = int(convert_file_size_to_int(size))
    except (ValueError, TypeError):
        num_bytes = 0
    if num_bytes <= 0:
        raise ValueError(f"must be a positive number of bytes, or a size such as '8GiB' or '60MB'; got {size!r}.")
    return num_bytes
