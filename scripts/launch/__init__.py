"""Where bigjax is started on machines that are not this one: Cloud TPU VMs, Slurm, GKE."""
