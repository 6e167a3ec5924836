"""The claims of in-domain guidance that is baked into a LoRA, measured on the mini world."""
