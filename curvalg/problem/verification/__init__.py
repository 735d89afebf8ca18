"""What is verified before it is believed, and what replaces what fails."""
