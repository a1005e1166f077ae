"""The code that depends on vLLM's interfaces, which differ between versions."""
