import torch
from hypothesis import settings


torch.set_num_threads(1)  # tiny models, and a process for each core

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("fixed")
