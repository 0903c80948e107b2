"""Fine-tuning of diffusion models, one room a file; train.py at the top level puts them in order."""
