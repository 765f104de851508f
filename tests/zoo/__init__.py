"""Every transformer denoiser that diffusers exports, small, with its inputs and its branches: see ``case.py``."""
