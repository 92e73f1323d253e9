"""Speed as ratios within one run, and sameness: one file a benchmark."""
