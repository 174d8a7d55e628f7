"""Sizes as people write them."""

from __future__ import annotations

from ..errors import QuantError

_UNITS = {"": 1, "b": 1} | {
    f"{p}{b}": n**k for k, p in enumerate("kmgt", 1) for b, n in (("", 1024), ("b", 1000), ("ib", 1024))
}


def parse_size(text: str) -> int:
    """Parse `4.2GiB`, `6G`, `900 MB` or `123456` to bytes.

    K, M, G and KiB, MiB, GiB are powers of 1024, as `du -h` writes them; KB, MB, GB are powers of 1000.
    """
    lowered = text.strip().lower()
    number = lowered.rstrip("bikmgt ")
    unit = _UNITS.get(lowered.removeprefix(number).strip())
    try:
        size = float(number) * (unit or 0)
    except ValueError:
        size = 0.0
    if not 1 <= size < 2**63:
        raise QuantError(f"{text!r} is not a size", "give a number of bytes, or e.g. 900MiB, 6G, 4.2GiB, 4.2GB")
    return int(size)
