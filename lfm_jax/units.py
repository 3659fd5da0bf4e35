"""Numbers as people read them."""

from __future__ import annotations


def size(n: float) -> str:
    """Bytes in binary units: `1.50 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1000:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} TiB"


def si(n: float, unit: str = "") -> str:
    """A count in decimal units: `354 M`, `9.55 PFLOP`."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(n) < 1000:
            return f"{n:.3g} {prefix}{unit}".rstrip()
        n /= 1000
    return f"{n:.3g} Z{unit}"


def seconds(t: float) -> str:
    """A time: `12.3 ms`, `4.5 s`."""
    return f"{t:.3g} s" if t >= 1 else f"{1e3 * t:.3g} ms"


def clock(seconds: float) -> str:
    """A time as clocks have it: `1:02:03`, `2:03`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
