"""The memory that rows lie in, and how much of it a tier may have."""
