"""Training: a generator of events over a model, an adapter and batches. Whoever wants to show or keep them listens."""
