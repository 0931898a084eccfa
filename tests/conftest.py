"""One thread, so that tests time alike on shared machines."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("offramp", deadline=None, derandomize=True)
settings.load_profile("offramp")
