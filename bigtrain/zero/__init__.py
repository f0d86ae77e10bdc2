"""ZeRO (https://arxiv.org/abs/1910.02054): training state shared out over data-parallel ranks."""
