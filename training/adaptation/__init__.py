"""A generator, a critic and one step after the other (SGF, arXiv 2212.04473)."""
