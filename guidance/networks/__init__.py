"""Networks of the Stable Diffusion family under their LDM (CompVis) parameter names."""
