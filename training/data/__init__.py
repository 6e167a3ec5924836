"""Images for training: found, checked, sorted into shapes, encoded once, and drawn from reproducibly."""
