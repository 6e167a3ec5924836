"""The checkpoint that training starts from: opening it, its text encoders, its noise."""
