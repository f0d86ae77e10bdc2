"""Starting processes. Installed as bigtrain.launch; never imports torch."""
