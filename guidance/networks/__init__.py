"""Networks of the Stable Diffusion family under their LDM (CompVis) names, and StyleGAN2 under NVIDIA's."""
