"""What subnets achieve: predictors of top-1, how they are fitted, their records."""
