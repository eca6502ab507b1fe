"""What our steps cost, beside plain implementations of the same steps: README.md has the tables."""
