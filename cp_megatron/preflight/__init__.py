"""What is checked and decided before torch is loaded."""
