"""Reading and writing checkpoints: PyTorch's files, policy folders, the folder that is written."""
