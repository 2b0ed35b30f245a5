"""A run's folder, and all that is done with one: train, go on online, fine-tune, evaluate, diagnose, report."""
