"""From an expression to the sweeps and matrices that make its product."""
