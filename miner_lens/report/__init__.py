"""What does it look like? Figures from results, computing nothing."""
