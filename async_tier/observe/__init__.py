"""What the tier did, for people: log lines, traces, pictures of them."""
