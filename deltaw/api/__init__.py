"""The verbs: fine-tune, talk, evaluate, merge. The command line says nothing that cannot be said here."""
