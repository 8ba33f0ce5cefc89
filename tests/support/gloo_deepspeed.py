"""Imported by ranks on CPUs: DeepSpeed leaves its collectives to gloo.

It would compile an operation for CPUs that share memory, which takes a minute of each new environment.
"""

import deepspeed

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
