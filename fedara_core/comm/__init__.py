"""Communicators: serial, MPI, torch.distributed."""
