"""Guiding: several models and conditionings in one sampling run."""
