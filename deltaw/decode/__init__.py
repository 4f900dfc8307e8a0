"""Generation: a cache of keys and values, a way to pick tokens, and the loop over both."""
