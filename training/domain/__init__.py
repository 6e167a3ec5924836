"""A text-free copy of the prior and one step after the other (IDG, arXiv 2312.08195)."""
