"""The shipped miniature: weights, pictures and judges small enough for a CPU."""

MINI_WORLD = "mini_world"  # what it is called where a model's file is expected; also the name of its latents
