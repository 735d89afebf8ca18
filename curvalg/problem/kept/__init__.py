"""What is kept between products within a budget, and what was measured to choose between them."""
