"""Stage 2: a density over latents. Never sees an image, never imports stage 1."""
