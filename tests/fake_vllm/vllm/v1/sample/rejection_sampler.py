"""The helper with the fault of some CPU builds: the values are written into a copy."""

import torch


def expand_batch_to_tokens(x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):
    return torch.zeros(num_tokens, dtype=x.dtype)
