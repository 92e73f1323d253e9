"""Data sets: where images come from, and how their files are read."""
