"""One thread a test process: small tensors gain nothing from more, and test processes that share cores lose a lot."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start
torch.set_num_threads(1)
