"""The command line: it reads flags, calls the verbs, and shows what they say."""
