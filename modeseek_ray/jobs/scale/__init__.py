"""How long a step takes, part by part, and how GPUs are best divided: a scale model, nothing is run.

    P  parameters     P_a  those a position is multiplied with      A  trainable parameters     R  trainers
    n  positions of one rank's share of a batch      m  its trained ones      T  mean length of a sample
    L  layers     h  width     V  vocabulary     b  bytes per value     G  engines

Operations: a matrix product costs two per parameter and position; backward twice the forward; with
gradient checkpointing one forward more; with LoRA half the backward (no gradients of frozen weights).
Attention adds 2 T h L per position (causal: half of 4 T h L). Communication is ZeRO's (Rajbhandari et
al. 2020, 1910.02054): reduce-scatter and all-gather move (R - 1) / R of what they are given, and
nothing is taken to overlap with computing.
"""

from modeseek_ray.jobs.scale.division import Split
from modeseek_ray.jobs.scale.estimate import Scale, scale
from modeseek_ray.jobs.scale.parts import TimePart

__all__ = ["Scale", "Split", "TimePart", "scale"]
