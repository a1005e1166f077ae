"""What follows vLLM's interface, which differs by version."""
