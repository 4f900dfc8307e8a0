"""Many personas on one base: pages for keys and values, what each row of a batch wears, and who is served when."""
