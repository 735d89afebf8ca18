"""First-party matrices, written against the public names of curvalg and found through entry points."""
