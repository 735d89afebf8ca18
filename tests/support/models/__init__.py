"""Models of real libraries, small and with random weights, and their matrices by plain torch."""
