"""Many runs: plans, local sweeps, Slurm, status."""
