"""In-domain guidance's claims (arXiv 2312.08195), measured on the mini world: ``python run.py claims idg``."""
