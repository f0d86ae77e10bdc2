"""From a DeepSpeed JSON config to one of bigtrain's. Pure: neither torch nor DeepSpeed is used."""
