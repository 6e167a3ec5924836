"""The claims of StyleGAN-Fusion (arXiv 2212.04473), measured on the mini world."""
