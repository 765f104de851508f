"""Diffusion Transformers outside of diffusers, as their authors' packages have them, and adapted linear layers."""
