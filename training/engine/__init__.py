"""What every run is made of: settings, checkpoints, events, average, lock, signals, processes, randomness."""
