"""Training: the domain model, generators, and the mini world. May import `guidance`, never ComfyUI."""
