"""A run: its config and recipe, its folder, its phases, its latents and priors, and images drawn from it."""
