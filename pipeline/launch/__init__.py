"""Job files for engines that exist: Slurm, SkyPilot, Kubernetes.

A file is filled with what the run needs, and handed to the engine's own client. Nothing is queued,
placed or retried here.
"""
