"""What a frozen diffusion model is: its files, its noise schedule, and pictures drawn with it."""
