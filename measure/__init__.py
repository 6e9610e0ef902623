"""What a ratio of memorization does not tell: its control, its curve, quality, and who is copied."""
