"""The claims of in-domain guidance (arXiv 2312.08195), measured on the mini world."""
