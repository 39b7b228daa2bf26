"""The denoiser that samplers call: guidance, control, step caching, init images."""
