"""What a run is: schema, loading, layout and the checks that need no process and no torch."""
