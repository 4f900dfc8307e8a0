"""Native code (native/*.cpp); a torch reference is the oracle of each, and does the work where it is not built."""
