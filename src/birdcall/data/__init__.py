"""Training data: recordings, folds, noise, and clips with their targets."""
