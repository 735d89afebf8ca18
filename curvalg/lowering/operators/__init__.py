"""What operators are made of: lazy sums and products, the algebra of one problem, and what is known beyond products."""
