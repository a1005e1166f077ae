"""Where rows lie, and who may have how much of it."""
