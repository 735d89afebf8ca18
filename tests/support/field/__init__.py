"""What the field tests share."""
