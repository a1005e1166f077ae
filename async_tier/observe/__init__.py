"""Shows people what the tier did: log lines, traces, and pictures of traces."""
