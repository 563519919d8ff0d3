import torch

# The tensors are small: threads would only get in the way of each other and of parallel workers.
torch.set_num_threads(1)
