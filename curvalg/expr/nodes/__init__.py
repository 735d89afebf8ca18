"""The kinds of expressions that algebra makes: sums, products, inverses, blocks, arrays."""
