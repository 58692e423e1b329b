"""What the checkpoint engine costs, beside PyTorch DCP in the same run: one question a file."""
