"""Runs: training a domain model and adapting a generator inside ComfyUI."""
