"""How good a model is on rows it did not learn: perplexity, answers graded, two models compared."""
