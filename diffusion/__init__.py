"""What a diffusion model learns and how it is sampled: objectives and solvers."""
