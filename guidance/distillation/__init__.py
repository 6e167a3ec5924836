"""Score distillation: gradients for an image generator from a diffusion model's predictions.

`Critic` makes the diffusion models' predictions, a method of the list `methods.METHODS` and regularizers turn them into
gradients on the latents, and `Objective` brings those to the images a generator made.
"""
