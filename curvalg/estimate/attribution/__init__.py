"""What single samples contribute: scores of training samples for queries, and of samples for themselves."""
