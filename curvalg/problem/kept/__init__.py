"""What is kept between products, within a budget."""
