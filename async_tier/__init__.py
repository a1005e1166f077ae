"""An asynchronous memory tier for vLLM's KV-cache offloading; see README.md.

Importing the package starts nothing and imports neither vLLM nor CUDA.
"""
