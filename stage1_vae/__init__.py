"""Stage 1: images to latents and back. Knows no prior network, disk, device or command line."""
