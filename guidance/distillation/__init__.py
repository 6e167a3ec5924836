"""Score distillation: gradients for an image generator from a diffusion model's predictions.

`Critic` asks the diffusion models, a method (`SDS` and its family) and regularizers turn their predictions into
gradients on the latents, and `Objective` brings those to the images a generator made. The public names are exported
by `guidance`.
"""
