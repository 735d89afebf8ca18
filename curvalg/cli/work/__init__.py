"""What commands compute and print: tables and lines for people, JSON for programs."""
