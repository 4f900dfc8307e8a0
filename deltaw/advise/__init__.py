"""What the machine can do, and what a run will take on it: measured, then computed, before the work begins."""
