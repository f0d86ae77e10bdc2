"""Who does forward, backward, the update and the state: bigtrain itself, or DeepSpeed's engine."""
