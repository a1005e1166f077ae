"""`Rows`, under the name by which programs import it."""

from async_tier.streams.rows import Rows

__all__ = ["Rows"]
