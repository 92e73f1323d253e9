"""What is set here is set before any library reads it."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
