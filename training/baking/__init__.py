"""In-domain guidance baked into the prior's weights, usually as a LoRA: a run of the engine."""
