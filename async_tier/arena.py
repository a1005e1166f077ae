"""`Rows`, under the name that programs import it by."""

from async_tier.streams.rows import Rows

__all__ = ["Rows"]
