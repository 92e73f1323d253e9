"""The training of one model: the loop, checkpoints, devices, sharded weights, trackers, and the refining of both stages."""
