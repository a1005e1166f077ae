"""`async_tier.arena.Rows`, the old name of `async_tier.streams.rows.Rows`, for programs that import it."""

from async_tier.streams.rows import Rows

__all__ = ["Rows"]
