"""Models: files to MODELs and generators, and what a MODEL can be written as."""
