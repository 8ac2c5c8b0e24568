"""The processes of a job. Plain classes; `ray.remote` is applied in `cluster.py` alone."""
