"""modeseek-ray: fine-tuning that decides how much each sample counts.

Public names: `modeseek_ray.config.JobConfig`, `modeseek_ray.weights.weigh`,
`modeseek_ray.client.Client`. Everything else is internal.
"""

__version__ = "0.1.0"
