"""From files to tokens: rows with their line numbers, ids with a mark on what is learnt, documents laid flat."""
