"""What a diffusion model is, learns and is sampled by: denoiser, transformer, objectives, steps, solvers."""
