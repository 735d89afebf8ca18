"""Plans: an expression as the sweeps and matrices that make its product."""
