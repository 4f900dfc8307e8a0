"""What lies on disk: adapters, run folders, merged models. Everything is written beside and renamed, or not at all."""
